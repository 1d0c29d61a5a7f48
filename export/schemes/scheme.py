"""What a quantization format is to the rest of the program."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from export.fused_scales import GroupAmax
from mappings.errors import MappingError
from mappings.tensors import TensorSpec

NO_AMAX: Mapping[str, Tensor] = MappingProxyType({})


class Scheme(Protocol):
    """One quantization format. Stateless; knows modules and tensors, neither files nor ranks."""

    @property
    def name(self) -> str:
        """As users choose it: the name of compressed-tensors' preset in small letters, `nvfp4a16`."""

    @property
    def format(self) -> str:
        """What the weight quantizers of a trained model must be for this scheme, as `bridge` names them: `nvfp4`."""

    @property
    def needs_weight_amax(self) -> bool:
        """Whether a fused group shares one per-tensor weight amax."""

    @property
    def needs_input_amax(self) -> bool:
        """Whether a fused group shares one calibrated input amax; others need none, or scale inputs as they come."""

    @property
    def config_group(self) -> dict[str, Any]:
        """`format`, `weights` and `input_activations` of the scheme's group in config.json."""

    def output_specs(self, module: str, weight: TensorSpec, *, calibrated: bool) -> dict[str, TensorSpec]:
        """The tensors written for a module with a weight `[out, in]`.

        Args:
            calibrated: whether `quantize` will get an `amax`; scales may then have another dtype.

        Raises:
            ValueError: the weight cannot be quantized in this format; says why.
        """

    def quantize(
        self,
        weights: Mapping[str, Tensor],
        amax: GroupAmax | None = None,
        block_amax: Mapping[str, Tensor] = NO_AMAX,
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors written for a fused group, name and tensor.

        Args:
            weights: module → weight `[out, in]`, all members of the group.
            amax: what training calibrated for the group; the arithmetic is then ModelOpt's, and what is None in it
                comes from the weights. Without it, the arithmetic is that of llm-compressor's `model_free_ptq`.
            block_amax: module → amax of each block, `[blocks down, blocks across]`, where training kept them.

        Raises:
            MappingError: a weight holds NaN or Inf; names the module.
        """

    def dequantize(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight as a serving engine sees it, from the tensors written for the module."""


def arguments(num_bits: int, kind: str, strategy: str, **others: Any) -> dict[str, Any]:
    """`QuantizationArgs` of compressed-tensors in the few keys that every engine accepts."""
    return {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **others}


@contextmanager
def naming(module: str) -> Iterator[None]:
    """Puts the module's name before what a kernel says."""
    try:
        yield
    except ValueError as error:
        raise MappingError(f"{module}: {error}") from error
