"""What a quantization format is to the rest of the program."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from amaxbridge.export.amax.fused_group_amax import DATA_FREE, GroupAmax
from amaxbridge.export.disk.row_chunks import Rows, WholeTensor, Written
from amaxbridge.export.kernels.e2m1 import NOT_FINITE
from amaxbridge.mappings.errors import MappingError
from amaxbridge.mappings.tensors import TensorSpec, max_of

_KEPT = 32 << 20  # bytes of a fused group that stay mapped between measuring and quantizing
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

    @property
    def row_step(self) -> int:
        """Rows are quantized in parts that begin at a multiple of this: the height of a block, or of a packed word."""

    def measure(self, rows: Tensor, *, calibrated: bool) -> Tensor | None:
        """What rows of a weight contribute to the amax of their fused group: fp32, 0-d. None: no amax is shared.

        Args:
            calibrated: whose arithmetic is used, see `GroupAmax`.
        """

    def constants(self, module: str, weight: TensorSpec, amax: GroupAmax) -> dict[str, Tensor]:
        """The tensors written for a module that do not grow with its rows: global scales, input scales, shapes."""

    def quantize_rows(
        self, module: str, rows: Tensor, amax: GroupAmax, block_amax: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The other tensors written for a module, for some of its rows.

        Args:
            rows: `[some, in]`, beginning at a multiple of `row_step`.
            amax: of the fused group, measured where it has to be.
            block_amax: `[blocks down, blocks across]` of these rows, where training kept them.

        Raises:
            ValueError: the rows hold NaN or Inf.
        """

    def dequantize(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight as a serving engine sees it, from the tensors written for the module."""


def quantize_group(
    scheme: Scheme,
    weights: Mapping[str, Rows],
    amax: GroupAmax | None = None,
    block_amax: Mapping[str, Tensor] = NO_AMAX,
) -> Iterator[Written]:
    """What is written for a fused group.

    Args:
        weights: module → weight `[out, in]`, all members of the group.
        amax: what training calibrated for the group; what is None in it comes from the weights. None: data-free.
        block_amax: module → amax of each block, `[blocks down, blocks across]`, where training kept them.

    Raises:
        MappingError: a weight holds NaN or Inf; names the module. Or weights of several dtypes share an amax.
    """
    amax = DATA_FREE if amax is None else amax
    if amax.weight is None:
        amax = amax._replace(weight=_measured(scheme, weights, amax.calibrated))
    for module, weight in weights.items():
        planned = scheme.output_specs(module, weight.spec, calibrated=amax.calibrated)
        with naming(module):
            constants = scheme.constants(module, weight.spec, amax)
        for name, tensor in constants.items():
            yield Written(name, 0, tensor)
        count, step = weight.spec.shape[0], scheme.row_step
        blocks = block_amax.get(module)
        for first, rows in weight.parts(step):
            part = None if blocks is None else blocks[first // step : -(-(first + len(rows)) // step)]
            with naming(module):
                quantized = scheme.quantize_rows(module, rows, amax, part)
            for name, tensor in quantized.items():
                yield Written(name, first if planned[name].shape[0] == count else first // step, tensor)


def quantize_tensors(
    scheme: Scheme,
    weights: Mapping[str, Tensor],
    amax: GroupAmax | None = None,
    block_amax: Mapping[str, Tensor] = NO_AMAX,
) -> Iterator[tuple[str, Tensor]]:
    """As `quantize_group`, of weights in memory: the name and the whole of each tensor."""
    whole = {module: WholeTensor(weight) for module, weight in weights.items()}
    for name, _, tensor in quantize_group(scheme, whole, amax, block_amax):
        yield name, tensor


def _measured(scheme: Scheme, weights: Mapping[str, Rows], calibrated: bool) -> Tensor | None:
    """The largest amax of the group's weights, None where the scheme shares none."""
    largest: list[Tensor] = []
    kept = sum(weight.spec.nbytes for weight in weights.values()) <= _KEPT
    for module, weight in weights.items():
        for _, rows in weight.parts(scheme.row_step, again=kept):
            with naming(module):
                measured = scheme.measure(rows, calibrated=calibrated)
                if measured is None:
                    return None
                if not measured.isfinite():
                    raise ValueError(NOT_FINITE)
            largest.append(measured)
    dtypes = {str(weight.spec.dtype) for weight in weights.values()}
    if not calibrated and len(dtypes) > 1:
        raise MappingError(
            f"{', '.join(weights)} share an amax, in {', '.join(sorted(dtypes))}: cast them to one dtype"
        )
    return max_of(largest)


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
