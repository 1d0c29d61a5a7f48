"""The quantization formats, one file each, and how the rest of the program sees them."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from export.fused_scales import GroupAmax
from export.schemes.nvfp4 import NVFP4
from mappings.errors import UsageError
from mappings.tensors import TensorSpec


class Scheme(Protocol):
    """One quantization format. Stateless; knows modules and tensors, neither files nor ranks."""

    @property
    def name(self) -> str:
        """As users choose it: `nvfp4`."""

    @property
    def format(self) -> str:
        """What the weight quantizers of a trained model must be for this scheme: `nvfp4`."""

    @property
    def quantizes_inputs(self) -> bool:
        """Whether it needs an input amax for each module."""

    def output_specs(self, module: str, weight: TensorSpec) -> dict[str, TensorSpec]:
        """The tensors written for a module, from its weight's shape `[out, in]`.

        Raises:
            ValueError: the weight cannot be quantized in this format; says why.
        """

    def quantize(
        self, module: str, weight: Tensor, amax: GroupAmax, weight_amax: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The tensors written for a module.

        Args:
            weight: `[out, in]`.
            amax: per-tensor, shared by the fused group.
            weight_amax: per-channel `[out, 1]` or per-block `[out, blocks]`, where training kept it.
        """

    def dequantize(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight as a serving engine sees it, from the tensors written for the module."""

    def config(self, ignore: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json."""


SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (NVFP4(),)}


def find_scheme(name: str) -> Scheme | None:
    """The scheme that users call `name`; None for `none`, which writes the weights as they are.

    Raises:
        UsageError: there is none; lists those there are.
    """
    if name == "none":
        return None
    if name not in SCHEMES:
        raise UsageError(f"unknown scheme {name!r}; known: {', '.join(SCHEMES)}, none")
    return SCHEMES[name]
