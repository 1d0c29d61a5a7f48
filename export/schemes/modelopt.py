"""ModelOpt's unified Hugging Face format: our schemes under its names of tensors and of algorithms.

Codes and block scales are the same bytes as in compressed-tensors. Other are the names, the dims of single numbers, and
what is stored of NVFP4's two global scales: multipliers in place of divisors.

    scheme        quant_algo                  compressed-tensors         ModelOpt
    nvfp4         NVFP4                       weight_packed              weight
                                              weight_global_scale [1]    weight_scale_2 []   amax / 2688
                                              input_global_scale [1]     input_scale []      amax / 2688
    nvfp4a16      W4A16_NVFP4                 as nvfp4, without the input's
    fp8           FP8                         weight_scale [1]           weight_scale []
                                              input_scale [1]            input_scale []
    fp8_dynamic   FP8_PER_CHANNEL_PER_TOKEN   weight_scale [out, 1]      weight_scale [out] fp32
    fp8_block     fp8_pb_wo                   weight_scale [o, i]        weight_scale [o, 1, i, 1] fp32
    mxfp8         MXFP8                       the same
    mxfp4a16      mxfp4                       weight_packed              weight
    mxfp4         mxfp4                       weight_packed              weight

The names are those of ModelOpt 0.47's exporters. Its other algorithms are not written, each for a reason that the
refusal gives.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from amaxbridge.export.amax.amax_from_scales import SharedScale
from amaxbridge.export.amax.fused_group_amax import BlockAmax, GroupAmax, StackAmax
from amaxbridge.export.disk.row_chunks import Rows
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.scaled import Blocks
from amaxbridge.export.schemes.fp8 import FP8
from amaxbridge.export.schemes.fp8_block import FP8_BLOCK
from amaxbridge.export.schemes.fp8_dynamic import FP8_DYNAMIC
from amaxbridge.export.schemes.mxfp4 import MXFP4, MXFP4A16
from amaxbridge.export.schemes.mxfp8 import MXFP8
from amaxbridge.export.schemes.nvfp4 import NVFP4
from amaxbridge.export.schemes.nvfp4a16 import NVFP4A16
from amaxbridge.export.schemes.scheme import MODELOPT_FORMAT, Scheme
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.tensors import TensorSpec

_NAMES: Mapping[str, str] = MappingProxyType(
    {"weight_packed": "weight", "weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}
)
"""Local names in compressed-tensors → in ModelOpt, where they differ."""
_BY_ALGORITHM: Mapping[str, Scheme] = MappingProxyType(
    {
        "NVFP4": NVFP4,
        "W4A16_NVFP4": NVFP4A16,
        "FP8": FP8,
        "FP8_PER_CHANNEL_PER_TOKEN": FP8_DYNAMIC,
        "fp8_pb_wo": FP8_BLOCK,
        "MXFP8": MXFP8,
        "mxfp4": MXFP4A16,
    }
)
"""Algorithm → the scheme with its weights, and with its inputs where the algorithm says how they are quantized."""
_ALGORITHMS: Mapping[str, str] = MappingProxyType(
    {**{scheme.name: name for name, scheme in _BY_ALGORITHM.items()}, MXFP4.name: "mxfp4"}
)
_WITHOUT: Mapping[str, str] = MappingProxyType(
    {
        "w4afp8": "ModelOpt's W4A8_AWQ has static inputs and FP8 scales of weights, which this scheme has not",
        "w4a16": "ModelOpt's W4A16_AWQ is for AWQ, whose scales of inputs this scheme has not",
        "w8a8": "ModelOpt's W8A8_SQ_PER_CHANNEL has static inputs, and this scheme's are scaled token by token",
    }
)


@dataclass(frozen=True, kw_only=True)
class ModelOptScheme(Scheme):
    """A scheme whose tensors have ModelOpt's names.

    Args:
        base: the same scheme in compressed-tensors.
    """

    base: Scheme

    @property
    def plain(self) -> Scheme:
        return self.base

    @property
    def file_format(self) -> str:
        return MODELOPT_FORMAT

    @property
    def stored_as(self) -> str:
        return _ALGORITHMS[self.base.name]

    @property
    def says_inputs(self) -> bool:
        """True if the algorithm says how inputs are quantized: `mxfp4` stands for weights alone, and for both."""
        return self.stored_as != _ALGORITHMS[MXFP4.name]

    @property
    def blocks(self) -> Blocks:
        return self.base.blocks

    @property
    def group_scale(self) -> SharedScale | None:
        return _multiplier(self.base.group_scale)

    @property
    def input_scale(self) -> SharedScale | None:
        return _multiplier(self.base.input_scale)

    @property
    def block_bound(self) -> float | None:
        return self.base.block_bound

    @property
    def largest_block_scale(self) -> float | None:
        return self.base.largest_block_scale

    @property
    def row_step(self) -> int:
        return self.base.row_step

    def suited(self, found: str) -> "Scheme | None":
        base = self.base.suited(found)
        return None if base is None else replace(self, base=base)

    def weight_specs(self, weight: TensorSpec, arithmetic: Arithmetic) -> dict[str, TensorSpec]:
        specs = self.base.weight_specs(weight, arithmetic)
        return {_NAMES.get(name, name): self._stored_spec(name, spec) for name, spec in specs.items()}

    def measure(self, rows: Tensor, arithmetic: Arithmetic) -> Tensor | None:
        return self.base.measure(rows, arithmetic)

    def constants_of_stack(self, weight: TensorSpec, amax: StackAmax) -> dict[str, Tensor]:
        made = [self.constants(weight, of_group) for of_group in amax.each()]
        return {name: torch.stack([each[name] for each in made]) for name in made[0]}

    def constants(self, weight: TensorSpec, amax: GroupAmax) -> dict[str, Tensor]:
        made = self.renamed(self.base.constants(weight, amax))
        of_weight, of_input = self.base.group_scale, self.base.input_scale
        if of_weight is not None and of_weight.is_divisor and amax.arithmetic is Arithmetic.MODELOPT:
            assert self.group_scale is not None and amax.weight is not None
            made[self.group_scale.tensor] = _exactly(amax.weight, self.base.span)
        if of_input is not None and of_input.is_divisor:
            assert self.input_scale is not None and amax.input is not None
            made[self.input_scale.tensor] = _exactly(amax.input, of_input.span)
        return made

    def quantize_rows(self, rows: Tensor, amax: GroupAmax, block_amax: BlockAmax | None = None) -> dict[str, Tensor]:
        return self.renamed(self.base.quantize_rows(rows, amax, block_amax))

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        divisors = {each.tensor for each in (self.base.group_scale, self.base.input_scale) if each and each.is_divisor}
        made = {}
        for name, tensor in tensors.items():
            value = 1 / tensor if name in divisors else tensor
            spec = self._stored_spec(name, TensorSpec.of(tensor))
            made[_NAMES.get(name, name)] = value.to(spec.dtype).reshape(spec.shape)
        return made

    def weight_shape(self, specs: Mapping[str, TensorSpec]) -> tuple[int, int] | None:
        return self.base.weight_shape({self.base.codes: specs["weight"]}) if "weight" in specs else None

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return self.base.dequantize(self._in_base(tensors), dtype)

    def restore(self, tensors: Mapping[str, Tensor], amax: Tensor | None = None) -> Tensor:
        return self.base.restore(self._in_base(tensors), self.weight_amax(tensors) if amax is None else amax)

    @property
    def levels(self) -> str | None:
        return self.base.levels

    def energies(self, tensors: Mapping[str, Rows]) -> Tensor:
        return self.base.energies({self.base.codes: tensors["weight"], "weight_scale": tensors["weight_scale"]})

    def weight_amax(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        found = super().weight_amax(tensors)
        return found if found is None or self.group_scale is not None else _in_two_dims(found)

    def fault_of_scales(self, least: float, greatest: float) -> str | None:
        return self.base.fault_of_scales(least, greatest)

    def _stored_spec(self, name: str, spec: TensorSpec) -> TensorSpec:
        """The spec in ModelOpt of a tensor that compressed-tensors has in `spec`."""
        shared = {each.tensor for each in (self.base.group_scale, self.base.input_scale) if each is not None}
        if name in shared:
            return TensorSpec((), torch.float32)
        if name != "weight_scale" or self.block_bound is None:
            return spec
        down, across = spec.shape
        return TensorSpec((down,) if self.blocks == Blocks() else (down, 1, across, 1), torch.float32)

    def _in_base(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a weight under the names, and with the numbers, of compressed-tensors."""
        return dict(self._renamed_back(tensors))

    def _renamed_back(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield self.base.codes, tensors["weight"]
        scale = self.base.group_scale
        if scale is not None:
            assert self.group_scale is not None
            value = tensors[self.group_scale.tensor].reshape(1)
            yield scale.tensor, 1 / value if scale.is_divisor else value
        if scale is None or scale.tensor != "weight_scale":
            yield "weight_scale", _in_two_dims(tensors["weight_scale"])


def in_modelopt(scheme: Scheme) -> ModelOptScheme:
    """The scheme in ModelOpt's format.

    Raises:
        UsageError: ModelOpt has no counterpart; says why.
    """
    plain = scheme.plain
    if plain.name not in _ALGORITHMS:
        why = _WITHOUT.get(plain.name, "no algorithm of ModelOpt has its codes and scales")
        raise UsageError(
            f"format=modelopt: {plain.name} has no counterpart in ModelOpt's format: {why}. It has "
            f"{', '.join(_ALGORITHMS)}; leave format= out to write compressed-tensors"
        )
    return ModelOptScheme(
        plain.name,
        format=plain.format,
        config_group={**plain.config_group, "format": MODELOPT_FORMAT},
        weight_quantizer=plain.weight_quantizer,
        input_quantizer=plain.input_quantizer,
        shard_multiple=plain.shard_multiple,
        base=plain,
    )


def scheme_of_algorithm(name: str) -> ModelOptScheme | None:
    """The scheme of a `quant_algo`; None if it is not read here. ModelOpt writes some in small letters."""
    found = next((scheme for known, scheme in _BY_ALGORITHM.items() if known.upper() == name.upper()), None)
    return None if found is None else in_modelopt(found)


def modelopt_schemes() -> list[ModelOptScheme]:
    """Every scheme in ModelOpt's format."""
    return [in_modelopt(scheme) for scheme in (*_BY_ALGORITHM.values(), MXFP4)]


def algorithms() -> list[str]:
    """Every `quant_algo` that is known here."""
    return list(_BY_ALGORITHM)


def _multiplier(scale: SharedScale | None) -> SharedScale | None:
    return None if scale is None else SharedScale(_NAMES.get(scale.tensor, scale.tensor), scale.span, shape=())


def _in_two_dims(scales: Tensor) -> Tensor:
    """`[blocks down, blocks across]` from scales of blocks as ModelOpt stores them."""
    return scales.reshape(scales.shape[0], -1)


def _exactly(amax: Tensor, span: float) -> Tensor:
    """`amax / span` as ModelOpt divides, fp32 []: the reciprocal of a divisor would be another number at times."""
    value = amax.float().reshape(())
    return value / torch.full_like(value, span)
