"""vLLM alone: 4-bit experts of which a rank has as many outputs of gate and up as a group has columns.

    python one_group.py

Runs in vLLM's environment, on a GPU. `_process_weights_marlin` (fused_moe/oracle/int_wna16.py of vLLM 0.26 to 0.33)
passes w13's outputs, `intermediate_size_per_partition`, to `marlin_moe_permute_scales` as `size_k`, which is w13's
inputs, the hidden size. For `group_size < size_k` the scales get the layout of several groups, else that of one. The
kernel goes by the number of groups that it is given. Prints the relative error of the experts' output for both sizes.
"""

import torch
import vllm._custom_ops as ops
from torch import Tensor
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_moe_permute_scales
from vllm.scalar_type import scalar_types

EXPERTS, TOP, TOKENS, BITS = 8, 2, 64, 4


def main() -> None:
    print("| hidden | outputs | group | size_k = outputs (vLLM) | size_k = hidden |\n|---:|---:|---:|---:|---:|")
    for hidden, outputs, group in ((512, 128, 128), (512, 256, 128), (512, 128, 64), (512, 64, 64), (128, 256, 128)):
        errors = [error(hidden, outputs, group, size_k) for size_k in (outputs, hidden)]
        print(f"| {hidden} | {outputs} | {group} | {errors[0]:.4f} | {errors[1]:.4f} |", flush=True)


def error(hidden: int, outputs: int, group: int, size_k: int) -> float:
    """Relative error of vLLM's fused experts against the dequantized ones, w13's scales laid out for `size_k`."""
    torch.manual_seed(0)
    gate_up, gate_up_scale, whole_gate_up = experts(hidden, 2 * outputs, group)
    down, down_scale, whole_down = experts(outputs, hidden, group)
    inputs = torch.randn(TOKENS, hidden, device="cuda", dtype=torch.bfloat16)
    weights, chosen = torch.randn(TOKENS, EXPERTS, device="cuda").softmax(-1).topk(TOP)
    out = fused_marlin_moe(
        inputs,
        repacked(gate_up),
        repacked(down),
        None,
        None,
        marlin_moe_permute_scales(gate_up_scale, size_k, 2 * outputs, group),
        marlin_moe_permute_scales(down_scale, outputs, hidden, group),
        weights,
        chosen.int(),
        quant_type_id=scalar_types.uint4b8.id,
    ).float()
    expected = torch.zeros_like(out)
    for expert in range(EXPERTS):
        gate, up = (inputs.float() @ whole_gate_up[expert]).chunk(2, dim=-1)
        share = (weights * (chosen == expert)).sum(-1, keepdim=True)
        expected += share * (torch.nn.functional.silu(gate) * up @ whole_down[expert])
    return float((out - expected).norm() / expected.norm())


def experts(inputs: int, outputs: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes `[experts, in/8, out]`, scales `[experts, in/group, out]`, and the weights `[experts, in, out]`."""
    codes = torch.randint(0, 16, (EXPERTS, inputs, outputs), device="cuda")
    scale = (torch.rand(EXPERTS, inputs // group, outputs, device="cuda") + 0.1).bfloat16() * 0.01
    shifts = torch.arange(0, 32, BITS, device="cuda")[:, None]
    packed = (codes.unflatten(1, (-1, 32 // BITS)) << shifts).sum(2).to(torch.int32)
    return packed, scale, (codes - 8) * scale.float().repeat_interleave(group, 1)


def repacked(packed: Tensor) -> Tensor:
    unsorted = torch.empty(EXPERTS, 0, dtype=torch.int32, device="cuda")
    return ops.gptq_marlin_moe_repack(packed, unsorted, packed.shape[1] * 32 // BITS, packed.shape[2], BITS)


if __name__ == "__main__":
    main()
