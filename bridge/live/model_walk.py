"""Walking a live Megatron model: every parameter, buffer and quantizer under its global name.

A rank's own names are local: layers count from the start of the pipeline (or virtual pipeline) stage, experts from
the start of the expert-parallel block. Megatron writes the global numbers on its modules, `layer_number` on a layer
and `local_expert_indices` on a mixture-of-experts layer, so they are read there instead of being computed again.

Nothing here imports Megatron or ModelOpt: modules are recognized by these attributes.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from amaxbridge.mappings.canonical import canonical
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.hybrid_layers import once
from amaxbridge.mappings.names import is_quantizer_state, is_routed_expert, module_of

ABSENT = object()
"""The value of a quantizer's buffer that ModelOpt had, but did not save."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_USUALLY_EMPTY = ("_modules", "_forward_hooks", "_forward_pre_hooks")
_NUMBERS = re.compile(r"(?<=_quantizer)(\.\[?\d+\]?)+$")
_GROUPED_EXPERT = re.compile(r"(.*\.experts\.linear_fc[12]\.(?:to_wrap\.)?(?:weight|bias|\w+_quantizer\.))(\d+)")
_OF_GROUPED_EXPERTS = re.compile(r".*\.experts\.linear_fc[12]\.adapter\.(?:linear_(?:in|out)\.weight|weight_magnitude)")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or persistent buffer of this rank: its global name in canonical spelling, and its shard."""

    name: str
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A ModelOpt TensorQuantizer of this rank.

    Args:
        name: global name, in canonical spelling.
        module: the quantizer itself.
        rows: output rows of the weight shard beside it, None without a weight.
        experts: global numbers of this rank's experts in the same layer, empty outside experts.
        attributes: everything that ModelOpt keeps on it: settings, buffers and parameters, by name.
        kind: name of its class, "" if a checkpoint does not tell.
    """

    name: str
    module: Any
    rows: int | None
    experts: tuple[int, ...]
    attributes: Mapping[str, Any]
    kind: str = ""

    @property
    def chain(self) -> str:
        """The name of the chain that it is a stage of (W4A8); "" if it is none.

        A grouped expert's quantizer is named like a stage.
        """
        found = _NUMBERS.search(self.name)
        is_stage = found is not None and (
            found[0].count(".") > 1 or "[" in self.name or not is_routed_expert(self.name)
        )
        return self.name.rpartition(".")[0] if is_stage else ""

    @property
    def multiplies_input(self) -> bool:
        """True if it multiplies inputs by a vector before anything else, as it does even while disabled."""
        given = self.attributes
        return given.get("_pre_quant_scale") is not None and bool(given.get("_enable_pre_quant_scale", True))


