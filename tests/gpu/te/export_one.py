"""One rank of a case: its checkpoint is loaded into a new model, which is exported from memory.

    python3 export_one.py OUT CASE        or under torchrun, where the case has several ranks

The tensors must be those of the live export when the checkpoint was made. Parameters in blocks of 128×128 are exported
once more as they are: codes and scales must be Transformer Engine's own, or, where a tensor of Hugging Face has none
such, the export must be refused. Status 1 where something differs.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CASES
from make_one import describe, differing
from models import build
from safetensors.torch import load_file

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.process_ranks import world_rank
from amaxbridge.mappings.errors import AmaxbridgeError


def main(out: Path, name: str) -> None:
    case, directory = CASES[name], out / name
    expected = json.loads((directory / "expected.json").read_text())
    with megatron.distributed(tp=case.tp, ep=case.ep):
        bridge = AutoBridge.from_hf_pretrained(directory)
        model = build(bridge.hf, case)
        megatron.load_checkpoint(model, directory / "checkpoint")
        bridge.save_hf_pretrained(model, out / f"{name}.again", scheme=expected["scheme"], overwrite=True)
        wrong = {"again": differing(out / f"{name}.again", expected["tensors"])}
        if case.fp8_parameters:
            wrong["as they are"] = export_as_they_are(bridge, model, out / f"{name}.as_they_are", expected)
        if world_rank() == 0:
            print("; ".join(f"{export}: {len(names)} tensors wrong {names[:3]}" for export, names in wrong.items()))
    sys.exit(any(wrong.values()))


def export_as_they_are(bridge: AutoBridge, model: Any, output: Path, expected: dict[str, Any]) -> list[str]:
    """Names of tensors that are wrong; a refusal is right where there are no blocks, or none of Hugging Face's."""
    possible = bool(expected["codes"]) and None not in expected["scales"].values()
    try:
        bridge.save_hf_pretrained(model, output, scheme="auto", overwrite=True)
    except AmaxbridgeError as error:
        print(error)
        return ["all refused"] if possible else []
    return list(not_as_they_are(output, expected)) if possible else ["none refused"]


def not_as_they_are(directory: Path, expected: dict[str, Any]) -> Iterator[str]:
    """Names of tensors in blocks that are not Transformer Engine's own, and of others that are not the model's."""
    (path,) = directory.glob("*.safetensors")
    found = load_file(path)
    rest = {name: text for name, text in expected["tensors"].items() if name not in expected["codes"]}
    for name, codes in expected["codes"].items():
        if describe(found[name].view(torch.uint8)) != codes:
            yield name
        if found[f"{name}_scale"].float().tolist() != expected["scales"][name]:
            yield f"{name}_scale"
    in_blocks = expected["codes"].keys() | {f"{name}_scale" for name in expected["codes"]}
    others = {name: describe(tensor) for name, tensor in found.items() if name not in in_blocks}
    yield from (name for name in rest.keys() | others.keys() if others.get(name) != rest.get(name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
