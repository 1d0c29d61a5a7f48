"""Real Megatron ranks whose weights are codes and scales, exported dequantized and as they are.

    torchrun --nproc-per-node N live_codes.py HF_DIR OUT_DIR SIZES_JSON

Each form of `tests/support/stored_codes.py` takes the place of all linear weights of the decoder, in turn.
`outcomes.json` has what was refused.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.process_ranks import world_rank
from amaxbridge.mappings.errors import AmaxbridgeError
from tests.support import stored_codes

FORMS = ("InBlocks", "MX", "InRows", "Swizzled", "OneScale", "Gradients")


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    outcomes = dict[str, str]()
    with megatron.distributed(**sizes):
        model = megatron.build_model(bridge.hf)
        bridge.load_hf_weights(model)
        weights = linear_weights(model)
        for form in FORMS:
            for module, name, weight in weights:
                module.register_parameter(name, torch.nn.Parameter(getattr(stored_codes, form).of(weight)))
            bridge.save_hf_pretrained(model, out / form / "plain", scheme="none")
            outcomes[form] = attempt(bridge, model, out / form / "auto")
        for module, name, weight in weights:
            module.register_parameter(name, torch.nn.Parameter(stored_codes.InBlocks.of(weight)))
        outcomes["ignored"] = attempt(bridge, model, out / "ignored", ignore=["re:.*self_attn.*"])
        outcomes["again"] = attempt(bridge, model, out / "again", scheme="fp8_block")
        outcomes["state"] = attempt(bridge, model, out / "state", quant_state=True)
        refit = dict(bridge.export_hf_weights(model, scheme="auto")) if not outcomes["InBlocks"] else {}
        torch.save(refit, out / f"refit_{world_rank()}.pt")
        for module, name, weight in weights:  # import overwrites
            module.register_parameter(name, torch.nn.Parameter(stored_codes.InBlocks.of(torch.ones_like(weight))))
        bridge.load_hf_weights(model)
        bridge.save_hf_pretrained(model, out / "imported", scheme="none")
    if world_rank() == 0:
        (out / "outcomes.json").write_text(json.dumps(outcomes))


def linear_weights(model: Any) -> list[tuple[Any, str, Any]]:
    return [
        (module, "weight", module.weight.detach().clone())
        for name, module in model.decoder.named_modules()
        if ".linear_" in name and getattr(module, "weight", None) is not None and module.weight.ndim == 2
    ]


def attempt(bridge: AutoBridge, model: Any, out: Path, **options: Any) -> str:
    """Runs an export; returns the message of its refusal, or nothing."""
    try:
        bridge.save_hf_pretrained(model, out, **{"scheme": "auto", **options})
    except AmaxbridgeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
