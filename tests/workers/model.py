"""The forward pass of the workers: fixed tokens through a Megatron model."""

from typing import Any

import torch

SEQUENCE, VOCABULARY = 32, 131
TOKENS = torch.randint(0, VOCABULARY, (4, SEQUENCE), generator=torch.Generator().manual_seed(3))


def forward(model: Any) -> torch.Tensor:
    """fp32 logits of the tokens, without the padded vocabulary; leaves the model in bf16. For one pipeline stage."""
    logits: torch.Tensor = calibrate(model)
    model.bfloat16()
    return logits[..., :VOCABULARY]


@torch.no_grad()
def calibrate(model: Any) -> Any:
    """Shows the tokens to a model, and leaves it in fp32. Returns nothing where ModelOpt calibrates layer by layer."""
    positions = torch.arange(SEQUENCE)[None].expand(4, -1)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    return model.eval().float()(TOKENS, positions, mask, runtime_gather_output=True)
