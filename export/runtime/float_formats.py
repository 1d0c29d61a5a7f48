"""Layers with floating-point codes: NVFP4, MXFP4, MXFP8 and FP8, which compute by dequantizing.

The tensors and how they are read are those of `export.schemes`, one object for each format on both sides of the disk.
Inputs are rounded to codes and back, the product is one of the inputs' dtype. Weights are dequantized at every call, so
that a layer stays as small as the checkpoint; engines have kernels for this.

Merged modules keep their own weight scales: FP8's may differ, as engines allow. A global scale of NVFP4 may not:
engines use the largest divisor for all modules and only warn. The scale of the inputs may not either: there is one
input. Both are errors by name.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.runtime.activations import activation_for
from amaxbridge.export.runtime.layer_parameters import (
    Partition,
    check_loaded,
    create_parameters,
    module_parts,
    replace_parameter,
    shared,
)
from amaxbridge.export.schemes import Scheme, scheme_of
from amaxbridge.export.schemes.signature import Signature, UnsupportedQuantizationError
from amaxbridge.mappings.tensors import TensorSpec


class FloatScheme:
    """A layer of one floating-point format.

    Raises:
        UnsupportedQuantizationError: the signature's weights or inputs are of none.
    """

    def __init__(self, signature: Signature) -> None:
        self._inputs = activation_for(signature)
        self._scheme = _scheme_of_weights(signature)

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
        """Registers what the checkpoint has for each module.

        Raises:
            ValueError: the format does not divide into these sizes.
        """
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size)
        partition = Partition.of(*sizes, extra_weight_attrs)
        self._check_blocks(partition)
        specs = []
        for weight in partition.weight_specs(params_dtype):
            tensors = self._scheme.weight_specs(weight, Arithmetic.MODELOPT)
            if self._inputs is not None and self._inputs.scale:
                tensors[self._inputs.scale] = TensorSpec((1,), torch.float32)
            specs.append(tensors)
        create_parameters(layer, specs, partition, extra_weight_attrs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Checks that all is there, and that merged modules agree where one GEMM needs them to; keeps one input scale.

        Raises:
            CheckpointError: something was not loaded, or scales differ.
        """
        check_loaded(layer)
        scale = self._scheme.group_scale
        if scale is not None and scale.is_divisor:
            shared(layer, scale.tensor)
        if self._inputs is not None and self._inputs.scale:
            replace_parameter(layer, self._inputs.scale, shared(layer, self._inputs.scale))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[*, in]` → `[*, out]`, all modules one after another, in the dtype of `x`."""
        if self._inputs is not None:
            x = self._inputs.of(layer, x)
        return linear(x, self.weight(layer).to(x.dtype), bias)

    def weight(self, layer: nn.Module) -> Tensor:
        """The weight `[out, in]`, dequantized to bf16."""
        return torch.cat([self._scheme.dequantize(part) for part in module_parts(layer)])

    def _check_blocks(self, partition: Partition) -> None:
        """A square block may be cut short at the end of a whole weight only."""
        height = self._scheme.blocks.height
        if not height or height == 1:
            return
        ends = partition.rows if partition.cuts_rows else partition.rows[:-1]
        width = partition.columns if partition.columns != partition.all_columns else 0
        if width % height or any(rows % height for rows in ends):
            raise ValueError(
                f"blocks of {height} do not divide outputs {list(partition.rows)} and inputs {partition.columns} of "
                f"rank {partition.tp_rank} of {partition.tp_size}: use fewer ranks"
            )


def _scheme_of_weights(signature: Signature) -> Scheme:
    """A scheme with these weights; its inputs may be others."""
    found = scheme_of(signature, weights_only=True)
    if found is None:
        raise UnsupportedQuantizationError(
            f"{signature}: these weights are not supported; supported, static and symmetric: float4 by tensor_group of "
            "16 (NVFP4), float4 or float8 by group of 32 (MX), float8 by tensor, by channel and by block of [128, 128]"
        )
    return found
