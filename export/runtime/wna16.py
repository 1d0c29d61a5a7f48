"""Layers with packed integers of 4 or 8 bits, `pack-quantized`; inputs in 16 bits, or rounded as they come.

    weight_packed      int32  [out, in / per word]       codes plus 8 (128), the first input in the low bits
    weight_scale              [out, in / group_size]     [out, 1] with one scale for all inputs
    weight_shape       int64  [2]                        [out, in] of the whole module
    weight_zero_point  int32  [out / per word, groups]   asymmetric; packed over outputs
    weight_g_idx       int32  [in]                       act-order "group": the group of each input

After loading, a layer whose sizes Marlin supports has weights and scales in Marlin's layout, as in an engine; on a GPU
a Triton kernel reads that. Other sizes (layers of tiny models) keep the stored layout and compute the same. On a CPU,
and for 8 bits, a weight is unpacked and dequantized at every call.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from amaxbridge.export.kernels import scaled
from amaxbridge.export.kernels.scaled import Blocks, ScaledWeight
from amaxbridge.export.runtime import marlin
from amaxbridge.export.runtime.activations import Activation
from amaxbridge.export.runtime.layer_parameters import (
    Partition,
    check_loaded,
    create_parameters,
    data_of,
    module_parts,
    replace_parameter,
    shared,
)
from amaxbridge.export.schemes.signature import UnsupportedQuantizationError
from amaxbridge.mappings.errors import CheckpointError
from amaxbridge.mappings.tensors import TensorSpec

_LAYOUT = "wna16_layout"  # attribute of a layer


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a layer holds its weight `[size_n, size_k]`. Under act-order it has the scales of all `scaled_k` inputs."""

    size_k: int
    size_n: int
    scaled_k: int
    is_marlin: bool = False


def _layout(layer: nn.Module) -> _Layout:
    found: _Layout = layer.__dict__[_LAYOUT]
    return found


