"""Weighted histograms of normalised values: all that a codebook fit needs to know of a calibration
set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvqtool.ranks import Ranks

LAYER_BINS = 4096
CHANNEL_BINS = 1024


class LevelHistogram:
    """Counts, weights and sums of u in equal bins over [-1, 1], for one problem or one per channel.

    Args (of `update`) are rows of normalised states; the fit sees each bin as a point at its
    weighted mean.
    """

    def __init__(self, problems: int, bins: int, device: torch.device) -> None:
        """Start empty: `problems` separate histograms (1, or one per channel) of `bins` bins."""
        self.problems = problems
        self.bins = bins
        self._sums = torch.zeros(4, problems * bins, dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        """Where the counts are."""
        return self._sums.device

    def update(self, normalized: Tensor, weights: Tensor | None, kept: Tensor) -> None:
        """Add rows.

        Args:
            normalized: (rows, channels) float32 u.
            weights: (rows, channels) float32, or None to count every element once.
            kept: (rows, channels) bool; False for elements that are stored exactly and so need no
                level.
        """
        values = normalized.double().clamp(-1.0, 1.0)
        index = ((values + 1.0) * (self.bins / 2)).long().clamp_max(self.bins - 1)
        if self.problems > 1:
            index = index + torch.arange(normalized.shape[1], device=index.device) * self.bins
        count = kept.double()
        weight = count if weights is None else count * weights.double()
        # All four at once: on a GPU each deterministic sum begins by sorting its index.
        terms = torch.stack((weight, weight * values, count, count * values))
        rows = torch.arange(4, device=index.device)[:, None] * self._sums.shape[1]
        self._sums.view(-1).scatter_add_(0, (index.flatten() + rows).flatten(), terms.flatten())

    def merge(self, ranks: Ranks) -> None:
        """Replace the sums by those over all processes.

        They are sums of the same terms in another order: a bin of n elements has a mass, and a
        moment relative to its mass, within n * 2**-53 of what one process finds; counts are exact.
        """
        self._sums = ranks.reduce(self._sums)

    def state(self) -> dict[str, Tensor]:
        """Return all that was counted, for `from_state`."""
        return {"sums": self._sums.view(4, self.problems, self.bins)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], device: torch.device) -> LevelHistogram:
        """Return the histogram that `state` was taken of, on a device."""
        _, problems, bins = state["sums"].shape
        histogram = cls(problems, bins, device)
        histogram._sums = state["sums"].to(device).flatten(1)
        return histogram

    @classmethod
    def joined(cls, parts: Sequence[LevelHistogram]) -> LevelHistogram:
        """Return the problems of several histograms of one device and number of bins as one's."""
        whole = cls(sum(part.problems for part in parts), parts[0].bins, parts[0].device)
        sums = [part._sums.view(4, part.problems, part.bins) for part in parts]
        whole._sums = torch.cat(sums, 1).flatten(1)
        return whole

    def weighted(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (points, weights), each (problems, bins): bin means by weight, ascending."""
        return self._points(0)

    def counted(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (points, counts), each (problems, bins): bin means with every element counted
        once.
        """
        return self._points(2)

    def coarse(self, bins: int) -> LevelHistogram:
        """Return the same counts in fewer bins, for fits that need not be exact."""
        merged = LevelHistogram(self.problems, bins, self._sums.device)
        merged._sums = self._sums.view(4, self.problems * bins, -1).sum(-1)
        return merged

    def _points(self, which: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        mass, moment = self._sums[which : which + 2].view(2, self.problems, self.bins).cpu().numpy()
        middle = (np.arange(self.bins) + 0.5) * (2 / self.bins) - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(mass > 0, moment / mass, middle), mass.copy()
