"""Real Megatron ranks that load a Hugging Face MoE model, quantize it with ModelOpt and export it.

    torchrun --nproc-per-node N live_moe.py HF_DIR OUT_DIR SIZES_JSON

SIZES_JSON are the arguments of `megatron.distributed`. Every topology exports with amax made from a hash of the
quantizer's global name, so that an amax of a wrong expert or layer shows; the experts' weights differ because they come
from a Hugging Face model. A topology of one pipeline stage also notes its logits; EP=2 alone does what ModelOpt can do
there: it calibrates, and saves a checkpoint.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from megatron.core import parallel_state
from modelopt.torch.quantization.nn import TensorQuantizer

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import walk_parameters, walk_quantizers
from amaxbridge.bridge.live.process_ranks import world_rank
from amaxbridge.mappings.errors import AmaxError
from tests.workers.model import TOKENS, forward


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(**sizes):
        chunks = megatron.build_chunks(bridge.hf)
        bridge.load_hf_weights(chunks)
        bridge.save_hf_pretrained(chunks, out / "plain", scheme="none")
        if sizes.get("pp", 1) == 1:
            save_logits(chunks[0], out / "logits.pt")
        for chunk in chunks:
            insert_quantizers(chunk)
        note_names(chunks, out)
        set_amax_from_names(chunks)
        bridge.save_hf_pretrained(chunks, out / "nvfp4", max_shard_bytes=60_000)
        mirror_amax(bridge, chunks)
        bridge.save_hf_pretrained(chunks, out / "mirrored", max_shard_bytes=60_000)
        if sizes == {"tp": 1, "ep": 2}:
            megatron.save_checkpoint(chunks[0], out / "checkpoint", iteration=3)
            (out / f"refusal_{world_rank()}.txt").write_text(refusal_of_an_uncalibrated_expert(bridge, chunks, out))
            for quantizer in walk_quantizers(chunks):
                quantizer.module.reset_amax()
            mtq.calibrate(chunks[0], "max", forward)
            chunks[0].bfloat16()
            bridge.save_hf_pretrained(chunks, out / "calibrated")


def insert_quantizers(chunk: Any, settings: Any = mtq.NVFP4_DEFAULT_CFG) -> None:
    """ModelOpt's quantizers, without a calibration; NVFP4's if not told otherwise.

    ModelOpt refuses sequential experts at TP × EP, because of how it calibrates and saves them. It asks the experts'
    configuration, so that says EP=1 meanwhile: the quantizers are the same.
    """
    configs = {id(each.config): each.config for each in chunk.modules() if hasattr(each, "local_experts")}.values()
    sizes = [config.expert_model_parallel_size for config in configs]
    for config in configs:
        config.expert_model_parallel_size = 1
    mtq.quantize(chunk, settings)
    for config, size in zip(configs, sizes, strict=True):
        config.expert_model_parallel_size = size


def set_amax_from_names(chunks: list[Any], parts: int = 1) -> None:
    """The numbers of layers and experts are found here by other means than the bridge's, whose errors must show.

    A decoder layer of Hugging Face is `parts` layers of the model.
    """
    rank = parallel_state.get_expert_model_parallel_rank()
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        for name, module in layer.named_modules():
            if not isinstance(module, TensorQuantizer) or not module.is_enabled:
                continue
            local = re.search(r"local_experts\.(\d+)", name)
            if local:
                name = name.replace(local[0], str(rank * layer.mlp.num_local_experts + int(local[1])))
            digest = hashlib.sha256(f"{(layer.layer_number - 1) // parts}.{name}".encode()).digest()
            module._buffers.pop("_amax", None)  # in bf16, where different hashes would become one number
            module.amax = torch.tensor(0.25 + int.from_bytes(digest[:3], "little") / 2**24)


def mirror_amax(bridge: AutoBridge, chunks: list[Any]) -> None:
    """Collects amax under Hugging Face names, resets the quantizers, and loads the amax back."""
    state = bridge.collect_quant_state(chunks)
    for quantizer in walk_quantizers(chunks):
        quantizer.module.amax = torch.zeros(())
    bridge.load_quant_state(chunks, state)


def note_names(chunks: list[Any], out: Path) -> None:
    """Writes the global names of what this rank holds."""
    names = {
        "parameters": [each.name for each in walk_parameters(chunks)],
        "quantizers": [each.name for each in walk_quantizers(chunks)],
    }
    (out / f"names_{world_rank()}.json").write_text(json.dumps(names))


def refusal_of_an_uncalibrated_expert(bridge: AutoBridge, chunks: list[Any], out: Path) -> str:
    """Expert 5, which the second rank alone holds, never saw a token."""
    for quantizer in walk_quantizers(chunks):
        if quantizer.name == "decoder.layers.1.mlp.experts.linear_fc2.input_quantizer.5":
            del quantizer.module._buffers["_amax"]
    try:
        bridge.save_hf_pretrained(chunks, out / "refused")
    except AmaxError as error:
        return str(error)
    return "not refused"


def save_logits(model: Any, path: Path) -> None:
    logits = forward(model)
    if world_rank() == 0:
        torch.save({"tokens": TOKENS, "logits": logits}, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
