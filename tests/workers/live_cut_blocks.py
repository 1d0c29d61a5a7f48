"""Two tensor-parallel ranks that cut blocks of NVFP4.

    torchrun --nproc-per-node 2 live_cut_blocks.py DIR

DIR has a model, plain and in NVFP4A16. report.json gets what import and export raised; "written" if nothing.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.import_hf import import_hf
from amaxbridge.bridge.live.process_ranks import world_rank
from amaxbridge.mappings.errors import MappingError


def main(directory: Path) -> None:
    with megatron.distributed(tp=2):
        quantized = AutoBridge.from_hf_pretrained(directory / "nvfp4a16")
        report = {"import": raised(import_hf, quantized.hf, directory / "checkpoint")}
        bridge = AutoBridge.from_hf_pretrained(directory / "plain")
        model = megatron.build_model(bridge.hf)
        bridge.load_hf_weights(model)
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
        report["live"] = raised(bridge.save_hf_pretrained, model, directory / "out", scheme="nvfp4a16")
        spared = {"scheme": "nvfp4a16", "ignore": ["lm_head", "re:.*down_proj"]}
        report["ignored"] = raised(bridge.save_hf_pretrained, model, directory / "out", **spared)
    if world_rank() == 0:
        (directory / "report.json").write_text(json.dumps(report))


def raised(call: Callable[..., Any], *what: Any, **options: Any) -> str:
    try:
        call(*what, **options)
    except MappingError as error:
        return str(error)
    return "written"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
