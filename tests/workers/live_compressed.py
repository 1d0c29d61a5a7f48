"""Real Megatron ranks whose weights `mtq.compress` packed: exported live and from the checkpoint.

    torchrun --nproc-per-node N live_compressed.py HF_DIR OUT_DIR SIZES_JSON

For each case: OUT_DIR/CASE live, CASE_stored, and CASE_plain and CASE_plain_stored with scheme=none. RANK.json has what
was raised; CASE_RANK.pt the codes and scales of this rank's first down projection, and what ModelOpt computes with.
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

from amaxbridge.bridge import AutoBridge, megatron  # noqa: E402
from amaxbridge.bridge.live.process_ranks import world_rank  # noqa: E402
from amaxbridge.mappings.errors import AmaxbridgeError  # noqa: E402
from tests.workers.model import forward  # noqa: E402


def int4(width: int) -> dict[str, Any]:
    config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    for entry in config["quant_cfg"]:
        if (entry.get("cfg") or {}).get("block_sizes"):
            entry["cfg"]["block_sizes"][-1] = width
    return config


CASES: dict[str, Any] = {
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8_dynamic": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "int4": int4(32),
    "int4_over_rows": int4(64),
    "int8": mtq.INT8_WEIGHT_ONLY_CFG,
}


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, dict[str, str]] = {}
    with megatron.distributed(**sizes):
        for case, preset in CASES.items():
            model = megatron.build_model(bridge.hf)
            bridge.load_hf_weights(model)
            mtq.quantize(model, copy.deepcopy(preset), forward)
            model.bfloat16()
            mtq.compress(model)
            linear = model.decoder.layers[0].mlp.linear_fc2
            quantizer = linear.weight_quantizer
            torch.save(
                {
                    "codes": linear.weight.data,
                    "scale": quantizer._scale,
                    "plain": quantizer(linear.weight.get_qtensor()).bfloat16(),
                },
                out / f"{case}_{world_rank()}.pt",
            )
            report[case] = {
                kind: raised(bridge.save_hf_pretrained, model, out / f"{case}{suffix}", scheme)
                for kind, suffix, scheme in (("live", "", "auto"), ("plain", "_plain", "none"))
            }
            checkpoint = out / f"{case}_checkpoint"
            megatron.save_checkpoint(model, checkpoint, iteration=1)
            if world_rank() == 0:
                report[case] |= {
                    kind: raised(bridge.convert_checkpoint, checkpoint, out / f"{case}{suffix}", scheme)
                    for kind, suffix, scheme in (
                        ("stored", "_stored", "auto"),
                        ("plain_stored", "_plain_stored", "none"),
                    )
                }
    (out / f"{world_rank()}.json").write_text(json.dumps(report))


def raised(export: Any, what: Any, target: Path, scheme: str) -> str:
    try:
        export(what, target, scheme=scheme)
    except AmaxbridgeError as error:
        return f"{type(error).__name__}: {error}"
    return "written"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
