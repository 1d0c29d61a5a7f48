"""The tensors that each output file is made from, computed before anything is read, so that nothing is read twice.

Each output file corresponds to a source file and holds what its tensors become. Tensors that must be made together (the
members of a fused group, and what a converter reads for one of them) may lie in several files: all of them go to the
file of the group's primary member (q, gate), or else of the first.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from amaxbridge.mappings.fused_groups import groups_among
from amaxbridge.mappings.names import module_of

type InverseWeightMap = dict[str, list[str]]
"""Path of a source file → the tensors to read from it, for one output file."""


_WEIGHTS = (".weight", ".qweight", ".weight_packed")  # a converter turns the last two into `.weight`


class Converter(Protocol):
    """Converts a checkpoint's tensors before they are quantized: the protocol of compressed-tensors.

    Its converters (`compressed_tensors.entrypoints.convert`) dequantize FP8 blocks, AWQ and more.
    """

    def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The converted tensors; `tensors` holds everything that `get_dependencies` asked for."""

    def validate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same on the meta device: names, shapes and dtypes of what `process` will return."""

    def update_config(self, config: Any) -> Any:
        """Not called here: the output's configuration is made from what is written."""

    def get_dependencies(self, weight_name: str) -> set[str]:
        """The other tensors that are needed to convert this one."""


class WithoutInputScales:
    """A `Converter` that drops static input scales, which belong to the source's format.

    `CompressedTensorsDequantizer` refuses them, so this comes first.
    """

    _SCALES = (".input_scale", ".input_global_scale", ".input_zero_point")

    def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(self._SCALES)}

    validate = process

    def update_config(self, config: Any) -> Any:
        return config

    def get_dependencies(self, weight_name: str) -> set[str]:
        return {module_of(weight_name) + scale for scale in self._SCALES if weight_name.endswith(_WEIGHTS)}


def build_microscale_inverse_weight_maps(
    weight_map: Mapping[str, str], model_files: Mapping[str, str], converters: Sequence[Converter] = ()
) -> dict[str, InverseWeightMap]:
    """Plans what to read for each output file.

    Args:
        weight_map: tensor → source file name, from the index.
        model_files: source file name → its path; only safetensors files count.
        converters: converters whose dependencies are read, too.

    Returns:
        Output file name (one for each source file) → path → tensors. It holds every tensor once.
    """
    maps: dict[str, InverseWeightMap] = {name: {} for name in model_files if name.endswith(".safetensors")}
    for together in tensors_together(weight_map, converters):
        output = maps[weight_map[together[0]]]
        for name in together:
            output.setdefault(str(model_files[weight_map[name]]), []).append(name)
    return maps


def tensors_together(names: Iterable[str], converters: Sequence[Converter] = ()) -> list[list[str]]:
    """Sets of names that are made together, each led by the primary member's weight, in the order of `names`."""
    leader = {name: name for name in names}
    present = dict.fromkeys(leader)

    def lead_of(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    weights = {module_of(name): name for name in present if name.endswith(_WEIGHTS)}
    for converter in converters:
        for name in present:
            for needed in converter.get_dependencies(name):
                if needed in present:
                    leader[lead_of(needed)] = lead_of(name)
    for group in groups_among(weights):
        for member in group.members[1:]:
            leader[lead_of(weights[member])] = lead_of(weights[group.primary])
    together: dict[str, list[str]] = {}
    for name in present:
        together.setdefault(lead_of(name), []).append(name)
    return [[lead, *(name for name in members if name != lead)] for lead, members in together.items()]
