"""Layers with 8-bit integer weights and inputs, `int-quantized`: an exact integer product, then the scales.

    weight        int8  [out, in]
    weight_scale        [out, 1], or [1] for the tensor
    y = (codes of x @ codes of the weight) * scale of the token * scale of the row

Every token gets a scale of its own at run time. The product is `torch._int_mm` on a CPU and a Triton kernel on a GPU.
After loading, the weight is transposed to `[in, out]`, as both need it, and every output has a scale, `[out]`.
"""

import torch
from torch import Tensor, nn

from amaxbridge.export.runtime.activations import quantize_int8
from amaxbridge.export.runtime.layer_parameters import (
    Partition,
    check_loaded,
    create_parameters,
    data_of,
    module_parts,
    replace_parameter,
)
from amaxbridge.export.schemes.signature import UnsupportedQuantizationError
from amaxbridge.mappings.tensors import TensorSpec


class CompressedTensorsW8A8Int8Scheme:
    """8-bit weights with a scale for each row or one for all, and inputs with a scale for each token.

    Raises:
        UnsupportedQuantizationError: the weights do not have 8 bits.
    """

    def __init__(self, *, weight_bits: int, has_row_scales: bool = True) -> None:
        if weight_bits != 8:
            raise UnsupportedQuantizationError(
                f"integer weights of {weight_bits} bits with integer inputs; 8 is supported"
            )
        self.weight_bits = weight_bits
        self._has_row_scales = has_row_scales

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
        """Registers the parameters of each module. Scales are fp32, whatever `params_dtype` is."""
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size)
        partition = Partition.of(*sizes, extra_weight_attrs)
        specs = []
        for weight in partition.weight_specs(torch.int8):
            scales = (weight.shape[0], 1) if self._has_row_scales else (1,)
            specs.append({"weight": weight, "weight_scale": TensorSpec(scales, torch.float32)})
        create_parameters(layer, specs, partition, extra_weight_attrs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Transposes the weight and gives every output its scale.

        Raises:
            CheckpointError: a tensor was not loaded.
        """
        check_loaded(layer)
        scales = [part["weight_scale"].flatten().expand(len(part["weight"])) for part in module_parts(layer)]
        replace_parameter(layer, "weight_scale", torch.cat(scales))
        replace_parameter(layer, "weight", data_of(layer, "weight").T)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[*, in]` → `[*, out]`, the outputs of all modules in order, in the dtype of `x`."""
        weight, weight_scale = data_of(layer, "weight"), data_of(layer, "weight_scale")
        codes, scale = quantize_int8(x.reshape(-1, x.shape[-1]))
        if x.is_cuda:
            from amaxbridge.export.runtime import triton_kernels  # Triton comes with the CUDA builds of torch

            out = triton_kernels.int8_matmul(codes, weight, scale, weight_scale, x.dtype)
        else:
            out = (torch._int_mm(codes, weight) * scale * weight_scale).to(x.dtype)
        out = out.reshape(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    def weight(self, layer: nn.Module) -> Tensor:
        """The weight `[out, in]`, dequantized in fp32 and cast to bf16."""
        return (data_of(layer, "weight").T * data_of(layer, "weight_scale").unsqueeze(1)).bfloat16()
