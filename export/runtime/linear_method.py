"""The method of a linear layer: the scheme for its signature, and errors that name the layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from amaxbridge.export.runtime.activations import activation_for
from amaxbridge.export.runtime.float_formats import FloatScheme
from amaxbridge.export.runtime.w8a8 import CompressedTensorsW8A8Int8Scheme
from amaxbridge.export.runtime.wna16 import CompressedTensorsWNA16Scheme
from amaxbridge.export.schemes import scheme_of
from amaxbridge.export.schemes.signature import Signature, UnsupportedQuantizationError
from amaxbridge.mappings.errors import CheckpointError

if TYPE_CHECKING:
    from amaxbridge.export.runtime.compressed_tensors_config import CompressedTensorsConfig


class LinearScheme(Protocol):
    """How layers of one signature hold their weights and compute."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Registers the parameters to load. `tp_rank` and `tp_size` among the attributes select this rank's shard."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Checks that everything was loaded, and converts it to the form that `apply` reads."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[*, in]` → `[*, out]`, the outputs of all merged modules in order."""

    def weight(self, layer: nn.Module) -> Tensor:
        """The weight `[out, in]`, dequantized to bf16."""


class CompressedTensorsLinearMethod:
    """How one linear layer loads and computes.

    Args:
        quant_config: the checkpoint's configuration.
        signature: signature of the layer's config group; or its name among the groups of `quant_config`: bits as
            `w4a16`, the name of a scheme, or the format of the tensors.
        prefix: the layer's full name, for messages.

    Raises:
        UnsupportedQuantizationError: the runtime does not support this signature; says what it supports.
    """

    def __init__(self, quant_config: "CompressedTensorsConfig", signature: Signature | str, prefix: str = "") -> None:
        self.quant_config = quant_config
        self.prefix = prefix
        if isinstance(signature, str):
            signature = _named(signature, quant_config.signatures)
        self.signature = signature
        with self._naming():
            self.scheme = scheme_for(signature)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Registers the parameters of a layer; each has a `weight_loader(parameter, tensor, shard_id)`.

        Args:
            layer: the layer that gets the parameters, named as in the checkpoint.
            input_size_per_partition: number of inputs on this rank.
            output_partition_sizes: number of outputs on this rank, for each merged module.
            input_size: number of inputs on all ranks.
            output_size: number of outputs of all modules on all ranks.
            params_dtype: dtype of the inputs.
            extra_weight_attrs: attributes of the parameters; `tp_rank` and `tp_size` select this rank's shard.

        Raises:
            ValueError: the format does not divide into these sizes.
        """
        with self._naming():
            self.scheme.create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                **extra_weight_attrs,
            )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Converts what was loaded to the form that `apply` reads: repacked, transposed, scales permuted.

        Raises:
            CheckpointError: a tensor was not loaded, or merged modules have scales that one GEMM cannot use.
        """
        with self._naming():
            self.scheme.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[*, input_size_per_partition]` → `[*, sum(output_partition_sizes)]`, in the dtype of `x`."""
        return self.scheme.apply(layer, x, bias)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Adds the layer's name to the errors of a scheme."""
        try:
            yield
        except (ValueError, CheckpointError) as error:
            if not self.prefix:
                raise
            raise type(error)(f"{self.prefix}: {error}") from error


def _named(name: str, signatures: Sequence[Signature]) -> Signature:
    """The signature with this name.

    Raises:
        UnsupportedQuantizationError: none has it, or several do; lists the names.
    """
    named = [(each, _names(each)) for each in signatures]
    found = [each for each, names in named if name in names]
    if len(found) != 1:
        known = "; ".join(", ".join(names) for _, names in named)
        which = "several signatures are" if found else "no signature is"
        raise UnsupportedQuantizationError(f"{which} called {name!r}; the config has {known}")
    return found[0]


def _names(signature: Signature) -> list[str]:
    bits = f"w{signature.weights.bits}a{signature.inputs.bits if signature.inputs else 16}"
    scheme = scheme_of(signature)
    return list(dict.fromkeys([bits, *([scheme.name] if scheme else []), signature.quant_format]))


def scheme_for(signature: Signature) -> LinearScheme:
    """Chooses the scheme for a signature.

    Raises:
        UnsupportedQuantizationError: there is none; says what is wrong and what is supported.
    """
    weights, inputs = signature.weights, signature.inputs
    if weights.dynamic:
        raise UnsupportedQuantizationError(f"{signature}: weights with dynamic scales are not in a checkpoint")
    if weights.kind == "float":
        return FloatScheme(signature)
    if weights.kind != "int":
        raise UnsupportedQuantizationError(f"{signature}: weights are int or float, not {weights.kind}")
    if inputs is None or (signature.quant_format == "pack-quantized" and inputs.kind == "float"):
        return _packed(signature)
    if (inputs.kind, inputs.bits, inputs.strategy, inputs.dynamic, inputs.symmetric) != ("int", 8, "token", True, True):
        raise UnsupportedQuantizationError(
            f"{signature}: integer weights go with inputs of 8-bit integers, dynamic by token and symmetric, or with "
            "inputs that are not quantized"
        )
    if weights.strategy not in ("channel", "tensor") or not weights.symmetric or weights.group_size:
        raise UnsupportedQuantizationError(
            f"{signature}: int8 with int8 inputs is by channel or by tensor, and symmetric"
        )
    return CompressedTensorsW8A8Int8Scheme(weight_bits=weights.bits, has_row_scales=weights.strategy == "channel")


def _packed(signature: Signature) -> LinearScheme:
    weights, inputs = signature.weights, activation_for(signature)
    if signature.quant_format != "pack-quantized":
        raise UnsupportedQuantizationError(f"{signature}: integer weights alone are read as pack-quantized")
    if weights.strategy not in ("group", "channel"):
        raise UnsupportedQuantizationError(f"{signature}: packed integers are by group or by channel")
    return CompressedTensorsWNA16Scheme(
        weight_bits=weights.bits,
        group_size=weights.group_size if weights.strategy == "group" else -1,
        symmetric=weights.symmetric,
        actorder=weights.actorder,
        inputs=inputs,
    )
