"""The demo's measurements on the exported checkpoints, and their bounds.

Why these bounds? Both sides have the same weights (but for the last bit of one bf16 tensor in fifty, where the
reciprocal in `weight_global_scale` is not exact) and round activations to NVFP4 by the same rule. Only the order of
sums differs. That alone gives the unquantized model an error near 1e-6 with fp32 activations. In the quantized model a
last-bit difference can push an activation over an edge of its 4-bit grid, which is a whole step: the error of the
result is about the square root of the difference. So logits are compared with fp32 activations, and their error must
stay well below the change that
quantization itself makes: a wrong global scale, swapped halves or unquantized inputs all give errors of that size.
Perplexity, a mean over 8,192 bytes, is compared in bf16, as people run the model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amaxbridge.mappings.errors import AmaxbridgeError, listing
from amaxbridge.mappings.fused_groups import groups_among

MAX_PERPLEXITY_DIFFERENCE = 0.005
MAX_SHARE_OF_QUANTIZATION_ERROR = 0.25


@dataclass(frozen=True, slots=True)
class Findings:
    """The exported checkpoints compared with Megatron's own forward.

    Errors of logits are relative: the norm of the difference over the norm of the reference.
    """

    megatron_perplexity: float
    perplexity: float
    plain_error: float
    nvfp4_error: float
    quantization_error: float
    key_problems: list[str]
    unshared_scales: list[str]


def compare(output: Path) -> Findings:
    """Loads both exported checkpoints in transformers and compares them with the logits that Megatron left."""
    from safetensors.torch import load_file

    reference = {name: torch.load(output / f"logits_{name}.pt") for name in ("none", "nvfp4")}
    perplexity, nvfp4_logits, problems = _run(output / "nvfp4", reference["nvfp4"]["input_ids"])
    _, plain_logits, plain_problems = _run(output / "none", reference["none"]["input_ids"])
    return Findings(
        megatron_perplexity=json.loads((output / "results.json").read_text())["perplexity"]["nvfp4_qat"],
        perplexity=perplexity,
        plain_error=_relative(plain_logits, reference["none"]["logits"]),
        nvfp4_error=_relative(nvfp4_logits, reference["nvfp4"]["logits"]),
        quantization_error=_relative(reference["nvfp4"]["logits"], reference["none"]["logits"]),
        key_problems=problems + plain_problems,
        unshared_scales=_unshared_scales(load_file(output / "nvfp4" / "model.safetensors")),
    )


def check(findings: Findings) -> None:
    """Raises AmaxbridgeError, with every reason, if a finding is out of bounds."""
    difference = abs(findings.perplexity / findings.megatron_perplexity - 1)
    share = findings.nvfp4_error / findings.quantization_error
    reasons = [
        *(f"transformers: {problem}" for problem in findings.key_problems),
        *(f"fused group with different scales: {name}" for name in findings.unshared_scales),
    ]
    if difference > MAX_PERPLEXITY_DIFFERENCE:
        reasons.append(f"perplexity differs by {difference:.2%}, more than {MAX_PERPLEXITY_DIFFERENCE:.1%}")
    if share > MAX_SHARE_OF_QUANTIZATION_ERROR:
        reasons.append(f"logits err by {share:.0%} of what quantization changes: a scale must be wrong")
    if reasons:
        raise AmaxbridgeError(f"the exported checkpoint is not the trained model:{listing(reasons)}")


@torch.no_grad()
def _run(directory: Path, input_ids: Tensor) -> tuple[float, Tensor, list[str]]:
    """Held-back perplexity in bf16, fp32 logits of `input_ids`, and the keys that did not fit."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from amaxbridge.scripts.demo_text import held_back_windows

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    windows = held_back_windows()
    logits = torch.cat([_logits(model, batch[:, :-1]) for batch in windows.split(8)])
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
    problems = [f"{kind}: {', '.join(map(str, keys))}" for kind, keys in loading.items() if keys]
    torch.nn.Module.float(model)  # the weights keep their bf16 values; transformers' own `float` refuses
    return losses.exp().item(), _logits(model, input_ids), problems


def _logits(model: Any, input_ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids).logits
    return logits


def _relative(found: Tensor, reference: Tensor) -> float:
    return float((found.float() - reference.float()).norm() / reference.float().norm())


def _unshared_scales(tensors: dict[str, Tensor]) -> list[str]:
    """The number of fused groups with different global scales."""
    return [
        f"{', '.join(group.members)}: {kind}"
        for kind in ("weight_global_scale", "input_global_scale")
        for group in groups_among(name.removesuffix(f".{kind}") for name in tensors if name.endswith(f".{kind}"))
        if len({tensors[f"{member}.{kind}"].item() for member in group.members}) > 1
    ]
