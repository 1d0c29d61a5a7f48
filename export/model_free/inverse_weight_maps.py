"""The tensors that each output file is made from, computed before anything is read, so that nothing is read twice.

Each output file corresponds to a source file and holds what its tensors become. Tensors that must be made together (the
members of a fused group, and what a converter reads for one of them) may lie in several files: all of them go to the
file of the group's primary member (q, gate), or else of the first.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from amaxbridge.export.model_free.converters.protocol import Converter
from amaxbridge.mappings.fused_groups import groups_among
from amaxbridge.mappings.names import module_of

type InverseWeightMap = dict[str, list[str]]
"""Path of a source file → the tensors to read from it, for one output file."""


_WEIGHTS = (".weight", ".qweight", ".weight_packed")  # a converter turns the last two into `.weight`


def build_microscale_inverse_weight_maps(
    weight_map: Mapping[str, str],
    model_files: Mapping[str, str],
    converters: Sequence[Converter] = (),
    *,
    partners: Mapping[str, Iterable[str]] = MappingProxyType({}),
) -> dict[str, InverseWeightMap]:
    """Plans what to read for each output file.

    Args:
        weight_map: tensor → source file name, from the index.
        model_files: source file name → its path; only safetensors files count.
        converters: converters whose dependencies are read, too. What belongs to one module is then read together.
        partners: tensor → others that are read with it: those of a quantized module.

    Returns:
        Output file name (one for each source file) → path → tensors. It holds every tensor once.
    """
    maps: dict[str, InverseWeightMap] = {name: {} for name in model_files if name.endswith(".safetensors")}
    for together in tensors_together(weight_map, converters, partners):
        output = maps[weight_map[together[0]]]
        for name in together:
            output.setdefault(str(model_files[weight_map[name]]), []).append(name)
    return maps


def tensors_together(
    names: Iterable[str],
    converters: Sequence[Converter] = (),
    partners: Mapping[str, Iterable[str]] = MappingProxyType({}),
) -> list[list[str]]:
    """Sets of names that are made together, each led by the primary member's weight, in the order of `names`."""
    leader = {name: name for name in names}
    present = dict.fromkeys(leader)

    def lead_of(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    weights = {module_of(name): name for name in present if name.endswith(_WEIGHTS)}
    firsts = dict[str, str]()  # some converters look for a module's tensors without naming them as dependencies
    for name in present:
        needs = [*partners.get(name, ()), *(needed for each in converters for needed in each.get_dependencies(name))]
        if converters and (module := module_of(name)):
            needs.append(firsts.setdefault(module, name))
        for needed in needs:
            if needed in present:
                leader[lead_of(needed)] = lead_of(name)
    for group in groups_among(weights):
        for member in group.members[1:]:
            leader[lead_of(weights[member])] = lead_of(weights[group.primary])
    together: dict[str, list[str]] = {}
    for name in present:
        together.setdefault(lead_of(name), []).append(name)
    return [[lead, *(name for name in members if name != lead)] for lead, members in together.items()]
