"""A checkpoint as it would be with some edits: mends and all rules of `verify` read it as they read one on the disk."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch

from amaxbridge.export.disk.safetensors_file import SafetensorsFile, StoredTensor
from amaxbridge.export.modelopt_config import HF_QUANT_CONFIG_FILE
from amaxbridge.export.output.config_and_index import INDEX_FILE
from amaxbridge.export.repair.edits import Edits, Given, Mapped
from amaxbridge.export.verify.checkpoint_view import CheckpointView, Extent, Place, extent_of, is_number

_OPENED = ("directory", "broken", "config_problem", "index_problem", "_open_files", "_json", "expected")


class MendedView(CheckpointView):
    """The checkpoint of `opened`, with edits. Headers are not read again, and scales that stay are read once."""

    def __init__(self, opened: CheckpointView, edits: Edits) -> None:
        vars(self).update({name: vars(opened)[name] for name in _OPENED})
        self.opened, self.edits = opened, edits
        self._plans, self._made = {}, {}
        self.config = dict(opened.config if edits.config is None else edits.config)
        self.index = opened.index if edits.index is None else dict(edits.index)
        added = set() if edits.index is None else {INDEX_FILE}
        if added:
            self.index_problem = None
        kept = {file for file, tensors in self.held.items() if tensors}
        self.files = {name: file for name, file in opened.files.items() if name in kept or not file.tensors}
        gone = (opened.files.keys() - self.files.keys()) | edits.removed
        self.names = sorted({*opened.names, *added} - gone)

    def with_(self, edits: Edits) -> "MendedView":
        """The same checkpoint with more edits."""
        return MendedView(self.opened, self.edits.then(edits))

    def with_config(self, quantization: Mapping[str, Any]) -> "MendedView":
        """The same checkpoint with another `quantization_config`."""
        return self.with_(Edits(config={**self.config, "quantization_config": quantization}))

    @cached_property
    def hf_quant_config(self) -> dict[str, Any]:
        return {} if HF_QUANT_CONFIG_FILE in self.edits.removed else self.opened.hf_quant_config

    @cached_property
    def held(self) -> dict[str, dict[str, StoredTensor]]:
        """File → its tensors."""
        held: dict[str, dict[str, StoredTensor]] = {name: {} for name in self.opened.files}
        for name, place in self.opened.places:
            if (place.file, name) not in self.edits.dropped:
                replaced = self.edits.tensors.get(name)
                here = replaced is not None and replaced.file.path.name == place.file
                held[place.file][name] = replaced if replaced is not None and here else place.stored
        for name, stored in self.edits.tensors.items():
            held[stored.file.path.name].setdefault(name, stored)
        return held

    @cached_property
    def places(self) -> list[tuple[str, Place]]:
        return [(name, Place(file, stored)) for file, held in self.held.items() for name, stored in held.items()]

    @cached_property
    def numbers(self) -> dict[str, float]:
        known = {name: value for name, value in self.opened.numbers.items() if name in self.tensors}
        given = {
            name: float(stored.tensor)
            for name, stored in self.tensors.items()
            if isinstance(stored, Given) and is_number(name, stored)
        }
        return known | given

    @cached_property
    def weight_scales(self) -> dict[str, Extent]:
        return {
            module.name: self._extent(module.name, scale)
            for module in self.quantized
            if (scale := module.tensors.get("weight_scale")) is not None and scale.spec.nbytes
        }

    def _extent(self, module: str, scale: StoredTensor) -> Extent:
        stored = scale.before if isinstance(scale, Mapped) else scale
        before = self.opened.tensors.get(f"{module}.weight_scale")
        known = self.opened.weight_scales.get(module) if stored == before else None
        extent = extent_of(stored) if known is None else known
        if not isinstance(scale, Mapped):
            return extent
        ends = torch.tensor([*extent]).to(scale.spec.dtype).view(torch.uint8)  # nearest levels keep their order
        return Extent(*scale.table[ends.long()].view(scale.spec.dtype).float().tolist())

    def file_of(self, names: Iterable[str]) -> SafetensorsFile:
        """The file that holds the first of these tensors: where one more of the same module belongs."""
        return next(self.tensors[name].file for name in names if name in self.tensors)
