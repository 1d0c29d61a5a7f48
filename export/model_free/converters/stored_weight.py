"""How a source holds the weight of one quantized module: the tensors that make it, and what can be made of them.

A format is a subclass. It works on *local* names (`weight_scale_inv`, not `model.layers.0.….weight_scale_inv`) and
answers for one module: dequantized, or under a scheme of ours that has the same codes and scales.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amaxbridge.export.disk.safetensors_file import StoredTensor
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.schemes.scheme import Scheme
from amaxbridge.mappings.tensors import TensorSpec

type Local = Mapping[str, StoredTensor]
"""The tensors of one module by local name."""

INPUT_SCALES = ("input_scale", "activation_scale", "input_global_scale", "input_zero_point")
"""Static scales of inputs, which belong to the format of a source and end with it."""


@dataclass(frozen=True, slots=True)
class StoredWeight(ABC):
    """The weight of one quantized module.

    Args:
        shape: `[out, in]` of the weight.
        tensors: local names of the tensors that hold it, codes first.
        beside: local names of tensors that belong to the format and not to the weight: input scales.
        shared: the values that the members of a fused group must have in common to be kept as one, by local name.
    """

    shape: tuple[int, int]
    tensors: tuple[str, ...]
    beside: tuple[str, ...] = ()
    shared: tuple[tuple[str, float], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Local names of every tensor of the format."""
        return (*self.tensors, *self.beside)

    @property
    def outputs_first(self) -> bool:
        """True if codes of packed experts have their outputs first, whatever the layout of plain weights."""
        return False

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight `[out, in]`: computed in fp32, cast to `dtype` at the end."""

    def in_group(self, group: Sequence["StoredWeight"], scheme: Scheme) -> "StoredWeight":
        """This weight as a member of a fused group for which a scheme is asked: what members share is found together.

        Args:
            group: all members, this one among them.
            scheme: the scheme.
        """
        return self

    def holds(self, scheme: Scheme) -> bool:
        """True if the module can be kept under this scheme, every value as it is."""
        return False

    @property
    def note(self) -> str | None:
        """What changes in a module that is kept; None if nothing does."""
        return None

    def hindrance(self, scheme: Scheme) -> str | None:
        """Why values of the module do not fit a scheme that it could be kept under otherwise; None if they do."""
        return None

    def specs(self, scheme: Scheme) -> dict[str, TensorSpec]:
        """The tensors of `kept`."""
        return scheme.tensor_specs(TensorSpec(self.shape, torch.bfloat16), Arithmetic.MODELOPT)

    def kept(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
        """The module under a scheme that it `holds`, by local name of that scheme; one of compressed-tensors."""
        raise NotImplementedError

    def kept_as(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
        """As `kept`, under a scheme in any format."""
        return scheme.renamed(self.kept(tensors, scheme.plain))


def numbers_of(local: Local, *names: str) -> tuple[tuple[str, float], ...]:
    """The values of the scales that are one number each, as far as they are there; they are read from the file."""
    return tuple(
        (name, float(local[name].read().float()))
        for name in names
        if name in local and local[name].spec.nbytes == local[name].spec.dtype.itemsize
    )


def one_number(tensor: Tensor) -> Tensor:
    """A scale as schemes store it: fp32 `[1]`."""
    return tensor.float().reshape(1)


def same_weights(scheme: Scheme, other: Scheme) -> bool:
    """True if two schemes store weights alike."""
    one, two = scheme.plain.signature, other.plain.signature
    return one.weights == two.weights and one.quant_format == two.quant_format
