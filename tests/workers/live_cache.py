"""Real Megatron ranks whose key-value caches ModelOpt quantized, in every format that engines read, live and stored.

    torchrun --nproc-per-node N live_cache.py HF_DIR OUT_DIR SIZES_JSON

For each case: the live export OUT_DIR/CASE, that of its checkpoint CASE_stored, and what an import of the first exports
again CASE_again; or what was raised, in RANK.json, with the amax of this rank's quantizers.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import modelopt.torch.quantization as mtq  # noqa: E402
import torch  # noqa: E402
from modelopt.torch.export.quant_utils import get_kv_cache_scaling_factor  # noqa: E402

from amaxbridge.bridge import AutoBridge, megatron  # noqa: E402
from amaxbridge.bridge.hf import read_hf_model  # noqa: E402
from amaxbridge.bridge.import_hf import import_hf  # noqa: E402
from amaxbridge.bridge.live.process_ranks import world_rank  # noqa: E402
from amaxbridge.mappings.errors import AmaxbridgeError  # noqa: E402
from tests.workers.model import forward  # noqa: E402

FP8 = {"num_bits": (4, 3), "axis": None}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "per_tensor": (FP8, "compressed-tensors"),
    "per_head": ({"num_bits": (4, 3), "axis": 2}, "compressed-tensors"),
    "nvfp4": (mtq.NVFP4_KV_CFG["quant_cfg"][0]["cfg"], "modelopt"),
    "nvfp4_cast": ({**mtq.NVFP4_KV_CFG["quant_cfg"][0]["cfg"], "use_constant_amax": True}, "modelopt"),
}
"""Settings of the quantizers of keys and values, and the format of the files."""


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    with megatron.distributed(**sizes):
        for case, (cache, files) in CASES.items():
            model = calibrated(bridge, cache)
            report[case] = {"scales": dict(scales(model))}
            checkpoint = out / f"{case}_checkpoint"
            said = report[case]["live"] = raised(bridge.save_hf_pretrained, model, out / case, files)
            megatron.save_checkpoint(model, checkpoint, iteration=1)
            if world_rank() == 0:
                report[case]["stored"] = raised(bridge.convert_checkpoint, checkpoint, out / f"{case}_stored", files)
            if said == "written":
                import_hf(read_hf_model(out / case), out / f"{case}_imported")
                if world_rank() == 0:
                    again = AutoBridge.from_hf_pretrained(out / case)
                    raised(again.convert_checkpoint, out / f"{case}_imported", out / f"{case}_again", files)
    (out / f"{world_rank()}.json").write_text(json.dumps(report))


def calibrated(bridge: AutoBridge, cache: dict[str, Any]) -> Any:
    model = megatron.build_model(bridge.hf)
    bridge.load_hf_weights(model)
    quantizers = [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": dict(cache)}]
    config = {**mtq.FP8_DEFAULT_CFG, "quant_cfg": [*mtq.FP8_DEFAULT_CFG["quant_cfg"], *quantizers]}
    with megatron.cache_quantizers():
        mtq.quantize(model, config, forward)
    for layer in model.decoder.layers:
        attention = layer.self_attention.core_attention
        for quantizer in (attention.k_bmm_quantizer, attention.v_bmm_quantizer):
            if quantizer.axis == 2:
                quantizer._amax.mul_(
                    1 + world_rank() / 8
                )  # as learned: ModelOpt's calibration makes the heads of ranks alike
    return model.bfloat16()


def scales(model: Any) -> Any:
    """What ModelOpt's exporter makes of the quantizers; the amax itself where it has no place for them."""
    for layer in model.decoder.layers:
        attention = layer.self_attention.core_attention
        for letter, scale in zip("kv", get_kv_cache_scaling_factor(attention, clamp_fp8_scales=False), strict=True):
            if scale is not None:
                yield f"model.layers.{layer.layer_number - 1}.{letter}", scale.float().flatten().tolist()


def raised(export: Any, what: Any, target: Path, files: str) -> str:
    try:
        export(what, target, scheme="auto", format=files)
    except AmaxbridgeError as error:
        return f"{type(error).__name__}: {error}"
    return "written"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
