"""What a search may spend, and what it found schemes to cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from kvqtool.allocate import Specs

# A limit on loss is aimed at with this much to spare, for text that was not measured.
MARGIN: Final = 0.35


@dataclass(frozen=True)
class Budget:
    """What may be spent: one of the three limits.

    Args:
        target_bits: effective bits a number, never exceeded at the context.
        max_kld: mean Kullback-Leibler divergence, nats.
        max_ppl_ratio: perplexity over the exact one.
        at_context: tokens that bits are counted at.
    """

    target_bits: float | None = None
    max_kld: float | None = None
    max_ppl_ratio: float | None = None
    at_context: int = 8192


@dataclass(frozen=True)
class Trial:
    """One scheme that was measured on the held-out windows."""

    kind: str
    bits: float
    kld_mean: float
    ppl_ratio: float
    ppl_ratio_stderr: float | None
    specs: Specs

    def excess(self, budget: Budget) -> float:
        """Return by how much the loss exceeds a limit on it, margin included; 0 or less keeps it.

        A perplexity ratio counts as no less than exp(KLD), what it is on text that the model
        itself might have written: on a few windows it can fall below 1 by luck.
        """
        if budget.max_kld is not None:
            return self.kld_mean - (1 - MARGIN) * budget.max_kld
        assert budget.max_ppl_ratio is not None
        limit = 1 + (1 - MARGIN) * (budget.max_ppl_ratio - 1)
        ratio = self.ppl_ratio + 2 * (self.ppl_ratio_stderr or 0.0)
        return max(ratio, math.exp(self.kld_mean)) - limit