def unwrap(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The bare model chunks of this rank, without DDP or mixed-precision wrappers."""
    chunks = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
    return [_unwrap_one(chunk) for chunk in chunks]


def _unwrap_one(chunk: Any) -> nn.Module:
    while isinstance(getattr(chunk, "module", None), nn.Module):
        chunk = chunk.module
    if not isinstance(chunk, nn.Module):
        raise UsageError(f"give the model, or the list of its chunks, on every rank; not a {type(chunk).__name__}")
    return chunk


def layer_pattern(chunks: Sequence[nn.Module]) -> str | None:
    """The `hybrid_layer_pattern` of a HybridModel, None of a GPTModel. A repeated MTP layer is in it once."""
    pattern: str | None = getattr(chunks[0], "hybrid_layer_pattern", None)
    repeats = getattr(getattr(chunks[0], "config", None), "mtp_use_repeated_layer", False)
    return once(pattern) if pattern is not None and repeats else pattern


def walk_parameters(chunks: Sequence[nn.Module], spelling: Callable[[str], str] = canonical) -> Iterator[Parameter]:
    """All parameters and persistent buffers of this rank except quantizer buffers.

    Args:
        spelling: global Megatron name → the mappings' name; see `ModelFamily.spelling`.
    """
    for chunk in chunks:
        names = _GlobalNames(chunk)
        quantizers = {name for name, module in names.modules.items() if _is_quantizer(name, module)}
        for local_name, tensor in _persistent_tensors(chunk).items():
            if module_of(local_name) not in quantizers:
                yield from one_by_one(spelling(names.of(local_name)), tensor, names.local_experts(local_name))


def walk_names(chunk: nn.Module) -> Iterator[tuple[str, str]]:
    """The local and the global name of each parameter of a chunk, the global one as Megatron spells it."""
    names = _GlobalNames(chunk)
    return ((local_name, names.of(local_name)) for local_name, _ in chunk.named_parameters())


def walk_quantizers(chunks: Sequence[nn.Module], spelling: Callable[[str], str] = canonical) -> Iterator[Quantizer]:
    """All enabled quantizers of this rank. A container of quantizers (one for each grouped expert) does not count."""
    return (each for each in walk_all_quantizers(chunks, spelling) if each.module.is_enabled)


def walk_all_quantizers(chunks: Sequence[nn.Module], spelling: Callable[[str], str] = canonical) -> Iterator[Quantizer]:
    """As `walk_quantizers`, including disabled quantizers."""
    for chunk in chunks:
        names = _GlobalNames(chunk)
        for local_name, module in chunk.named_modules():
            if _is_quantizer(local_name, module):
                owner = names.modules[local_name.partition("_quantizer")[0].rpartition(".")[0]]
                weight = getattr(owner, "weight", getattr(owner, "weight0", None))
                yield Quantizer(
                    spelling(names.of(local_name)),
                    module,
                    None if weight is None else weight.shape[0],
                    names.local_experts(local_name),
                    {**_of_container(names.modules[module_of(local_name)]), **_attributes(module)},
                    type(module).__name__,
                )


def _is_quantizer(name: str, module: nn.Module) -> bool:
    """True for one quantizer, False for what holds several. Other modules may have such names, and weights."""
    several = isinstance(module, (nn.ModuleList, nn.Sequential))
    return is_quantizer_state(name) and hasattr(module, "is_enabled") and not several


def _of_container(module: nn.Module) -> dict[str, Any]:
    """What holds several quantizers should have no attributes of its own; those that it has, in each quantizer's."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not hasattr(module, "is_enabled"):
        return {}
    return {f"{type(module).__name__}.{name}": each for name, each in _attributes(module).items() if name != "_modules"}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has beyond every module: its own attributes, tensors, and hooks and modules inside it, if any."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    own |= {name: vars(module)[name] for name in _USUALLY_EMPTY if vars(module)[name]}
    return own | {name: tensor for name, tensor in (module._parameters | module._buffers).items() if tensor is not None}


def one_by_one(name: str, tensor: Tensor, experts: Sequence[int]) -> Iterator[Parameter]:
    """Yields the parameter, or for legacy grouped experts a view of each expert, `[out, in]` as everywhere else.

    An adapter of grouped experts is one for each, `[experts, …]`, or one that all of the rank share.
    Megatron's GroupedMLP kept the local experts of a layer in two parameters, read as `[experts, hidden, 2 · ffn]` and
    `[experts, ffn, hidden]`: inputs first.
    """
    layer, legacy, linear = name.rpartition(".experts.weight")
    if _OF_GROUPED_EXPERTS.fullmatch(name):
        for index, expert in enumerate(experts):
            yield Parameter(f"{name}{expert}", tensor[index] if tensor.ndim == 3 else tensor)
    elif legacy and linear in ("1", "2"):
        hidden = tensor.shape[0] if linear == "1" else tensor.shape[1]
        inputs = hidden if linear == "1" else tensor.shape[0] // len(experts)
        for expert, weight in zip(experts, tensor.view(len(experts), inputs, -1), strict=True):
            yield Parameter(f"{layer}.experts.linear_fc{linear}.weight{expert}", weight.t())
    else:
        yield Parameter(name, tensor)


def _persistent_tensors(chunk: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(chunk.named_parameters())
    for prefix, module in chunk.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}".lstrip(".")] = buffer
    return tensors


class _GlobalNames:
    """Local → global names of one model chunk."""

    def __init__(self, chunk: nn.Module) -> None:
        self.modules: Mapping[str, nn.Module] = dict(chunk.named_modules())

    def of(self, local_name: str) -> str:
        path: list[str] = []
        parts = local_name.split(".")
        for index, part in enumerate(parts):
            parent = parts[index - 1] if index else ""
            if part.isdigit() and parent == "layers":
                layer = self.modules[".".join(parts[: index + 1])]
                part = str(int(getattr(layer, "layer_number", int(part) + 1)) - 1)
            elif part.isdigit() and parent == "local_experts":
                part = str(self.local_experts(local_name)[int(part)])
            elif part.isdigit() and isinstance(self.modules.get(".".join(parts[:index])), nn.Sequential):
                part = f"[{part}]"  # a stage of sequential quantizers (W4A8), which must not look like an expert
            path.append(part)
        name = ".".join(path)
        grouped = _GROUPED_EXPERT.fullmatch(name)
        if grouped:
            return f"{grouped[1]}{self.local_experts(local_name)[int(grouped[2])]}"
        return name

    def local_experts(self, local_name: str) -> tuple[int, ...]:
        """Global numbers of the local experts in the layer of this name; Megatron keeps them on the layer."""
        layer = self.modules.get(local_name.partition(".experts.")[0])
        return tuple(getattr(layer, "local_expert_indices", ()))
