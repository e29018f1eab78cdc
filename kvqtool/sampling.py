"""Choose the next token from logits, on the device they are on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# Stands for a token where logits hold NaN or infinity: the host sees it when it reads the token.
BROKEN: Final = -1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token; higher flattens the distribution.
        top_p: least share of probability, likeliest tokens first, that is drawn from.
        top_k: likeliest tokens that are drawn from; 0 for all.
        seed: of the numbers that draw.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def draws(self, batch: int, device: torch.device) -> Tensor:
        """Return a number in [0, 1) for each token to come, (max_new_tokens, batch) float32.

        They are drawn on the CPU, so that a seed means the same ones on every device.
        """
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(self.max_new_tokens, batch, generator=generator).to(device)


def choose_tokens(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """Choose each sequence's next token without waiting for the device.

    Args:
        logits: (batch, vocabulary) float32.
        sampling: temperature 0 takes the likeliest; else top-k, then top-p, then a draw: tokens lie
            side by side by probability, the likeliest first, and `draws` says where to point.
        draws: (batch,) float32 in [0, 1).

    Returns:
        (batch,) int64, BROKEN where a sequence's logits are not all finite.
    """
    is_finite = torch.isfinite(logits).all(-1)
    if sampling.temperature == 0:
        return torch.where(is_finite, logits.argmax(-1), BROKEN)
    scaled = logits.float() / sampling.temperature
    if sampling.top_k:
        least = scaled.topk(min(sampling.top_k, scaled.shape[-1])).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    probabilities, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= sampling.top_p) & (before > 0), 0.0)
    reached = probabilities.cumsum(-1)
    picked = torch.searchsorted(reached, draws[:, None] * reached[:, -1:], right=True)
    picked = torch.minimum(picked, (probabilities > 0).sum(-1, keepdim=True) - 1)
    return torch.where(is_finite, order.gather(-1, picked.clamp(min=0))[:, 0], BROKEN)
