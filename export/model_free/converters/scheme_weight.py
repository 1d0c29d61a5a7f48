"""Modules in the formats of compressed-tensors: what our own schemes write, and what its other users do."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.model_free.converters.stored_weight import (
    INPUT_SCALES,
    Local,
    StoredWeight,
    numbers_of,
    same_weights,
)
from amaxbridge.export.schemes import Scheme
from amaxbridge.export.schemes.stored_specs import stored_specs
from amaxbridge.mappings.tensors import TensorSpec

_ANY = TensorSpec((1024, 1024), torch.bfloat16)  # which tensors a scheme writes does not depend on the shape


@dataclass(frozen=True, slots=True)
class SchemeWeight(StoredWeight):
    """A module under a scheme.

    Args:
        scheme: the scheme.
        stored: its tensors by local name.
    """

    scheme: Scheme | None = None
    stored: tuple[tuple[str, TensorSpec], ...] = ()

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        assert self.scheme is not None
        return self.scheme.dequantize(tensors, dtype)

    def holds(self, scheme: Scheme) -> bool:
        assert self.scheme is not None
        static = scheme.plain.input_scale
        return same_weights(scheme, self.scheme) and (static is None or static.tensor in self.beside)

    def specs(self, scheme: Scheme) -> dict[str, TensorSpec]:
        if scheme.plain is not scheme:
            return StoredWeight.specs(self, scheme)
        stored = dict(self.stored)
        return {name: _numbers_in_one_dim(stored[name]) for name in _names(scheme)}

    def kept(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
        specs = self.specs(scheme)
        return {name: tensors[name].reshape(spec.shape) for name, spec in specs.items()}


def scheme_weight(local: Local, scheme: Scheme) -> SchemeWeight:
    """A module under a scheme.

    Raises:
        ValueError: tensors of the scheme are missing, or are others than it writes.
    """
    specs = {name: stored.spec for name, stored in local.items()}
    scales = () if scheme.input_scale is None else (scheme.input_scale.tensor,)
    names = tuple(name for name in _names(scheme) if name not in scales)
    if missing := [name for name in names if name not in specs]:
        raise ValueError(f"{scheme.name} needs {', '.join(missing)}, which is missing")
    shape = scheme.weight_shape(specs)
    if shape is None:
        raise ValueError(f"{scheme.codes} is {specs[scheme.codes]}, not those of a matrix")
    if "weight_shape" in specs:  # codes may end with a part of a word
        rows, columns = local["weight_shape"].read().tolist() if specs["weight_shape"].shape == (2,) else (0, 0)
        if rows != shape[0] or not 0 <= shape[1] - columns < 32 // scheme.bits:
            raise ValueError(f"weight_shape is {[rows, columns]}, and {scheme.codes} {specs[scheme.codes]}")
        shape = rows, columns
    check_specs(scheme, shape, {name: specs[name] for name in names})
    beside = tuple(name for name in INPUT_SCALES if name in specs)
    stored = tuple((name, specs[name]) for name in (*names, *beside))
    ordered = (scheme.codes, *(name for name in names if name != scheme.codes))
    shared = scheme.group_scale.tensor if scheme.group_scale is not None else ""
    return SchemeWeight(shape, ordered, beside, numbers_of(local, shared, *beside), scheme, stored)


def check_specs(scheme: Scheme, shape: tuple[int, int], found: Mapping[str, TensorSpec]) -> None:
    """Checks that tensors are those that a scheme writes for a weight of this shape, in one dtype or another.

    Raises:
        ValueError: they are not; names the first that is not.
    """
    allowed = stored_specs(scheme, shape)
    for name, spec in found.items():
        if _numbers_in_one_dim(spec) not in allowed.get(name, ()):
            right = " or ".join(sorted(map(str, allowed.get(name, ())))) or "nothing of this name"
            raise ValueError(f"{name} is {spec}; {scheme.name} has {right} for {list(shape)}")


def _numbers_in_one_dim(spec: TensorSpec) -> TensorSpec:
    """A scale of one number has one dim in our schemes, and none in other programs; engines take both."""
    return TensorSpec((1,), spec.dtype) if spec.shape == () else spec


def _names(scheme: Scheme) -> list[str]:
    return list(scheme.tensor_specs(_ANY, Arithmetic.MODELOPT))
