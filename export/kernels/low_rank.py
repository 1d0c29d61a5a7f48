"""Merging an adapter into a weight: LoRA and DoRA, to the bit as PEFT's `merge_and_unload` does it in fp32.

    LoRA   W + (B · A) · scale
    DoRA   (lengths / |W + (B · A) · scale| of each row) · (W + (B · A) · scale)

Everything is computed in fp32 and rounded once, to the dtype of W. It is computed on the CPU: a GPU may multiply in
TF32 and adds up in another order, and a live model must give the bits that its checkpoint gives.

Source: peft.tuners.lora, 0.21 (`Linear.get_delta_weight`, `DoraLinearVariant.merge_unsafe`).
"""

import torch
from torch import Tensor


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, lengths: Tensor | None = None) -> Tensor:
    """A weight with its adapter, in the weight's dtype and on its device.

    Args:
        weight: `[out, in]`.
        a: `[rank, in]`.
        b: `[out, rank]`.
        scale: what the product is multiplied by: alpha / rank.
        lengths: the lengths of the rows that DoRA learned, `[out]`; None for LoRA.
    """
    base = _on_cpu(weight)
    total = base + (_on_cpu(b) @ _on_cpu(a)) * scale
    if lengths is not None:
        total = (_on_cpu(lengths) / torch.linalg.norm(total, dim=1)).view(-1, 1) * total
    return total.to(weight.dtype).to(weight.device)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()  # sums depend on strides
