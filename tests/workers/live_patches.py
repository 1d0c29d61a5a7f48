"""Real Megatron that builds, runs, saves and loads a Mamba model on the CPU, and what it leaves patched.

    torchrun --nproc-per-node 1 live_patches.py HF_DIR OUT_DIR

Writes `patches.json`: for each moment, the watched attributes that are not the originals.
"""

import json
import sys
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.ssm import mamba_mixer
from megatron.core.transformer.dot_product_attention import DotProductAttention
from modelopt.torch.quantization.nn import QuantModuleRegistry

from amaxbridge.bridge import AutoBridge, megatron
from tests.support.cpu_patches import ON_A_CPU

WATCHED = [
    *ON_A_CPU,
    (mamba_mixer, "HAVE_MAMBA_SSM"),
    (mamba_mixer, "ExtendedRMSNorm"),
    (mamba_mixer, "mamba_chunk_scan_combined"),
    (filesystem_async, "_results_queue"),
]
ORIGINALS = [getattr(owner, name) for owner, name in WATCHED]


def changed() -> list[str]:
    """The watched attributes that are not the originals now."""
    found = [
        name for (owner, name), original in zip(WATCHED, ORIGINALS, strict=True) if getattr(owner, name) is not original
    ]
    return [*found, *(["DotProductAttention"] if DotProductAttention in QuantModuleRegistry else [])]


def main(hf: Path, out: Path) -> None:
    bridge, seen = AutoBridge.from_hf_pretrained(hf), {"before": changed()}
    with megatron.distributed(tp=1):
        model = megatron.build_model(bridge.hf)
        seen["built"] = changed()
        bridge.load_hf_weights(model)
        tokens = torch.arange(8)[None]
        mask = torch.ones(8, 8, dtype=torch.bool).triu(1)[None, None]
        first = model.eval()(tokens, tokens, mask)
        seen["run"] = changed()
        with megatron.cache_quantizers():
            megatron.insert_quantizers([model])
        seen["quantized"] = changed()
        directory = megatron.save_checkpoint(model, out / "checkpoint", iteration=1)
        seen["saved"] = changed()
        loaded = megatron.build_model(bridge.hf)
        megatron.load_checkpoint(loaded, directory)
        assert torch.equal(loaded.eval()(tokens, tokens, mask), first)
        seen["loaded"] = changed()
    seen["after"] = changed()
    try:
        with megatron.distributed(tp=1):
            raise InterruptedError
    except InterruptedError:
        seen["after an error"] = changed()
    (out / "patches.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
