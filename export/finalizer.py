"""From Hugging Face weights to what is written: the last step of every export, from Megatron or from files.

A finalizer is made once, from the specs of all tensors and the quantizer state, and finds every problem then. What
follows is one call per bundle of tensors, in any order, on any rank.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from export.fused_scales import GroupAmax, MissingAmax, SharedAmax, share_amax, split_groups
from export.quant_state import QuantState
from export.schemes import Scheme
from mappings.amax import PRE_QUANT_SCALE, WEIGHT_QUANTIZER
from mappings.errors import MappingError, UsageError, listing
from mappings.fused_groups import group_of
from mappings.names import is_quantizer_state, module_of
from mappings.tensors import TensorSpec, max_of

_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte")


@dataclass(frozen=True, slots=True)
class Bundle:
    """The unit of flow: all Hugging Face tensors of one fused group of modules, born together.

    Args:
        tensors: weights, biases, norms by name.
        state: per-channel or per-block quantizer state by name (`….weight_quantizer._amax`), rows as in the weight.
    """

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Tensor]

    @classmethod
    def of(cls, mixed: Mapping[str, Tensor]) -> Self:
        """Sorts tensors that come together into weights and quantizer state."""
        state = {name: tensor for name, tensor in mixed.items() if is_quantizer_state(name)}
        return cls({name: tensor for name, tensor in mixed.items() if name not in state}, state)


class Finalizer:
    """Decides for each tensor what is written, and makes it.

    Args:
        specs: every Hugging Face tensor of the model, per-channel and per-block quantizer state included.
        scheme: the format, or None to write everything as it is.
        state: per-tensor amax and formats from training.
        missing: what to do about an amax that makes no scale.

    Raises:
        UsageError: there is nothing to quantize, or the quantizers hold what the scheme has no place for.
        MappingError: a module cannot be quantized as asked; every such module is named.
        AmaxError: an amax that is needed is missing or unusable.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        scheme: Scheme | None,
        state: QuantState,
        *,
        missing: MissingAmax = MissingAmax.ERROR,
    ) -> None:
        self._scheme = scheme
        shared = SharedAmax()
        tensors = {name: spec for name, spec in specs.items() if not is_quantizer_state(name)}
        linears = [module_of(name) for name, spec in tensors.items() if _is_linear(name, spec)]
        if scheme is not None:
            quantized = [module for module in linears if module in state.formats]
            _check_formats(scheme, {module: state.formats[module] for module in quantized})
            _check_no_state_is_lost(scheme, {*specs, *state.amax})
            mixed = split_groups(quantized, set(linears) - set(quantized))
            if mixed:
                raise MappingError(f"fused groups must be quantized whole or not at all:{listing(mixed)}")
            shared = share_amax(state, quantized, inputs=scheme.quantizes_inputs, missing=missing)
        self._amax = shared.by_module
        self.filled = shared.filled
        self.output_specs = self._plan(tensors)
        self.ignore = [module for module in linears if module not in self._amax and not module.endswith(_EMBEDDINGS)]

    @property
    def quantized(self) -> list[str]:
        """The modules that are quantized, in the order of the model."""
        return list(self._amax)

    @property
    def quantization_config(self) -> dict[str, object] | None:
        """For config.json; None where nothing is quantized."""
        return self._scheme.config(self.ignore) if self._scheme else None

    def finalize(self, bundle: Bundle) -> Iterator[tuple[str, Tensor]]:
        """What is written for a bundle, name and tensor."""
        for name, tensor in bundle.tensors.items():
            module = self._quantized_module(name)
            if module is None or self._scheme is None:
                yield name, _folded(name, tensor, bundle.state)
            else:
                weight_amax = bundle.state.get(module + WEIGHT_QUANTIZER)
                amax = self._complete(self._amax[module], module, bundle)
                yield from self._scheme.quantize(module, tensor, amax, weight_amax).items()

    def _complete(self, amax: GroupAmax, module: str, bundle: Bundle) -> GroupAmax:
        """The amax of a group with the weight's own maximum where the policy wants it; the bundle holds the group."""
        if amax.weight is not None:
            return amax
        weights = [bundle.tensors.get(f"{member}.weight") for member in group_of(module).members]
        return amax._replace(weight=max_of([weight.abs().max() for weight in weights if weight is not None]))

    def _plan(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        planned: dict[str, TensorSpec] = {}
        problems = []
        for name, spec in specs.items():
            module = self._quantized_module(name)
            if module is None or self._scheme is None:
                planned[name] = spec
                continue
            try:
                planned |= self._scheme.output_specs(module, spec)
            except ValueError as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise MappingError(f"{len(problems)} weights cannot be quantized:{listing(problems)}")
        return planned

    def _quantized_module(self, name: str) -> str | None:
        module = module_of(name)
        return module if name.endswith(".weight") and module in self._amax else None


def _is_linear(name: str, spec: TensorSpec) -> bool:
    return name.endswith(".weight") and len(spec.shape) == 2


def _folded(name: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """A weight that stays unquantized, times the scale that its input quantizer multiplied the input by."""
    scale = state.get(module_of(name) + PRE_QUANT_SCALE) if name.endswith(".weight") else None
    return tensor if scale is None else (tensor.float() * scale).to(tensor.dtype)


def _check_formats(scheme: Scheme, formats: Mapping[str, str]) -> None:
    if not formats:
        raise UsageError(
            f"scheme={scheme.name} needs quantizers, and the model has none enabled; "
            "insert them with ModelOpt before the export, or choose scheme=none"
        )
    others = [f"{module}: {found}" for module, found in formats.items() if found != scheme.format]
    if others:
        raise UsageError(f"scheme={scheme.name} needs {scheme.format} quantizers, but the model has:{listing(others)}")


def _check_no_state_is_lost(scheme: Scheme, names: Iterable[str]) -> None:
    """The completeness gate: state of other quantizers than the scheme writes is refused, not dropped."""
    written = ("weight_quantizer._amax", "weight_quantizer._global_amax", "input_quantizer._amax")
    lost = sorted(name for name in names if is_quantizer_state(name) and not name.endswith(written))
    if lost:
        raise UsageError(
            f"scheme={scheme.name} has no place for {len(lost)} quantizer values:{listing(lost)}\n"
            "Disable these quantizers before the export, or choose another scheme"
        )
