"""Which scheme each module gets, what speaks against it, and the names under which config.json lists those without one.

Against it speak shapes, fused groups with several formats, and quantizers that would be lost.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from amaxbridge.export.amax.cache_scales import CACHE_QUANTIZERS
from amaxbridge.export.amax.fused_group_amax import MixedGroups, mixed_groups
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.architectures.engines import renamed_by_engines
from amaxbridge.export.architectures.facts import Architecture, Knowledge
from amaxbridge.export.schemes import Scheme
from amaxbridge.export.schemes.recipe import reads_inputs_as
from amaxbridge.export.schemes.targets import is_pattern, is_targeted
from amaxbridge.mappings.amax import GLOBAL_AMAX, LEARNED_POST, LEARNED_PRE, STORED_SCALES, WEIGHT_QUANTIZER
from amaxbridge.mappings.errors import MappingError, UsageError, listing
from amaxbridge.mappings.names import is_routed_expert, kind_of, module_of, natural_key
from amaxbridge.mappings.tensors import TensorSpec


class NothingToQuantizeError(UsageError):
    """A recipe targets no linear module: of a whole model a mistake, of one file no surprise."""


_TAKE_AUTO = "Take the scheme that it was trained for, or scheme=auto, which reads it from the quantizers"


def check_one_format(name: str, kept: Mapping[str, Scheme]) -> None:
    """Refuses modules that are kept in another format than that of the files."""
    others = [f"{module}: {scheme.name}" for module, scheme in kept.items() if scheme.file_format != name]
    if others:
        raise UsageError(
            f"format={name}: {len(others)} modules come quantized in another format:{listing(others)}\n"
            "Write the files in the format of these modules, or have the converter dequantize them"
        )


def unquantized_kinds(specs: Mapping[str, TensorSpec], quantized: Collection[str]) -> dict[str, int]:
    """The matrices of an output that are in 16 or 32 bits: name without numbers → how many, in natural order.

    Args:
        specs: the tensors that the files hold.
        quantized: the quantized modules.
    """
    found: dict[str, int] = {}
    for name in sorted(specs, key=natural_key):
        module, _, ending = name.rpartition(".")
        is_packed = len(specs[name].shape) == 3 and ".experts." in name
        if ((ending == "weight" and len(specs[name].shape) == 2) or is_packed) and module not in quantized:
            kind = kind_of(module if ending == "weight" else name)
            found[kind] = found.get(kind, 0) + 1
    return found


def check_can_be_quantized(modules: Iterable[str], specs: Mapping[str, TensorSpec], knowledge: Knowledge) -> None:
    """Refuses what shapes and names alone tell to be in vain.

    Raises:
        UsageError: embeddings, which engines look up and never multiply.
        MappingError: weights without rows or columns.
    """
    modules = list(modules)
    if embeddings := list(filter(knowledge.is_embedding, modules)):
        raise UsageError(
            f"{len(embeddings)} targets are embeddings, which no engine reads quantized:{listing(embeddings)}\n"
            "Leave them out of the targets"
        )
    shapes = {module: specs[f"{module}.weight"] for module in modules if f"{module}.weight" in specs}
    if empty := [f"{module}: {spec}" for module, spec in shapes.items() if 0 in spec.shape]:
        raise MappingError(f"{len(empty)} weights to be quantized are empty:{listing(empty)}\nName them in ignore")


def check_blocks_are_whole(schemes: Mapping[str, Scheme], specs: Mapping[str, TensorSpec]) -> None:
    """Refuses amax of more or fewer blocks than the weight has: ranks cut through a block, and each has its own part.

    Args:
        schemes: module to quantize → its scheme.
        specs: every tensor, the amax of blocks among them.

    Raises:
        MappingError: there are such modules; all are named.
    """
    cut = [
        f"{module}: weight {specs[f'{module}.weight']}, amax {specs[module + state]} for blocks of {scheme.name}"
        for module, scheme in schemes.items()
        for state in (WEIGHT_QUANTIZER, LEARNED_POST, LEARNED_PRE)
        if module + state in specs
        if math.prod(specs[module + state].shape) != math.prod(scheme.blocks.shape(*specs[f"{module}.weight"].shape))
    ]
    if cut:
        raise MappingError(
            f"{len(cut)} weights have other blocks than their amax:{listing(cut)}\n"
            "Tensor parallelism cuts through blocks: calibrate at a size that divides them, or in smaller blocks; or "
            "name these modules in ignore"
        )


@dataclass(frozen=True, slots=True)
class Ignored:
    """The modules that are written unquantized although they have quantizers.

    Args:
        targets: what the recipe ignores.
        modules: members of fused groups with several formats, if they are to be unquantized.
    """

    targets: tuple[str, ...]
    modules: frozenset[str]

    def holds(self, module: str) -> bool:
        """True if the module is one of them."""
        return module in self.modules or is_targeted(module, self.targets)


def unified_modules(
    treated: Mapping[str, Scheme | None], state: QuantState | None, kept: Mapping[str, Scheme], policy: MixedGroups
) -> list[str]:
    """The members of fused groups with several formats, which are all written unquantized.

    Raises:
        MappingError: there are such groups, and the policy does not say so, or files hold a member quantized already.
    """
    calibrations = {} if state is None else state.formats
    found = mixed_groups(
        {
            module: f"as {scheme.name}{_after(scheme.format, calibrations.get(module, ''))}" if scheme else "not"
            for module, scheme in {**treated, **kept}.items()
        }
    )
    refused = [each for each in found if policy is MixedGroups.ERROR or not kept.keys().isdisjoint(each.treatment)]
    if refused:
        raise MappingError(
            f"fused groups must be quantized as one:{listing(refused)}\n"
            "Target or ignore all of their members, or give mixed_groups=unquantized to write these groups in 16 bits"
        )
    return [module for each in found for module in each.treatment]


def choose_schemes(
    name: str,
    treated: Mapping[str, Scheme | None],
    state: QuantState | None,
    kept: Mapping[str, Scheme],
    ignored: Ignored,
) -> dict[str, Scheme]:
    """The scheme of each module to quantize, checked against the quantizers.

    Args:
        name: name of the recipe.
        treated: linear module → the scheme that the recipe gives it.
    """
    chosen = {module: scheme for module, scheme in treated.items() if scheme is not None}
    if not chosen and not kept:
        raise NothingToQuantizeError(
            f"scheme={name} finds no module with quantizers: all are ignored, or none is targeted"
            if state is not None
            else f"scheme={name} finds no linear module to quantize: all are ignored, or none is targeted"
        )
    if state is None:
        static = [module for module, scheme in chosen.items() if scheme.needs_input_amax]
        if static:
            raise UsageError(
                f"scheme={name} needs calibrated inputs, for {len(static)} modules:{listing(static)}\n"
                "Give quant_state= of a trained model, or choose a scheme without static inputs: nvfp4a16, fp8_dynamic"
            )
        return chosen
    left = [
        module
        for module, scheme in treated.items()
        if scheme is None and module in state.formats and not ignored.holds(module)
    ]
    if left:
        raise UsageError(
            f"{len(left)} modules have quantizers, and scheme={name} does not target them:{listing(left)}\n"
            "Target them, or ignore them"
        )
    kinds = {(id(scheme), state.formats[module]): scheme for module, scheme in chosen.items()}
    of_kind = {kind: scheme.suited(kind[1]) for kind, scheme in kinds.items()}  # one object for all alike
    suited = {module: of_kind[id(scheme), state.formats[module]] for module, scheme in chosen.items()}
    fitting = {module: scheme for module, scheme in suited.items() if scheme is not None}
    others = {module: scheme for module, scheme in chosen.items() if module not in fitting}
    if others:
        wanted = ", ".join(dict.fromkeys(scheme.format or f"no {scheme.name}" for scheme in others.values()))
        found = [f"{module}: {state.formats[module]}" for module in others]
        raise UsageError(f"scheme={name} needs {wanted} quantizers, but the model has:{listing(found)}\n{_TAKE_AUTO}")
    if state.inputs is not None:
        found = [
            f"{module}: {state.inputs.get(module, 'not quantized')}, {scheme.name} has {scheme.input_format or 'none'}"
            for module, scheme in fitting.items()
            if not reads_inputs_as(scheme, module, state)
        ]
        if found:
            raise UsageError(
                f"scheme={name} has other inputs than {len(found)} modules in training:{listing(found)}\n{_TAKE_AUTO}"
            )
    return fitting


def _after(start: str, text: str) -> str:
    """What follows `start` in a text; "" if it does not start so."""
    return text.removeprefix(start) if text.startswith(start) else ""


def check_no_format_is_lost(name: str, state: QuantState, quantized: Collection[str], ignored: Ignored) -> None:
    """Refuses quantizers of modules that are written unquantized without being ignored.

    A tied output layer has no tensor, and may have quantizers. Those of the key-value cache are of no module.
    """
    lost = [
        f"{module}: {what} {form}"
        for what, forms in (("weights", state.formats), ("inputs", state.inputs or {}))
        for module, form in forms.items()
        if module not in quantized and not module.endswith(CACHE_QUANTIZERS) and not ignored.holds(module)
    ]
    if lost:
        raise UsageError(
            f"{len(lost)} quantizers round what scheme={name} writes unquantized:{listing(lost)}\n"
            "Disable these quantizers before the export, or ignore the modules"
        )


def check_vectors_have_places(homeless: Mapping[str, str]) -> None:
    """Refuses vectors that multiply inputs of quantized modules and that nothing before can take; says why."""
    if homeless:
        rows = [f"{name}: {homeless[name]}" for name in sorted(homeless, key=natural_key)]
        raise UsageError(
            f"the input quantizers of {len(rows)} modules multiply inputs by a vector (AWQ, SmoothQuant), which no "
            f"engine does:{listing(rows)}\n"
            "Ignore these modules (ignore=re:.*o_proj and so on): they are written in 16 bits with the vector in their "
            "weights, exactly; or calibrate without AWQ and SmoothQuant"
        )


def check_no_state_is_lost(unwritten: Iterable[str]) -> None:
    """The completeness gate: quantizer state that the schemes do not write is refused, not dropped."""
    of_weights = (WEIGHT_QUANTIZER, GLOBAL_AMAX, LEARNED_POST, LEARNED_PRE, STORED_SCALES)
    lost = sorted(name for name in unwritten if not name.endswith(of_weights))
    if lost:
        raise UsageError(
            f"the scheme has no place for {len(lost)} quantizer values:{listing(lost)}\n"
            "Disable these quantizers before the export, or choose another scheme"
        )


def unquantized_modules(
    linears: Iterable[str], shapes: Mapping[str, tuple[int, ...]], knowledge: Knowledge
) -> list[str]:
    """The entries of `ignore` for what stays unquantized, in the spellings of files and of transformers' modules.

    Args:
        linears: the modules with an unquantized 2-D weight, embeddings among them.
        shapes: every tensor of the files.
    """
    ignore = [module for module in linears if not knowledge.is_embedding(module)]
    packed = (module_of(name) for name, shape in shapes.items() if knowledge.packs_experts(name, shape))
    ignore += dict.fromkeys(packed)  # as engines name the layer
    ignore += knowledge.heads_without_tensor(shapes)  # Linear to every engine, though they have no tensors
    ignore += knowledge.linears_without_suffix(shapes)
    return ignore + [name for name in knowledge.other_names(ignore) if name not in ignore]


def names_elsewhere(knowledge: Knowledge, module: str) -> list[str]:
    """What engines and transformers call a module of the files where it is not what the files call it."""
    if not isinstance(knowledge, Architecture):
        return []
    own = [] if is_routed_expert(module) else knowledge.other_names([module])
    names = dict.fromkeys(
        [*(each for each in own if not is_pattern(each)), *renamed_by_engines(knowledge.name, module)]
    )
    return list(names)
