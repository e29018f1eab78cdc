"""A host copy of packed values, from which their bits can rise again (QAQ, `-shadow`).

Keys have no copy: their tolerance grows with the number of tokens, so that they never need more
bits than they were given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvqtool.memory import PAGE_TOKENS


class Shadow:
    """The last packed tokens' values as they were encoded, and the width of their ranges, in host
    memory with room for whole pages.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.tokens = 0
        self._held: tuple[Tensor, Tensor] | None = None

    def append(self, rows: Tensor, spread: Tensor) -> None:
        """Copy tokens that are packed now.

        Args:
            rows: (tokens, batch, units, channels) of what is encoded.
            spread: (tokens, batch, units) float32.
        """
        fresh, end = (rows, spread), self.tokens + len(rows)
        if self._held is None or len(self._held[0]) < end:
            room = -(-end // PAGE_TOKENS) * PAGE_TOKENS
            grown = tuple(part.new_empty(room, *part.shape[1:], device="cpu") for part in fresh)
            for part, old in zip(grown, self.parts if self.tokens else (), strict=False):
                part[: self.tokens] = old
            self._held = grown[0], grown[1]
        for part, new in zip(self._held, fresh, strict=True):
            part[self.tokens : end] = new
        self.tokens = end

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Rows and spreads of the tokens held, without spare room."""
        if self._held is None:
            return torch.empty(0), torch.empty(0)
        return self._held[0][: self.tokens], self._held[1][: self.tokens]

    def truncate(self, tokens: int) -> None:
        """Forget the last `tokens` tokens."""
        self.tokens = max(self.tokens - tokens, 0)

    def keep(self, tokens: int) -> None:
        """Forget all but the last `tokens` tokens, and their room."""
        if tokens < self.tokens:
            rows, spread = self.parts
            first, self.tokens = self.tokens - tokens, 0
            self._held = None
            self.append(rows[first:], spread[first:])

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences."""
        if self._held is not None:
            chosen = sequences.cpu()
            self._held = self._held[0][:, chosen], self._held[1][:, chosen]

    @property
    def nbytes(self) -> int:
        """Bytes allocated in host memory."""
        return sum(part.numel() * part.element_size() for part in self._held or ())
