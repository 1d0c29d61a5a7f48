"""Real Megatron ranks that export one model in every scheme, with the logits that an engine must find.

    torchrun --nproc-per-node N live_engine.py HF_DIR OUT_DIR SIZES_JSON [logits]

For each scheme OUT_DIR/SCHEME is the checkpoint; OUT_DIR/SCHEME.safetensors has `tokens`, `logits` of Megatron's model
as training computes it, and each quantized weight dequantized by us. ModelOpt has no fake quantizer for MX
on a CPU, none that scales 128 inputs of FP8 as they come, and none with zero points. There the logits are those of a
Megatron model with the dequantized weights.

With `logits`, OUT_DIR/SCHEME.tpN.safetensors has the logits at another size of tensor parallelism, of the schemes
whose result depends on it: a token's scale is that of the part of the token that a rank holds.
"""

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from safetensors.torch import save_file
from torch import Tensor

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.process_ranks import world_rank
from amaxbridge.bridge.megatron import process_ranks
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.mappings.ranks import Axis
from tests.workers.model import TOKENS, forward

INT8_ROWS_AND_TOKENS = copy.deepcopy(mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG)
for _entry in INT8_ROWS_AND_TOKENS["quant_cfg"]:
    if "num_bits" in _entry.get("cfg", {}):
        _entry["cfg"]["num_bits"] = 8

QUANTIZERS: Mapping[str, dict[str, Any]] = {
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "nvfp4a16": mtq.W4A16_NVFP4_CFG,
    "mxfp4": mtq.MXFP4_DEFAULT_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8_dynamic": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "fp8_block": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    "w4a16": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
    "w8a8": INT8_ROWS_AND_TOKENS,
}
WEIGHTS_ONLY = ("mxfp4", "mxfp8", "fp8_block", "w4a16_asym")
MODELOPT_FORMAT = ("nvfp4", "nvfp4a16", "fp8", "fp8_dynamic", "fp8_block", "mxfp8")
SCALED_BY_TOKEN = ("fp8_dynamic", "w8a8")


def main(hf: Path, out: Path, sizes: dict[str, int], *, only_logits: bool) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    with megatron.distributed(**sizes):
        if only_logits:
            for scheme in SCALED_BY_TOKEN:
                note(out, f"{scheme}.tp{sizes['tp']}", forward(quantized(bridge, scheme)), {})
            return
        model = megatron.build_model(bridge.hf)
        bridge.load_hf_weights(model)
        bridge.save_hf_pretrained(model, out / "none", scheme="none")
        note(out, "none", forward(model), {})
        for scheme in QUANTIZERS:
            model = quantized(bridge, scheme)
            bridge.save_hf_pretrained(model, out / scheme, scheme=scheme, max_shard_bytes=500_000)
            if scheme in MODELOPT_FORMAT:
                bridge.save_hf_pretrained(
                    model, out / f"{scheme}.modelopt", scheme=scheme, format="modelopt", verify=False
                )  # which knows that engines do not serve some of these
            finish(out, scheme, hf, None if scheme in WEIGHTS_ONLY else forward(model))
        if world_rank() == 0:
            model_free_ptq(str(out / "none"), out / "w4a16_asym", "w4a16_asym", ignore=ignored(out / "w4a16"))
        finish(out, "w4a16_asym", hf, None)


def quantized(bridge: AutoBridge, scheme: str) -> Any:
    """The model with the scheme's quantizers; those that need a calibration, calibrated."""
    model = megatron.build_model(bridge.hf)
    bridge.load_hf_weights(model)
    return mtq.quantize(model, copy.deepcopy(QUANTIZERS[scheme]), None if scheme in WEIGHTS_ONLY else forward)


def ignored(checkpoint: Path) -> list[str]:
    found: list[str] = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["ignore"]
    return found


def finish(out: Path, scheme: str, hf: Path, logits: Tensor | None) -> None:
    """Notes the logits; without any, those of a model that has the weights of the checkpoint, dequantized."""
    process_ranks().all_gather_object(Axis.WORLD, None)
    weights = dequantized(out / scheme, scheme)
    if logits is None:
        plain = out / f"{scheme}_plain"
        if world_rank() == 0:
            plain.mkdir()
            with SafetensorsCheckpoint(hf) as source:
                tensors = {name: source.read(name) for name in source.weight_map}
            tensors = {name: tensor.float() for name, tensor in tensors.items()}
            assert tensors.keys() >= {f"{module}.weight" for module in weights}
            tensors |= {f"{module}.weight": weight.float() for module, weight in weights.items()}
            save_file(tensors, plain / "model.safetensors")
            (plain / "config.json").write_bytes((hf / "config.json").read_bytes())
        process_ranks().all_gather_object(Axis.WORLD, None)
        bridge = AutoBridge.from_hf_pretrained(plain)
        model = megatron.build_model(bridge.hf, dtype=torch.float32)
        bridge.load_hf_weights(model)
        logits = forward(model)
    note(out, scheme, logits, weights)


def dequantized(checkpoint: Path, scheme: str) -> dict[str, Tensor]:
    """Module → weight, in the dtype in which our own `dequantize` reads the checkpoint."""
    modules: dict[str, dict[str, Tensor]] = {}
    with SafetensorsCheckpoint(checkpoint) as opened:
        for name in opened.weight_map:
            modules.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = opened.read(name)
    quantized = {module: found for module, found in modules.items() if "weight_scale" in found}
    return {module: SCHEMES[scheme].dequantize(found) for module, found in quantized.items()}


def note(out: Path, scheme: str, logits: Tensor, weights: Mapping[str, Tensor]) -> None:
    if world_rank() == 0:
        found = {"tokens": TOKENS, "logits": logits.contiguous(), **weights}
        save_file(found, out / f"{scheme}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), only_logits=sys.argv[4:] == ["logits"])