class CompressedTensorsWNA16Scheme:
    """Weights of `weight_bits` bits in groups of `group_size` inputs; -1 or None for one group.

    Args:
        inputs: how inputs are rounded, without a static scale; None leaves them in 16 bits.

    Raises:
        UnsupportedQuantizationError: the number of bits, the order of inputs or their rounding is not supported.
    """

    def __init__(
        self,
        *,
        weight_bits: int,
        group_size: int | None,
        symmetric: bool,
        actorder: str | None,
        inputs: Activation | None = None,
    ) -> None:
        if inputs is not None and inputs.scale is not None:
            raise UnsupportedQuantizationError("packed integers with a static input scale are not supported")
        self._inputs = inputs
        if weight_bits not in (4, 8):
            raise UnsupportedQuantizationError(f"packed integers of {weight_bits} bits are not supported; 4 and 8 are")
        if actorder not in (None, "weight", "group"):
            raise UnsupportedQuantizationError(f"actorder={actorder!r} is not supported; weight and group are")
        self.weight_bits = weight_bits
        self.group_size = -1 if group_size is None else group_size
        self.symmetric = symmetric
        self.actorder = actorder
        self.pack_factor = 32 // weight_bits
        self.quant_type = marlin.ScalarType(weight_bits, bias=1 << weight_bits - 1 if symmetric else 0)
        self.has_g_idx = actorder == "group" and self.group_size != -1

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
        """Registers the parameters of each module. Scales are fp32, whatever `params_dtype` is.

        Raises:
            ValueError: groups or words do not divide this rank's shard.
        """
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size)
        partition = Partition.of(*sizes, extra_weight_attrs)
        self._check(partition)
        scaled_k = input_size if self.has_g_idx else input_size_per_partition
        specs = [self._specs(rows, input_size_per_partition, scaled_k) for rows in output_partition_sizes]
        create_parameters(layer, specs, partition, extra_weight_attrs)
        layer.__dict__[_LAYOUT] = _Layout(input_size_per_partition, sum(output_partition_sizes), scaled_k)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Unpacks zero points, sorts inputs by group, and repacks into Marlin's layout where it fits.

        Raises:
            CheckpointError: a tensor was not loaded, or merged modules differ in the order of inputs.
        """
        check_loaded(layer)
        layout = _layout(layer)
        self._check_shapes(layer, layout)
        if not self.symmetric:
            replace_parameter(layer, "weight_zero_point", torch.cat([self._zero_point(p) for p in module_parts(layer)]))
        none = marlin.marlin_make_empty_g_idx(data_of(layer, "weight_packed").device)
        replace_parameter(layer, "weight_g_idx", shared(layer, "weight_g_idx") if self.has_g_idx else none)
        replace_parameter(layer, "g_idx_sort_indices", none)
        try:
            marlin.verify_marlin_supported(self.group_size)
            marlin.verify_marlin_supports_shape(layout.size_n, layout.size_k, layout.scaled_k, self.group_size)
        except ValueError:
            return
        self._repack(layer, layout)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[*, in]` → `[*, out]`, the outputs of all modules in order, in the dtype of `x`."""
        if self._inputs is not None:
            x = self._inputs.of(layer, x)
        if x.is_cuda and _layout(layer).is_marlin and self.weight_bits == 4:
            return self._apply_on_gpu(layer, x, bias)
        return linear(x, self.weight(layer, x.dtype), bias)

    def weight(self, layer: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight `[out, in]`, dequantized in fp32 and cast to `dtype`."""
        layout = _layout(layer)
        packed, scale = data_of(layer, "weight_packed"), data_of(layer, "weight_scale")
        groups, order = data_of(layer, "weight_g_idx"), data_of(layer, "g_idx_sort_indices")
        if layout.is_marlin:
            packed = marlin.marlin_unpack(packed, order, layout.size_k, layout.size_n, self.weight_bits).T
            scale = marlin.marlin_unpermute_scales(scale, layout.scaled_k, layout.size_n, self.group_size).T
        codes = scaled.unpack_codes(packed, layout.size_k, self.weight_bits)
        zero_point = None if self.symmetric else data_of(layer, "weight_zero_point")
        blocks = Blocks(width=None if self.group_size == -1 else self.group_size)
        if self.has_g_idx:  # a scale for each input
            columns = (groups[order.argsort()] if order.numel() else groups).long()
            scale = scale[:, columns]
            zero_point = zero_point if zero_point is None else zero_point[:, columns]
            blocks = Blocks(width=1)
        return scaled.dequantize(ScaledWeight(codes, scale, zero_point), blocks, dtype)

    def _repack(self, layer: nn.Module, layout: _Layout) -> None:
        if self.has_g_idx:
            groups, order = data_of(layer, "weight_g_idx").sort(stable=True)
            replace_parameter(layer, "weight_g_idx", groups)
            replace_parameter(layer, "g_idx_sort_indices", order.int())
        order = data_of(layer, "g_idx_sort_indices")
        packed, scale = data_of(layer, "weight_packed").T.contiguous(), data_of(layer, "weight_scale").T.contiguous()
        packed = marlin.marlin_repack(packed, order, layout.size_k, layout.size_n, self.weight_bits)
        scale = marlin.marlin_permute_scales(scale, layout.scaled_k, layout.size_n, self.group_size)
        replace_parameter(layer, "weight_packed", packed)
        replace_parameter(layer, "weight_scale", scale)
        layer.register_buffer("workspace", marlin.marlin_make_workspace(packed.device), persistent=False)
        layer.__dict__[_LAYOUT] = replace(layout, is_marlin=True)

    def _apply_on_gpu(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        from amaxbridge.export.runtime import triton_kernels  # Triton comes with the CUDA builds of torch

        rows = x.reshape(-1, x.shape[-1])
        if self.has_g_idx:
            rows = rows.index_select(1, data_of(layer, "g_idx_sort_indices"))
        out = triton_kernels.int4_matmul(
            rows,
            data_of(layer, "weight_packed"),
            data_of(layer, "weight_scale"),
            zero_points=None if self.symmetric else data_of(layer, "weight_zero_point"),
            groups=data_of(layer, "weight_g_idx") if self.has_g_idx else None,
            group_size=self.group_size,
            has_single_scale=not marlin.has_groups(_layout(layer).scaled_k, self.group_size),
        )
        out = out.reshape(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    def _zero_point(self, part: Mapping[str, Tensor]) -> Tensor:
        """The zero points int8 `[out, groups]` of one module."""
        packed, rows = part["weight_zero_point"], len(part["weight_scale"])
        return scaled.unpack_codes(packed.T, rows, self.weight_bits).T

    def _specs(self, rows: int, columns: int, scaled_k: int) -> dict[str, TensorSpec]:
        groups = 1 if self.group_size == -1 else scaled_k // self.group_size
        specs = {
            "weight_packed": TensorSpec((rows, math.ceil(columns / self.pack_factor)), torch.int32),
            "weight_scale": TensorSpec((rows, groups), torch.float32),
            "weight_shape": TensorSpec((2,), torch.int64),
        }
        if not self.symmetric:
            specs["weight_zero_point"] = TensorSpec((math.ceil(rows / self.pack_factor), groups), torch.int32)
        if self.has_g_idx:
            specs["weight_g_idx"] = TensorSpec((columns,), torch.int32)
        return specs

    def _check(self, partition: Partition) -> None:
        cut = partition.columns != partition.all_columns
        wanted = [("inputs", partition.columns, self.pack_factor if cut else 1)]
        if self.group_size != -1:
            columns = partition.all_columns if self.has_g_idx else partition.columns
            wanted.append(("inputs", columns, self.group_size))
        if not self.symmetric and (partition.cuts_rows or len(partition.rows) > 1):
            wanted += [("outputs", rows, self.pack_factor) for rows in partition.rows]
        wrong = [f"{name} = {size} does not divide by {divisor}" for name, size, divisor in wanted if size % divisor]
        if wrong:
            raise ValueError(
                f"packed integers of {self.weight_bits} bits in groups of {self.group_size}: {'; '.join(wrong)} "
                f"on rank {partition.tp_rank} of {partition.tp_size}"
            )

    def _check_shapes(self, layer: nn.Module, layout: _Layout) -> None:
        for part in module_parts(layer):
            whole, held = part["weight_shape"].tolist(), [len(part["weight_packed"]), layout.size_k]
            if whole[0] % held[0] or whole[1] % held[1]:
                raise CheckpointError(f"weight_shape is {whole}, which the layer's {held} does not divide")
        replace_parameter(layer, "weight_shape", torch.tensor([layout.size_n, layout.size_k]))
