"""Loads checkpoints in vLLM on a GPU, in vLLM's environment: kernels, log-probabilities, what they generate.

    python serve_some.py OUT_DIR CHECKPOINT REFERENCE.safetensors [CHECKPOINT REFERENCE.safetensors …]

REFERENCE has `tokens` and the `logits` that must come out. OUT_DIR/MODEL.NAME.pt is what vLLM found, for CHECKPOINT
MODEL/NAME.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm import LLM, SamplingParams

GENERATED = 16


def main(out: Path, pairs: list[Path]) -> None:
    for checkpoint, reference in zip(pairs[::2], pairs[1::2], strict=True):
        expected = load_file(reference)
        found: dict[str, Any] = {"name": checkpoint.name, "model": checkpoint.parent.name}
        try:
            found |= serve(checkpoint, expected["tokens"], expected["logits"].shape[-1])
            difference = (found["logprobs"] - expected["logits"].log_softmax(-1)[:, :-1]).abs()
            found |= {"mean": float(difference.mean()), "largest": float(difference.max())}
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
        torch.save(found, out / f"{checkpoint.parent.name}.{checkpoint.name}.pt")
        print({name: value for name, value in found.items() if name != "logprobs"}, flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def serve(checkpoint: Path, tokens: Tensor, vocabulary: int) -> dict[str, Any]:
    """Log-probabilities of the vocabulary after each token but the last of each prompt, and what comes next."""
    config = json.loads((checkpoint / "config.json").read_text())
    llm = LLM(
        model=str(checkpoint),
        dtype="bfloat16",
        attention_backend="TRITON_MLA" if "kv_lora_rank" in config else "TRITON_ATTN",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=4,
        max_logprobs=-1,
        seed=0,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 28,
        gpu_memory_utilization=0.05,
        **({"gdn_prefill_backend": "triton"} if "linear_num_key_heads" in config else {}),
    )
    prompts = [{"prompt_token_ids": row.tolist()} for row in tokens]
    sampling = SamplingParams(temperature=0, max_tokens=GENERATED, prompt_logprobs=-1, detokenize=False)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    logprobs = torch.full((len(tokens), tokens.shape[1] - 1, vocabulary), float("nan"))
    for row, output in enumerate(outputs):
        for position, entries in enumerate(output.prompt_logprobs[1:]):
            for token, entry in entries.items():
                logprobs[row, position, token] = entry.logprob
    return {
        "logprobs": logprobs,
        "generated": [list(output.outputs[0].token_ids) for output in outputs],
        "kernels": sorted(llm.collective_rpc(kernels)[0]),
    }


def kernels(worker: Any) -> set[str]:
    """Classes that compute the quantized layers: methods, their schemes and kernels."""
    found = set[str]()
    for layer in worker.get_model().modules():
        method, scheme = (getattr(layer, name, None) for name in ("quant_method", "scheme"))
        for holder in (method, scheme):
            for value in vars(holder).values() if hasattr(holder, "__dict__") else ():
                if "Kernel" in type(value).__name__ or "Experts" in type(value).__name__:
                    found.add(type(value).__name__)
            for name in ("nvfp4_backend", "fp8_backend", "mxfp4_backend", "wna16_moe_backend", "backend"):
                if hasattr(holder, name):
                    found.add(f"{name}={getattr(holder, name)}")
        if method is not None:
            found.add(type(method).__name__)
        if scheme is not None:
            found.add(type(scheme).__name__)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(map(Path, sys.argv[2:])))
