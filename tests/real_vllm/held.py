"""What vLLM's model holds of a checkpoint, in the checkpoint's own names and shapes. Runs in vLLM's environment.

vLLM fuses q, k and v, gate and up, and all experts of a layer, and holds a rank's part of each. `held_tensors` takes
that apart again, parameter by parameter; `part_of` cuts the checkpoint's tensor as the rank should have it.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils.mxfp8_utils import dequant_mxfp8_to_bf16
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import break_fp4_bytes, dequantize_to_dtype
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    scaled_dequantize,
    unpack_quantized_values_into_int32,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.scalar_type import scalar_types

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EXPERTS = {"w13_": ("gate_proj", "up_proj"), "w2_": ("down_proj",)}
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")


def fill_with_nan(model: nn.Module) -> None:
    """Where a tensor is not loaded, floats are NaN and integers -1 (E8M0's NaN)."""
    for parameter in model.parameters():
        value = float("nan") if parameter.is_floating_point() else torch.iinfo(parameter.dtype).max
        parameter.data.copy_(torch.full(parameter.shape, value, dtype=torch.float32).to(parameter.dtype))


def shards_of(name: str) -> tuple[str, ...]:
    """Hugging Face's modules in the order of a fused layer's rows."""
    parent, last = name.rsplit(".", 1)
    return tuple(f"{parent}.{shard}" for shard in FUSED.get(last, (last,)))


def widths_of(layer: nn.Module) -> list[int]:
    """Rows of each logical shard of a linear layer, on this rank."""
    return list(getattr(layer, "logical_widths", None) or getattr(layer, "output_partition_sizes", None) or [1])


def rows_of(layer: nn.Module, shard: int, size: int) -> slice:
    """A shard's rows where the parameter has `size` of them: all, or one for eight or 128."""
    widths = widths_of(layer)
    return slice(sum(widths[:shard]) * size // sum(widths), sum(widths[: shard + 1]) * size // sum(widths))


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint's name → what is held of it, for every parameter."""
    seen = set[str]()
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            found = _of_experts(name.rsplit(".experts", 1)[0] + ".experts", module)
        elif isinstance(module, LinearBase):
            found = _of_linear(name, module)
        elif isinstance(module, VocabParallelEmbedding):
            indices = module.shard_indices
            rows = indices.org_vocab_end_index - indices.org_vocab_start_index
            found = iter([(f"{name}.weight", module.weight[:rows])])
        else:
            found = ((f"{name}.{own}", value) for own, value in module.named_parameters(recurse=False))
        for held, tensor in found:
            if held not in seen:
                seen.add(held)
                yield held, tensor.detach()


def _of_linear(name: str, layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    shards = shards_of(name)
    for own, parameter in layer.named_parameters(recurse=False):
        for number, shard in enumerate(shards):
            if own == "weight_shape":  # of the last shard that was loaded
                continue
            if parameter.ndim < 2:
                value = parameter[number : number + 1] if parameter.numel() == len(shards) else parameter
            else:
                value = parameter[rows_of(layer, number, len(parameter))]
            yield f"{shard}.{own}", value


def _of_experts(prefix: str, layer: RoutedExperts) -> Iterator[tuple[str, Tensor]]:
    for own, parameter in layer.named_parameters(recurse=False):
        kind = next((kind for kind in EXPERTS if own.startswith(kind)), None)
        if kind is None or own.endswith(("weight_shape", "g_idx", "sort_indices")):
            continue
        suffix, shards = own.removeprefix(kind), EXPERTS[kind]
        for expert, held in enumerate(parameter):
            for number, shard in enumerate(shards):
                value = held.reshape(-1) if held.ndim < 2 else held
                count = len(value) // len(shards) if len(value) > 1 else 1
                yield (
                    f"{prefix}.{expert}.{shard}.{suffix}",
                    value[number * count : number * count + count] if len(value) > 1 else value,
                )


def part_of(name: str, tensor: Tensor, rank: int, size: int, model: nn.Module) -> Tensor:
    """What a tensor-parallel rank should hold of a checkpoint's tensor."""
    module = name.rsplit(".", 1)[0]
    if module.endswith(("embed_tokens", "lm_head")):
        indices = model.get_submodule(module).shard_indices
        return tensor[indices.org_vocab_start_index : indices.org_vocab_end_index]
    dim = 0 if module.endswith(COLUMN_PARALLEL) else 1
    whole = size == 1 or tensor.ndim < 2 or tensor.shape[dim] == 1
    if whole or not module.endswith((*COLUMN_PARALLEL, *ROW_PARALLEL)):
        return tensor
    return tensor.chunk(size, dim)[rank]


def dequantized(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight in fp32 by vLLM's own reference functions."""
    of = {name.rsplit(".", 1)[1]: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[0] == module}
    scale = of["weight_scale"]
    if "weight_global_scale" in of:
        return dequantize_to_dtype(
            of["weight_packed"], scale, 1 / of["weight_global_scale"], torch.float32, 16, swizzle=False
        )
    if "weight_packed" not in of and scale.dtype == torch.uint8:
        return dequant_mxfp8_to_bf16(of["weight"], scale).float()
    if "weight_packed" not in of:
        return scaled_dequantize(of["weight"], scale)
    if scale.dtype == torch.uint8:
        return scaled_dequantize(break_fp4_bytes(of["weight_packed"], torch.float32), torch.exp2(scale.float() - 127))
    codes = unpack_quantized_values_into_int32(of["weight_packed"], scalar_types.uint4, packed_dim=1)
    zeros = torch.tensor(8)
    if "weight_zero_point" in of:
        zeros = unpack_quantized_values_into_int32(of["weight_zero_point"], scalar_types.uint4, packed_dim=0)
        zeros = zeros.repeat_interleave(codes.shape[1] // zeros.shape[1], 1)
    return scaled_dequantize(codes - zeros, scale)


def computed(layer: nn.Module, shard: int) -> Tensor:
    """The weight `[out, in]` that a quantized linear layer multiplies with, whatever its kernel made of it.

    Its inputs are one column at a time, of a size that the quantizer of the input leaves as it is.
    """
    size = torch.tensor(1.0)
    if getattr(layer, "input_global_scale_inv", None) is not None:
        size = 6.0 / layer.input_global_scale_inv.float()
    elif getattr(layer, "input_scale", None) is not None:
        size = 448.0 * layer.input_scale.float().max()
    columns = layer.input_size_per_partition
    dtype = next((p.dtype for p in layer.parameters() if p.dtype == torch.bfloat16), torch.get_default_dtype())
    inputs = (torch.eye(columns) * size).to(dtype)
    output = layer.quant_method.apply(layer, inputs).float() / size
    return output.T[rows_of(layer, shard, output.shape[1])]
