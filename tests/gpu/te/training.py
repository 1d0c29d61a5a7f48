"""Some steps of training, the same wherever they run: fixed tokens, and no optimizer that would need a state."""

from typing import Any

import modelopt.torch.quantization as mtq
import torch
from cases import VOCABULARY
from transformer_engine.pytorch import QuantizedTensor

ITERATION = 5
"""Steps of training before the checkpoint."""
LOGITS = 4
"""Positions whose logits are kept, the last ones of the tokens evaluated."""
BLOCK = 128


def quantize(model: Any, *, cache: bool) -> None:
    """NVFP4 quantizers of ModelOpt, calibrated; FP8 ones of the key-value cache too, where it is asked for."""
    presets = [mtq.NVFP4_DEFAULT_CFG, *([mtq.FP8_KV_CFG] if cache else [])]
    config = {"quant_cfg": [each for preset in presets for each in preset["quant_cfg"]], "algorithm": "max"}

    def calibrate(model: Any) -> None:
        with torch.no_grad():
            for step in range(2):
                tokens, labels = tokens_of_step(step)
                model(tokens, positions(tokens), None, labels=labels)

    mtq.quantize(model, config, calibrate)


def tokens_of_step(step: int) -> tuple[Any, Any]:
    """Tokens and labels, the same on all ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    data = torch.randint(0, VOCABULARY, (2, 65), generator=generator)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return data[:, :-1].contiguous().to(device), data[:, 1:].contiguous().to(device)


def positions(tokens: Any) -> Any:
    return torch.arange(tokens.shape[1], device=tokens.device)[None].expand_as(tokens)


def train_step(model: Any, batch: tuple[Any, Any], rate: float = 0.01) -> None:
    """Every parameter moves by `rate` against the sign of its gradient, and is rounded, so that files pack well."""
    tokens, labels = batch
    model.train()
    model.set_is_first_microbatch()  # Transformer Engine keeps FP8 copies of bf16 parameters until it hears this
    model(tokens, positions(tokens), None, labels=labels).mean().backward()
    bits = 1 if model.config.fp8_recipe == "blockwise" else 2  # models with blocks of 128 are larger
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is None:
                continue
            if is_replicated(model.config, parameter):
                torch.distributed.all_reduce(parameter.grad)
            parameter.copy_(rounded(high_precision(parameter) - rate * parameter.grad.sign(), bits))
            parameter.grad = None


def vary_blocks(model: Any) -> None:
    """Makes each block of 128×128 of another magnitude than its neighbours, so that their scales differ."""
    rank = torch.distributed.get_rank()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if is_fp8(parameter):
                rows, columns = (torch.arange(size, device=parameter.device) // BLOCK for size in parameter.shape)
                exponent = (number + 3 * rank + rows[:, None] + 2 * columns) % 4
                parameter.copy_(high_precision(parameter) * torch.exp2(-exponent).to(parameter.dtype))


def is_replicated(config: Any, parameter: Any) -> bool:
    """True if all ranks hold the same parameter."""
    if config.tensor_model_parallel_size > 1:
        return not getattr(parameter, "tensor_model_parallel", False)
    return config.expert_model_parallel_size > 1 and getattr(parameter, "allreduce", True)


def high_precision(parameter: Any) -> Any:
    """A parameter as numbers; FP8 parameters are dequantized by Transformer Engine."""
    return parameter.dequantize() if is_fp8(parameter) else parameter.detach()


def is_fp8(parameter: Any) -> bool:
    return isinstance(parameter, QuantizedTensor)


def rounded(tensor: Any, mantissa: int) -> Any:
    """A tensor rounded to a number of bits after the leading one."""
    integers, bits = (torch.int16, 7) if tensor.dtype == torch.bfloat16 else (torch.int32, 23)
    dropped = bits - mantissa
    return ((tensor.view(integers) + (1 << (dropped - 1))) & -(1 << dropped)).view(tensor.dtype)


def evaluate(model: Any) -> list[list[float]]:
    """Logits of the last `LOGITS` of 32 tokens, `[LOGITS, vocabulary]`."""
    tokens = tokens_of_step(ITERATION)[0][:1, :32]
    model.eval()
    model.set_is_first_microbatch()
    with torch.no_grad():
        logits = model(tokens, positions(tokens), None, runtime_gather_output=True)
    return [[float(f"{value:.9g}") for value in row] for row in logits[0, -LOGITS:, :VOCABULARY].float().tolist()]


def difference(found: list[list[float]], expected: list[list[float]]) -> float:
    """The relative norm of the difference between logits."""
    one, other = torch.tensor(found), torch.tensor(expected)
    return float((one - other).norm() / other.norm())
