"""Per-channel quantiles of a stream, in memory that does not grow with it.

Each channel counts its values in bins of width 2**exponent whose edges are multiples of that width.
When a value falls outside the bins there are, the width doubles and neighbours merge, exactly. The
result depends on the values alone, not on their order or on how they were split into batches, so
sketches of several processes can be merged.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvqtool.errors import RunError
from kvqtool.ranks import Ranks

# The widest bins a sketch starts with resolve a channel's range to better than 1 part in BINS / 2.
BINS = 2048
_MANTISSA_BITS = 52
_EXPONENT_BIAS: Final = 1023  # of float64
_SMALLEST_EXPONENT = -1100
_STATE: Final = ("minimum", "maximum", "exponent", "first", "counts")


class ChannelQuantiles:
    """A sketch of every channel's distribution: counts in power-of-two bins, and the exact least
    and greatest value.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        """Start empty for `channels` channels."""
        self.minimum = torch.full((channels,), float("inf"), device=device)
        self.maximum = torch.full((channels,), float("-inf"), device=device)
        self._exponent = torch.full(
            (channels,), _SMALLEST_EXPONENT, dtype=torch.int64, device=device
        )
        self._first = torch.zeros(channels, dtype=torch.int64, device=device)
        self._counts = torch.zeros(channels, BINS, dtype=torch.int32, device=device)

    def update(self, states: Tensor) -> None:
        """Count a batch of rows, (rows, channels) float32.

        Raises:
            RunError: when a value is not finite.
        """
        if not torch.isfinite(states).all():
            raise RunError(
                "activations hold NaN or infinity; calibrate in float32 or check the model's "
                "weights"
            )
        self.minimum = torch.minimum(self.minimum, states.amin(0))
        self.maximum = torch.maximum(self.maximum, states.amax(0))
        self._widen()
        bins = _bin_of(states, self._exponent) - self._first
        flat = bins + torch.arange(len(self._first), device=states.device) * BINS
        counted = torch.bincount(flat.flatten(), minlength=self._counts.numel())
        self._counts += counted.view_as(self._counts).to(torch.int32)

    def merged(self, ranks: Ranks) -> ChannelQuantiles:
        """Return the sketch of what all processes have seen: to the bit that of one process.

        Bins follow from the least and greatest value, so widened to those of all processes they
        are everywhere the same, and counts are integers.
        """
        if ranks.is_alone:
            return self
        whole = ChannelQuantiles.from_state(self.state(), self._counts.device)
        whole.minimum = ranks.reduce(self.minimum, "MIN")
        whole.maximum = ranks.reduce(self.maximum, "MAX")
        whole._widen()
        whole._counts = ranks.reduce(whole._counts)
        return whole

    def state(self) -> dict[str, Tensor]:
        """Return all there is to the sketch, for `from_state`."""
        held = (self.minimum, self.maximum, self._exponent, self._first, self._counts)
        return dict(zip(_STATE, held, strict=True))

    @classmethod
    def from_state(cls, state: dict[str, Tensor], device: torch.device) -> ChannelQuantiles:
        """Return the sketch that `state` was taken of, on a device."""
        sketch = cls(0, device)
        held = [state[name].to(device) for name in _STATE]
        sketch.minimum, sketch.maximum, sketch._exponent, sketch._first, sketch._counts = held
        return sketch

    def quantile(self, q: float) -> Tensor:
        """Return each channel's q-quantile, (channels,) float32, by numpy's linear definition
        within a bin's width.
        """
        total = int(self._counts[0].sum())
        cumulative = self._counts.long().cumsum(1)
        rank = q * (total - 1)
        below, above = (
            self._order_statistic(cumulative, int(rank)),
            self._order_statistic(cumulative, -int(-rank // 1)),
        )
        value = below + (above - below) * (rank - int(rank))
        return value.clamp(self.minimum.double(), self.maximum.double()).float()

    def _order_statistic(self, cumulative: Tensor, rank: int) -> Tensor:
        """Return the value of 0-based `rank`, taking the values of a bin as spread evenly over it;
        float64.
        """
        index = torch.searchsorted(cumulative, torch.full_like(cumulative[:, :1], rank), right=True)
        inside = self._counts.gather(1, index).double()
        before = cumulative.gather(1, index).double() - inside
        position = self._first[:, None] + index + (rank - before + 0.5) / inside
        return (position * _power_of_two(self._exponent[:, None])).squeeze(1)

    def _widen(self) -> None:
        """Double bin widths until every channel's range fits, merging the counts there are."""
        largest = torch.maximum(self.minimum.abs(), self.maximum.abs())
        finest = torch.frexp(largest).exponent.long() - _MANTISSA_BITS
        exponent = torch.maximum(self._exponent, finest)
        while True:
            low, high = _bin_of(self.minimum, exponent), _bin_of(self.maximum, exponent)
            narrow = high - low >= BINS
            if not narrow.any():
                break
            exponent = exponent + narrow
        old = torch.arange(BINS, device=exponent.device) + self._first[:, None]
        shift = (exponent - self._exponent).clamp_max(63)
        moved = (old >> shift[:, None]) - low[:, None]
        # Empty bins may lie outside the new range; they carry nothing, so where they land does not
        # matter.
        self._counts = torch.zeros_like(self._counts).scatter_add_(
            1, moved.clamp(0, BINS - 1), self._counts
        )
        self._exponent, self._first = exponent, low


def _bin_of(values: Tensor, exponent: Tensor) -> Tensor:
    """Return floor(value / 2**exponent) as int64; exact, since scaling by a power of two is."""
    return (values.double() * _power_of_two(-exponent)).floor().long()


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2**exponent, float64, for int64 exponents of normal numbers. `torch.ldexp` takes it in
    float32 in older releases (pytorch issue 133267), and torch 2.11's gave NaN on a GPU that was
    not the current one.
    """
    return ((exponent + _EXPONENT_BIAS) << _MANTISSA_BITS).view(torch.float64)
