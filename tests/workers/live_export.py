"""Real Megatron ranks that load a Hugging Face model, quantize it with ModelOpt and export it.

    torchrun --nproc-per-node N live_export.py HF_DIR OUT_DIR SIZES_JSON

Every topology exports with amax made from a hash of the quantizer's name. TP=2 does more: what only several ranks
can show, and what needs a calibration.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import TensorQuantizer

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import walk_quantizers
from amaxbridge.bridge.live.process_ranks import world_rank
from amaxbridge.bridge.stored.saved_arguments import megatron_arguments
from amaxbridge.mappings.errors import AmaxbridgeError
from tests.workers.model import TOKENS, forward


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    with megatron.distributed(**sizes):
        model = megatron.build_model(bridge.hf)
        bridge.load_hf_weights(model)
        bridge.save_hf_pretrained(model, out / "plain", scheme="none")
        plain = forward(model) if sizes["tp"] == 2 else torch.empty(0)
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG)
        set_amax_from_names(model)
        scheme = "auto" if "pp" in sizes else "nvfp4"  # the same bytes
        bridge.save_hf_pretrained(model, out / "nvfp4", scheme=scheme, max_shard_bytes=30_000)
        if sizes["tp"] == 2:
            report["divergent"] = export_divergent(bridge, model, out / "divergent")
            report["errors"] = errors(bridge, model, out)
            set_amax_from_names(model)
            arguments = megatron_arguments(bridge.hf, model.config)
            megatron.save_checkpoint(model, out / "checkpoint", iteration=12, arguments=arguments)
            calibrate_and_export(bridge, model, out, plain)
    if world_rank() == 0:
        (out / "report.json").write_text(json.dumps(report))


def set_amax_from_names(model: Any) -> None:
    """The numbers of layers are found here by other means than the bridge's, whose errors must show."""
    for layer in model.decoder.layers:
        for name, module in layer.named_modules():
            if isinstance(module, TensorQuantizer) and module.is_enabled:
                digest = hashlib.sha256(f"{layer.layer_number - 1}.{name}".encode()).digest()
                module._buffers.pop("_amax", None)  # in bf16, where different hashes would become one number
                module.amax = torch.tensor(0.25 + int.from_bytes(digest[:3], "little") / 2**24)


def quantizer_named(model: Any, name: str) -> Any:
    return next(each.module for each in walk_quantizers([model]) if each.name == name)


def export_divergent(bridge: AutoBridge, model: Any, out: Path) -> dict[str, Any]:
    """The second rank holds twice the amax of the first, as a run leaves them that never synchronized."""
    fc1 = quantizer_named(model, "decoder.layers.1.mlp.linear_fc1.input_quantizer")
    fc1.amax = torch.tensor(2.0 * (1 + world_rank()))
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("amaxbridge").addHandler(handler)
    report = bridge.save_hf_pretrained(model, out)
    logging.getLogger("amaxbridge").removeHandler(handler)
    set_amax_from_names(model)
    return {"warnings": warned, "divergent": {name: list(each) for name, each in report.state.divergent.items()}}


def errors(bridge: AutoBridge, model: Any, out: Path) -> dict[str, str]:
    """The message of each refusal; the amax is wrong on the second rank only, so all ranks must learn of it."""
    proj = quantizer_named(model, "decoder.layers.0.self_attention.linear_proj.weight_quantizer")
    good = proj.amax

    def refused(change: Callable[[], None]) -> str:
        change()
        try:
            bridge.save_hf_pretrained(model, out / "refused")
        except AmaxbridgeError as error:
            return f"{type(error).__name__}: {error}"
        return "not refused"

    def replace(value: float) -> Callable[[], None]:
        def change() -> None:
            proj.amax = torch.tensor(value if world_rank() else good.item())

        return change

    def forget() -> None:
        del proj._buffers["_amax"]

    def add_parameter() -> None:
        proj.amax = good
        model.decoder.layers[0].strange = torch.nn.Linear(4, 4, bias=False)

    found = {"nan": refused(replace(float("nan"))), "infinite": refused(replace(float("inf")))}
    proj.amax = torch.tensor(0.0)
    found["zero"] = refused(lambda: None)
    found["missing"] = refused(forget)
    found["unmapped"] = refused(add_parameter)
    del model.decoder.layers[0].strange
    return found


def calibrate_and_export(bridge: AutoBridge, model: Any, out: Path, plain: torch.Tensor) -> None:
    """A real calibration, then Megatron's own quantized forward beside the export."""
    mtq.calibrate(model, "max", forward)
    model.bfloat16()  # the new amax too: what the forward below uses must be what the export sees
    bridge.save_hf_pretrained(model, out / "calibrated")
    mtq.fold_weight(model)  # the fake-quantized weights rounded to bf16, as a bf16 model uses them
    logits = forward(model)
    if world_rank() == 0:
        torch.save({"tokens": TOKENS, "nvfp4": logits, "plain": plain}, out / "logits.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
