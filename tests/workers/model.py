"""The forward pass of the workers: fixed tokens through a Megatron model."""

from typing import Any

import torch

SEQUENCE, VOCABULARY = 32, 131
TOKENS = torch.randint(0, VOCABULARY, (4, SEQUENCE), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def forward(model: Any) -> torch.Tensor:
    """fp32 logits of the tokens, without the padded vocabulary; leaves the model in bf16. For one pipeline stage."""
    positions = torch.arange(SEQUENCE)[None].expand(4, -1)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    logits: torch.Tensor = model.eval().float()(TOKENS, positions, mask, runtime_gather_output=True)
    model.bfloat16()
    return logits[..., :VOCABULARY]
