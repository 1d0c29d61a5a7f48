"""Real Megatron ranks whose modules have several formats: what AutoQuantize chooses, and experts with one each.

    torchrun --nproc-per-node N live_mixed.py HF_DIR OUT_DIR SIZES_JSON

`searched` is the live export, `searched_checkpoint` the checkpoint, and searched.safetensors the logits of the
quantized model and, at TP=1, the fake-quantized weight of each Hugging Face weight. report.json has the format that
AutoQuantize chose for each Megatron module. With experts: also `experts` (mixed_groups=unquantized), its checkpoint,
and the refusal without it.
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
from safetensors.torch import save_file  # noqa: E402

from amaxbridge.bridge import AutoBridge, megatron  # noqa: E402
from amaxbridge.bridge.live.model_walk import walk_quantizers  # noqa: E402
from amaxbridge.mappings.errors import MappingError  # noqa: E402
from tests.workers.live_awq import oracle  # noqa: E402
from tests.workers.model import SEQUENCE, TOKENS, forward  # noqa: E402

DENSE_BITS, EXPERTS_BITS = 9.0, 5.4
"""Effective bits of a weight at which AutoQuantize chooses every format somewhere in the tiny models."""
LEFT = ["*output_layer*", "*layers.1.self_attention.linear_proj*"]


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    alone = sizes.get("tp", 1) == 1
    with megatron.distributed(**sizes):
        model, chosen = searched(bridge)
        bridge.save_hf_pretrained(model, out / "searched", scheme="auto")
        megatron.save_checkpoint(model, out / "searched_checkpoint", iteration=1)
        weights = oracle(bridge, model) if alone else {}
        mtq.fold_weight(model)  # the fake-quantized weights rounded to bf16, as a bf16 model uses them
        save_file({**weights, "logits": forward(model).contiguous()}, out / "searched.safetensors")
        report = {"chosen": chosen}
        if bridge.hf.model_config.num_moe_experts:
            report["refused"] = with_mixed_experts(bridge, out)
        (out / "report.json").write_text(json.dumps(report))


def searched(bridge: AutoBridge) -> tuple[Any, dict[str, str]]:
    model = megatron.build_model(bridge.hf)
    bridge.load_hf_weights(model)
    _, state = mtq.auto_quantize(
        model.float(),
        constraints={"effective_bits": EXPERTS_BITS if bridge.hf.model_config.num_moe_experts else DENSE_BITS},
        quantization_formats=[mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG],
        data_loader=[TOKENS],
        forward_step=step,
        loss_func=lambda logits, _: logits.float().square().mean(),
        num_calib_steps=1,
        num_score_steps=1,
        disabled_layers=LEFT,
    )
    return model.bfloat16(), {name: str(each) for name, each in state["best"]["recipe"].items()}


def step(model: Any, tokens: torch.Tensor) -> Any:
    positions = torch.arange(SEQUENCE)[None].expand(len(tokens), -1)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    return model(tokens, positions, mask, runtime_gather_output=True)


def with_mixed_experts(bridge: AutoBridge, out: Path) -> str:
    """Calibrates the second expert of a layer in FP8, and everything else in NVFP4. Returns the refusal."""
    model = megatron.build_model(bridge.hf)
    bridge.load_hf_weights(model)
    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    for kind in ("weight", "input"):
        name = f"*layers.1.*local_experts.1.*{kind}_quantizer"
        config["quant_cfg"].append({"quantizer_name": name, "cfg": {"num_bits": (4, 3), "axis": None}})
    mtq.quantize(model, config, forward)
    model.bfloat16()
    assert len({each.module.num_bits for each in walk_quantizers([model])}) == 2
    bridge.save_hf_pretrained(model, out / "experts", scheme="auto", mixed_groups="unquantized")
    megatron.save_checkpoint(model, out / "experts_checkpoint", iteration=1)
    try:
        bridge.save_hf_pretrained(model, out / "refused", scheme="auto")
    except MappingError as error:
        return str(error)
    return "written"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
