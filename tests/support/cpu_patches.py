"""What `without_cuda` replaces in torch, Megatron and ModelOpt."""

import torch
from megatron.core.fusions import fused_softmax
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.nn.modules import tensor_quantizer

ON_A_CPU = [
    (torch.cuda, "current_device"),
    (torch.cuda, "synchronize"),
    (torch.Tensor, "cuda"),
    (fused_softmax, "get_sliding_window_causal_mask"),
    (tensor_quant, "dynamic_block_quantize_op"),
    (tensor_quantizer, "static_blockwise_fp4_fake_quant"),
]
if hasattr(tensor_quantizer, "fp4_cast_ste"):  # not in ModelOpt 0.44
    ON_A_CPU.append((tensor_quantizer, "fp4_cast_ste"))
