"""Real Megatron ranks that export in ModelOpt's format, and at TP=1 ModelOpt's own exporter on the same model.

    torchrun --nproc-per-node N live_modelopt.py HF_DIR OUT_DIR SIZES_JSON

For each case: ours in OUT_DIR/CASE, the same in compressed-tensors in CASE_compressed, and on one rank ModelOpt's in
CASE_modelopt, where its exporter writes the case. Then, on one rank, the way back: what an import of ours exports
again, CASE_again. Every topology of an MoE model writes NAMED, with amax made from the quantizers' global names; those
of several ranks, where ModelOpt does not calibrate as on one, write it alone.
"""

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import modelopt.torch.quantization as mtq  # noqa: E402
import torch  # noqa: E402
from modelopt.torch.export import export_mcore_gpt_to_hf  # noqa: E402

from amaxbridge.bridge import AutoBridge, megatron  # noqa: E402
from amaxbridge.bridge.hf import read_hf_model  # noqa: E402
from amaxbridge.bridge.import_hf import import_hf  # noqa: E402
from tests.workers.live_moe import insert_quantizers, set_amax_from_names  # noqa: E402
from tests.workers.model import forward  # noqa: E402

CASES: dict[str, Any] = {
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "nvfp4a16": mtq.W4A16_NVFP4_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
}
DENSE_ONLY: dict[str, Any] = {  # no engine serves the first for experts
    "fp8_dynamic": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
}
NAMED = "named"
CACHE = "fp8"  # the case with a quantized key-value cache


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    moe = any("experts" in key for key in bridge.hf.written)
    calibrates = sizes == {"tp": 1} or not moe
    with megatron.distributed(**sizes):
        for case, preset in {**CASES, **({} if moe else DENSE_ONLY)}.items() if calibrates else ():
            model = calibrated(bridge, case, preset)
            bridge.save_hf_pretrained(model, out / case, scheme="auto", format="modelopt")
            bridge.save_hf_pretrained(model, out / f"{case}_compressed", scheme="auto")
            if sizes == {"tp": 1}:
                on_one_rank(model, hf, out, case)
        if moe:
            chunks = megatron.build_chunks(bridge.hf)
            bridge.load_hf_weights(chunks)
            for chunk in chunks:
                insert_quantizers(chunk)
            set_amax_from_names(chunks)
            bridge.save_hf_pretrained(chunks, out / NAMED, scheme="auto", format="modelopt")


def on_one_rank(model: Any, hf: Path, out: Path, case: str) -> None:
    """ModelOpt's own export, but for cases of which it raises or writes no config; and the way back of ours."""
    if case in CASES:
        export_mcore_gpt_to_hf(model, hf, dtype=torch.bfloat16, export_dir=str(out / f"{case}_modelopt"))
    import_hf(read_hf_model(out / case), out / f"{case}_imported")
    again = AutoBridge.from_hf_pretrained(out / case)
    again.convert_checkpoint(out / f"{case}_imported", out / f"{case}_again", scheme="auto", format="modelopt")


def calibrated(bridge: AutoBridge, case: str, preset: Any) -> Any:
    model = megatron.build_model(bridge.hf)
    bridge.load_hf_weights(model)
    config = copy.deepcopy(preset)
    if case == CACHE:
        config["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]
    with megatron.cache_quantizers():
        mtq.quantize(model, config, forward)
    return model.bfloat16()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
