"""Real Megatron ranks with a quantized output layer, which ModelOpt's presets leave as it is.

    torchrun --nproc-per-node N live_head.py HF_DIR OUT_DIR SIZES_JSON

For each case: a live export and the checkpoint, and at TP=1 the fake-quantized weight of each Hugging Face weight; or
report.json with what the export raised.
"""

import copy
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import modelopt.torch.quantization as mtq  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from amaxbridge.bridge import AutoBridge, megatron  # noqa: E402
from amaxbridge.mappings.errors import AmaxbridgeError  # noqa: E402
from tests.workers.live_awq import oracle  # noqa: E402
from tests.workers.model import forward  # noqa: E402

FP8: Mapping[str, Any] = {"num_bits": (4, 3), "axis": None}
NVFP4: Mapping[str, Any] = {
    "num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
}  # fmt: skip
CASES: Mapping[str, tuple[Any, Mapping[str, Mapping[str, Any]]]] = {
    "fp8": (mtq.FP8_DEFAULT_CFG, {"weight": FP8, "input": FP8}),
    "nvfp4_beside_fp8": (mtq.FP8_DEFAULT_CFG, {"weight": NVFP4, "input": NVFP4}),
    "weight_only": (mtq.W4A16_NVFP4_CFG, {"weight": NVFP4}),
}
"""A preset, and the quantizers of the output layer."""


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    raised: dict[str, str] = {}
    with megatron.distributed(**sizes):
        for case, (preset, head) in CASES.items():
            model = megatron.build_model(bridge.hf)
            bridge.load_hf_weights(model)
            config = copy.deepcopy(preset)
            config["quant_cfg"] += [
                {"quantizer_name": f"*output_layer.{kind}_quantizer", "cfg": dict(each)} for kind, each in head.items()
            ]
            mtq.quantize(model, config, forward)
            model.bfloat16()
            megatron.save_checkpoint(model, out / f"checkpoint_{case}", iteration=1)
            try:
                bridge.save_hf_pretrained(model, out / case, scheme="auto")
            except AmaxbridgeError as error:
                raised[case] = str(error)
                continue
            if sizes.get("tp", 1) == 1:
                save_file(oracle(bridge, model), out / f"{case}.safetensors")
        (out / "report.json").write_text(json.dumps(raised))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
