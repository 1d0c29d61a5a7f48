"""From Hugging Face weights to what is written: the last step of every export, from Megatron or from files.

A finalizer is made once, from the specs of all tensors and the quantizer state, and finds every problem then. What
follows is one call per bundle of tensors, in any order, on any rank.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from export.fused_scales import GroupAmax, share_amax, split_groups
from export.quant_state import QuantState
from export.schemes import Scheme
from mappings.errors import MappingError, UsageError, listing
from mappings.names import module_of
from mappings.tensors import TensorSpec

_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte")


class Finalizer:
    """Decides for each tensor what is written, and makes it.

    Args:
        specs: every Hugging Face tensor of the model.
        scheme: the format, or None to write everything as it is.
        state: amax and formats from training.

    Raises:
        UsageError: there is nothing to quantize, or the quantizers have another format than the scheme.
        MappingError: a module cannot be quantized as asked; every such module is named.
        AmaxError: an amax that is needed is missing or unusable.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], scheme: Scheme | None, state: QuantState) -> None:
        self._scheme = scheme
        self._amax: dict[str, GroupAmax] = {}
        linears = [module_of(name) for name, spec in specs.items() if name.endswith(".weight") and len(spec.shape) == 2]
        if scheme is not None:
            quantized = [module for module in linears if module in state.formats]
            _check_formats(scheme, {module: state.formats[module] for module in quantized})
            mixed = split_groups(quantized, set(linears) - set(quantized))
            if mixed:
                raise MappingError(f"fused groups must be quantized whole or not at all:{listing(mixed)}")
            self._amax = share_amax(state, quantized, inputs=scheme.quantizes_inputs)
        self.output_specs = self._plan(specs)
        self.ignore = [module for module in linears if module not in self._amax and not module.endswith(_EMBEDDINGS)]

    @property
    def quantized(self) -> list[str]:
        """The modules that are quantized, in the order of the model."""
        return list(self._amax)

    @property
    def quantization_config(self) -> dict[str, object] | None:
        """For config.json; None where nothing is quantized."""
        return self._scheme.config(self.ignore) if self._scheme else None

    def finalize(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What is written for these Hugging Face tensors, name and tensor."""
        for name, tensor in tensors.items():
            module = self._quantized_module(name)
            if module is None or self._scheme is None:
                yield name, tensor
            else:
                yield from self._scheme.quantize(module, tensor, self._amax[module]).items()

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


def _check_formats(scheme: Scheme, formats: Mapping[str, str]) -> None:
    if not formats:
        raise UsageError(
            f"scheme={scheme.name} needs quantizers, and the model has none enabled; "
            "insert them with ModelOpt before the export, or choose scheme=none"
        )
    others = [f"{module}: {found}" for module, found in formats.items() if found != scheme.format]
    if others:
        raise UsageError(f"scheme={scheme.name} needs {scheme.format} quantizers, but the model has:{listing(others)}")
