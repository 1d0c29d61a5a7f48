"""Real Megatron ranks that stream quantized tensors, and save the same model.

    torchrun --nproc-per-node N live_refit.py HF_DIR OUT_DIR SIZES_JSON

Each rank leaves what it was given as OUT_DIR/KIND_RANK.safetensors, and how many of these tensors were alive at once.
"""

import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from safetensors.torch import save_file
from torch import Tensor

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.process_ranks import world_rank
from amaxbridge.bridge.live.refit import Refit
from tests.workers.live_moe import insert_quantizers, set_amax_from_names


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(**sizes):
        chunks = megatron.build_chunks(bridge.hf)
        bridge.load_hf_weights(chunks)
        for chunk in chunks:
            insert_quantizers(chunk)
            quantize_cache(chunk)
        set_amax_from_names(chunks)
        alive = {}
        for kind, scheme in (("plain", None), ("nvfp4", "nvfp4"), ("auto", "auto")):
            small = Refit(bridge, chunks, scheme=scheme, keep_memory=False, bucket_bytes=1)
            tensors, alive[kind] = consume(small.run())
            save_file(tensors, out / f"{kind}_{world_rank()}.safetensors")
        bridge.save_hf_pretrained(chunks, out / "plain", scheme="none")
        bridge.save_hf_pretrained(chunks, out / "nvfp4", max_shard_bytes=30_000)
    (out / f"alive_{world_rank()}.json").write_text(json.dumps(alive))


def quantize_cache(chunk: Any) -> None:
    """Adds cache quantizers as ModelOpt does to Transformer Engine's attention, which needs a GPU."""
    for layer in chunk.decoder.layers:
        for letter in "kv":
            quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=(4, 3)))
            setattr(layer.self_attention.core_attention, f"{letter}_bmm_quantizer", quantizer)


def consume(stream: Iterator[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], int]:
    """Copies of all tensors, and how many of those given were alive at once, though they were used one by one."""
    copies, given, most = {}, list[weakref.ref[Tensor]](), 0
    for name, tensor in stream:
        assert name not in copies, name
        copies[name] = tensor.clone().contiguous()
        given.append(weakref.ref(tensor))
        del tensor
        most = max(most, sum(each() is not None for each in given))
    return copies, most


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
