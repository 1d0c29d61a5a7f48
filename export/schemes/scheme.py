"""A quantization format as the rest of the program sees it: one value that answers for itself.

A scheme works on the tensors of one module under *local* names, `weight_packed`, not `model.layers.0.….weight_packed`.
Nobody outside this package asks which scheme it has: what differs between schemes is a field or a method here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.amax.amax_from_scales import SharedScale, amax_of_scale
from amaxbridge.export.amax.fused_group_amax import DATA_FREE, BlockAmax, GroupAmax, StackAmax
from amaxbridge.export.disk.row_chunks import Rows, WholeTensor, Written
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.e2m1 import NOT_FINITE
from amaxbridge.export.kernels.nvfp4 import FP8_MAX, SCALE_RANGE
from amaxbridge.export.kernels.scaled import Blocks
from amaxbridge.export.schemes.quantizer_settings import QuantizerSettings
from amaxbridge.export.schemes.signature import Arguments, Signature
from amaxbridge.mappings.errors import MappingError
from amaxbridge.mappings.tensors import TensorSpec, max_of

COMPRESSED_TENSORS = "compressed-tensors"
MODELOPT_FORMAT = "modelopt"
"""The formats of quantized files, as `quant_method` calls them; see `schemes.modelopt`."""

_KEPT = 32 << 20  # bytes of a fused group that stay mapped between measuring and quantizing
NO_AMAX: Mapping[str, BlockAmax] = MappingProxyType({})
NO_TENSORS: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ShardMultiple:
    """The multiples that a tensor-parallel shard of a weight needs, to suit the format and its kernel.

    Args:
        outputs: multiple of the rows of a shard.
        inputs: multiple of the columns of a shard.
        last_may_be_short: the last member of a fused group may have any number of rows, except in experts.
    """

    outputs: int = 1
    inputs: int = 1
    last_may_be_short: bool = False


UE8M0 = "ue8m0"
"""Powers of two: the exponents of fp32 alone."""
SCALES = (UE8M0,)


@dataclass(frozen=True)
class Scheme(ABC):
    """One quantization format. Stateless; knows modules and tensors, neither files nor ranks.

    Args:
        name: the name that users choose: compressed-tensors' preset in small letters, `nvfp4a16`.
        format: the format of its weight quantizers in a `QuantState`: `nvfp4`. "" if ModelOpt has none.
        config_group: `format`, `weights` and `input_activations` of its group in config.json.
        weight_quantizer: settings of ModelOpt's weight quantizers that mean this scheme.
        input_quantizer: settings of its input quantizers; None if inputs are not quantized.
        shard_multiple: the multiples that a tensor-parallel shard of a weight needs.
        kernel_tiles: outputs and inputs of the tiles that engines have kernels for: a layer divides by one of these. ()
            if kernels take any size.
        group_sizes: the numbers of columns that users may choose to share a scale; () if the format fixes it.
        scales: the numbers that its scales are rounded up to, of `SCALES`; "" for the format's own.
    """

    name: str
    format: str
    config_group: dict[str, Any]
    _: KW_ONLY
    weight_quantizer: QuantizerSettings | None = None
    input_quantizer: QuantizerSettings | None = None
    shard_multiple: ShardMultiple = ShardMultiple()
    kernel_tiles: tuple[tuple[int, int], ...] = ()
    group_sizes: tuple[int, ...] = ()
    scales: str = ""

    # What it is

    @property
    def plain(self) -> "Scheme":
        """The same scheme under compressed-tensors' names: itself, but for one in another format."""
        return self

    @property
    def file_format(self) -> str:
        """The format of files with its tensors: `compressed-tensors` or `modelopt`."""
        return COMPRESSED_TENSORS

    @property
    def stored_as(self) -> str:
        """The word for its tensors in the config of its files: `nvfp4-pack-quantized`, or ModelOpt's `NVFP4`."""
        return str(self.config_group["format"])

    @property
    def says_inputs(self) -> bool:
        """True if the config of its files says how inputs are quantized."""
        return True

    @property
    def served_as(self) -> str:
        """Its entry in the tables of engines."""
        return self.name if self.plain is self else f"{self.file_format} {self.name}"

    @property
    @abstractmethod
    def blocks(self) -> Blocks:
        """The block of a weight that shares a stored scale."""

    @property
    def scales_in_model_dtype(self) -> bool:
        """True if engines hold weight scales in the dtype of the model, whatever is stored."""
        return False

    @property
    def group_scale(self) -> SharedScale | None:
        """The weight scale that all members of a fused group share; None if the format has none."""
        return None

    @property
    def span(self) -> float:
        """What an amax becomes under the group's scale, as this scheme writes it."""
        assert self.group_scale is not None, f"{self.name} has no group scale"
        return self.group_scale.span

    @property
    def block_bound(self) -> float | None:
        """The factor from a stored `weight_scale` to the amax of its block: the largest code.

        None for scales that are relative to a group's scale, or powers of two.
        """
        return None

    @property
    def largest_block_scale(self) -> float | None:
        """The largest block scale under a group's scale; None in formats without both."""
        return None

    @property
    def has_free_row_scales(self) -> bool:
        """True if the stored scales of a row can take any factor, and the codes stay."""
        return False

    @cached_property
    def signature(self) -> Signature:
        """The signature of `config_group`, as readers of config.json see it."""
        return Signature.of(self.config_group)

    @property
    def bits(self) -> int:
        """Bits of a weight's code."""
        return int(self.config_group["weights"]["num_bits"])

    @cached_property
    def input_scale(self) -> SharedScale | None:
        """The static input scale that all members of a fused group share; None if there is none."""
        return static_scale(self.signature.inputs)

    @property
    def needs_weight_amax(self) -> bool:
        """True if a fused group shares one per-tensor weight amax."""
        return self.group_scale is not None

    @property
    def needs_input_amax(self) -> bool:
        """True if a fused group shares one calibrated input amax."""
        return self.input_scale is not None

    @property
    def has_weight_amax(self) -> bool:
        """True if the amax of the weight quantizer follows from the stored scales."""
        return bool(self.format) and (self.group_scale is not None or self.block_bound is not None)

    @property
    def row_step(self) -> int:
        """Chunks of rows begin at a multiple of this: the height of a block, or of a packed word."""
        return 1

    @property
    def codes(self) -> str:
        """The tensor that holds the codes of a weight."""
        return "weight"

    @property
    def input_format(self) -> str | None:
        """The format of ModelOpt's input quantizers, as in a `QuantState`; None if inputs have no quantizer."""
        return None if self.input_quantizer is None else self.input_quantizer.input_format

    def suited(self, found: str) -> "Scheme | None":
        """The scheme as weights with quantizers of a format need it; None if it cannot write them.

        Args:
            found: a format in a `QuantState`: `nvfp4`, `nvfp4 four_over_six`.
        """
        return self if found == self.format else None

    def with_group_size(self, group_size: int) -> "Scheme | None":
        """The same scheme with groups of another size, -1 for whole rows; None if its blocks are fixed."""
        return None

    def with_scales(self, scales: str) -> "Scheme | None":
        """The same scheme with scales of other numbers, of `SCALES`; None if the format fixes them."""
        return None

    # What is written for a module

    @abstractmethod
    def weight_specs(self, weight: TensorSpec, arithmetic: Arithmetic) -> dict[str, TensorSpec]:
        """The tensors that hold a weight `[out, in]`, by local name.

        Args:
            weight: shape and dtype of the weight.
            arithmetic: whose rounding; the dtype of scales may depend on it.

        Raises:
            ValueError: the weight cannot be quantized in this format; says why.
        """

    def tensor_specs(self, weight: TensorSpec, arithmetic: Arithmetic) -> dict[str, TensorSpec]:
        """All tensors written for a module with a weight `[out, in]`: `weight_specs` and the static input scale."""
        specs = self.weight_specs(weight, arithmetic)
        if self.input_scale is not None:
            specs[self.input_scale.tensor] = TensorSpec(self.input_scale.shape, torch.float32)
        return specs

    def measure(self, rows: Tensor, arithmetic: Arithmetic) -> Tensor | None:
        """The contribution of some rows to the amax of their fused group: fp32, 0-d; None if no amax is shared."""
        return None

    def constants(self, weight: TensorSpec, amax: GroupAmax) -> dict[str, Tensor]:
        """The tensors that do not grow with a weight's rows: global scales, input scales, shapes."""
        of_weight, of_input = (None if each is None else each.reshape(1) for each in (amax.weight, amax.input))
        made = self.constants_of_stack(weight, StackAmax(1, of_weight, of_input, amax.arithmetic))
        return {name: tensor[0] for name, tensor in made.items()}

    def constants_of_stack(self, weight: TensorSpec, amax: StackAmax) -> dict[str, Tensor]:
        """As `constants`, for equal weights: `[n, …]`, those of each."""
        if self.input_scale is None:
            return {}
        assert amax.input is not None, f"{self.name} needs an input amax"
        return {self.input_scale.tensor: self.input_scale.stored_of_groups(amax.input)}

    @abstractmethod
    def quantize_rows(self, rows: Tensor, amax: GroupAmax, block_amax: BlockAmax | None = None) -> dict[str, Tensor]:
        """The other tensors, for some rows of a weight.

        Args:
            rows: `[n, in]`, beginning at a multiple of `row_step`.
            amax: amax of the fused group, measured if necessary.
            block_amax: those of these rows, if training kept them.

        Raises:
            ValueError: the rows hold NaN or Inf.
        """

    def quantize_stack(
        self,
        rows: Tensor,
        amax: StackAmax,
        block_amax: BlockAmax | None = None,
        into: Mapping[str, Tensor] = NO_TENSORS,
    ) -> dict[str, Tensor]:
        """As `quantize_rows`, for equal weights one below the other: in one call of a kernel, where the format can.

        Args:
            rows: `[n · out, in]`.
            amax: those of the weights' fused groups.
            block_amax: those of all rows.
            into: memory for the results, by local name, with which a format may fill it.
        """
        each = len(rows) // amax.length
        blocks = -(-each // self.row_step)
        parts = [
            self.quantize_rows(part, of_group, block_amax and block_amax.rows(at * blocks, (at + 1) * blocks))
            for at, (part, of_group) in enumerate(zip(rows.split(each), amax.each(), strict=True))
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def adopt(self, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """The tensors of a weight whose codes and scales exist already, as training keeps FP8 parameters.

        Args:
            codes: `[out, in]`, in the dtype of the format.
            scales: one for each block, `[blocks down, blocks across]`, as the format stores them.

        Raises:
            ValueError: the format cannot store given codes, or these are not its codes and scales.
        """
        weight = TensorSpec((codes.shape[0], codes.shape[-1]), torch.bfloat16)
        expected = self.weight_specs(weight, Arithmetic.MODELOPT)
        found = {"weight": TensorSpec.of(codes), "weight_scale": TensorSpec.of(scales)}
        if found != expected:
            shown = [", ".join(f"{name} {spec}" for name, spec in specs.items()) for specs in (found, expected)]
            raise ValueError(f"{self.name} cannot take {shown[0]} as they are: it stores {shown[1]}")
        return {"weight": codes, "weight_scale": scales}

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the `plain` scheme under the names, and with the numbers, of this one."""
        return dict(tensors)

    # What is read of a module

    @abstractmethod
    def weight_shape(self, specs: Mapping[str, TensorSpec]) -> tuple[int, int] | None:
        """Shape `[out, in]` of the stored weight, from its codes; None if they are missing or not a matrix."""

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight `[out, in]` as a serving engine sees it, in `dtype`, from the tensors that hold it."""

    def restore(self, tensors: Mapping[str, Tensor], amax: Tensor | None = None) -> Tensor:
        """A weight `[out, in]` in bf16 that ModelOpt's arithmetic quantizes to these tensors again.

        Args:
            amax: the weight amax that a group's scale implies; None to take it from the tensors.
        """
        return self.dequantize(tensors)

    def weight_amax(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The amax of the weight quantizer that the stored scales imply: fp32, 0-d or `[blocks down, blocks across]`.

        Quantizing with it yields the stored scales to the bit, if any amax does. None if the format keeps none.
        """
        if self.group_scale is not None:
            return self.group_scale.amax(tensors[self.group_scale.tensor])
        return None if self.block_bound is None else amax_of_scale(tensors["weight_scale"], self.block_bound)

    @property
    def levels(self) -> str | None:
        """The tensor of E4M3 numbers right under the scale that a fused group shares; None in formats without."""
        return None

    def energies(self, tensors: Mapping[str, Rows]) -> Tensor:
        """By the byte of `levels`, the sum of squared codes under it, fp64 `[256]`: see `kernels.common_scale`."""
        raise NotImplementedError(f"{self.name} has no levels")

    def input_amax(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The amax of the input quantizer that its stored scale implies: fp32, 0-d; None without a static scale."""
        return None if self.input_scale is None else self.input_scale.amax(tensors[self.input_scale.tensor])

    def fault_of_scales(self, least: float, greatest: float) -> str | None:
        """What is wrong with a `weight_scale` whose elements lie between these two; None if nothing is."""
        return fault_of_scales(least, greatest)


def fault_of_scales(least: float, greatest: float) -> str | None:
    """What is wrong with multipliers or divisors that lie between these two: all must be positive and finite."""
    return None if 0 < least <= greatest < math.inf else f"is between {least:g} and {greatest:g}"


def static_scale(inputs: Arguments | None) -> SharedScale | None:
    """The static scale of inputs with these arguments: NVFP4's divisor above dynamic blocks, or a multiplier."""
    if inputs is None or inputs.dynamic is True:
        return None
    if inputs.dynamic == "local":
        return SharedScale("input_global_scale", SCALE_RANGE, is_divisor=True)
    return SharedScale("input_scale", FP8_MAX if inputs.kind == "float" else float(2 ** (inputs.bits - 1) - 1))


def quantize_group(
    scheme: Scheme,
    weights: Mapping[str, Rows],
    amax: GroupAmax | None = None,
    block_amax: Mapping[str, BlockAmax] = NO_AMAX,
) -> Iterator[Written]:
    """Yields what is written for a fused group.

    Args:
        scheme: the scheme.
        weights: module → weight `[out, in]`, all members of the group.
        amax: the group's calibrated amax; a None in it comes from the weights. None: data-free.
        block_amax: module → amax of each block, if training kept them.

    Raises:
        MappingError: a weight holds NaN or Inf (names the module), or weights of several dtypes share an amax.
    """
    amax = DATA_FREE if amax is None else amax
    if amax.weight is None:
        amax = amax._replace(weight=_measured(scheme, weights, amax.arithmetic))
    for module, weight in weights.items():
        planned = scheme.tensor_specs(weight.spec, amax.arithmetic)
        with naming(module):
            constants = scheme.constants(weight.spec, amax)
        for name, tensor in constants.items():
            yield Written(f"{module}.{name}", 0, tensor)
        count, step = weight.spec.shape[0], scheme.row_step
        blocks = block_amax.get(module)
        for first, rows in weight.parts(step):
            part = None if blocks is None else blocks.rows(first // step, -(-(first + len(rows)) // step))
            with naming(module):
                quantized = scheme.quantize_rows(rows, amax, part)
            for name, tensor in quantized.items():
                yield Written(f"{module}.{name}", first if planned[name].shape[0] == count else first // step, tensor)


def quantize_tensors(
    scheme: Scheme,
    weights: Mapping[str, Tensor],
    amax: GroupAmax | None = None,
    block_amax: Mapping[str, BlockAmax] = NO_AMAX,
) -> Iterator[tuple[str, Tensor]]:
    """As `quantize_group`, for weights in memory: name and whole tensor of each."""
    whole = {module: WholeTensor(weight) for module, weight in weights.items()}
    for name, _, tensor in quantize_group(scheme, whole, amax, block_amax):
        yield name, tensor


def _measured(scheme: Scheme, weights: Mapping[str, Rows], arithmetic: Arithmetic) -> Tensor | None:
    """The largest amax of the group's weights; None if the scheme shares none."""
    largest: list[Tensor] = []
    kept = sum(weight.spec.nbytes for weight in weights.values()) <= _KEPT
    for module, weight in weights.items():
        for _, rows in weight.parts(scheme.row_step, again=kept):
            with naming(module):
                measured = scheme.measure(rows, arithmetic)
                if measured is None:
                    return None
                if not measured.isfinite():
                    raise ValueError(NOT_FINITE)
            largest.append(measured)
    dtypes = {str(weight.spec.dtype) for weight in weights.values()}
    if arithmetic is Arithmetic.COMPRESSED_TENSORS and len(dtypes) > 1:
        raise MappingError(
            f"{', '.join(weights)} share an amax, in {', '.join(sorted(dtypes))}: cast them to one dtype"
        )
    return max_of(largest)


def arguments(num_bits: int, kind: str, strategy: str, **others: Any) -> dict[str, Any]:
    """compressed-tensors' `QuantizationArgs`, with the few keys that every engine accepts."""
    return {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **others}


@contextmanager
def naming(module: str) -> Iterator[None]:
    """Adds the module's name to the errors of a kernel."""
    try:
        yield
    except ValueError as error:
        raise MappingError(f"{module}: {error}") from error
