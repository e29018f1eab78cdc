"""Per-vector outliers: which elements of a row stay exact, and the sparse form they are stored in
(KVQuant, 3.4).

A row is one token over all KV heads of a layer. Its outliers are kept as (fp16 value, channel) in
channel order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvqtool.memory import count_dtype, index_dtype

HALF_MAX = 65504.0


def threshold_mask(states: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Mark elements strictly outside their channel's calibrated range.

    Args:
        states: (rows, channels) float32.
        lower: (channels,) least value that is no outlier.
        upper: (channels,) greatest value that is no outlier.

    Returns:
        (rows, channels) bool; a row may hold none or only outliers.
    """
    return (states < lower) | (states > upper)


def cap_mask(mask: Tensor, distance: Tensor, cap: int) -> Tensor:
    """Keep at most `cap` marks a row: those with the greatest distance, the lower channel first
    where equal.

    Args:
        mask: (rows, channels) bool.
        distance: (rows, channels) float32, how far an element lies from the middle of its range, in
            half ranges.
        cap: most outliers of a row.
    """
    rank = torch.argsort(distance.masked_fill(~mask, -1.0), dim=1, descending=True, stable=True)
    kept = torch.zeros_like(mask).scatter_(1, rank[:, :cap], True)
    return mask & kept


def rank_mask(states: Tensor, per_tail: int) -> Tensor:
    """Mark exactly the `per_tail` least and the `per_tail` greatest elements of each row, by a
    stable order.

    Args:
        states: (rows, channels) float32.
        per_tail: outliers at each end; ceil(f / 2 * channels) for an outlier share f.
    """
    order = torch.argsort(states, dim=1, stable=True)
    ends = torch.cat([order[:, :per_tail], order[:, states.shape[1] - per_tail :]], dim=1)
    return torch.zeros_like(states, dtype=torch.bool).scatter_(1, ends, True)


def extract(states: Tensor, mask: Tensor, *, with_counts: bool) -> dict[str, Tensor]:
    """Collect marked elements in row and channel order.

    Args:
        states: (rows, channels) float32.
        mask: (rows, channels) bool.
        with_counts: whether rows hold different numbers of outliers, so that each row's count is
            stored.

    Returns:
        `outlier_values` fp16 (n,), `outlier_channels` (n,), and `outlier_counts` (rows,) where
        asked for.
    """
    channels = states.shape[1]
    buffers = {
        "outlier_values": states[mask].clamp(-HALF_MAX, HALF_MAX).half(),
        "outlier_channels": mask.nonzero()[:, 1].to(getattr(torch, index_dtype(channels))),
    }
    if with_counts:
        buffers["outlier_counts"] = mask.sum(dim=1).to(getattr(torch, count_dtype(channels)))
    return buffers


def restore(states: Tensor, buffers: dict[str, Tensor], per_row: int) -> Tensor:
    """Write outliers over decoded states, in place; the inverse of `extract`.

    Args:
        states: (rows, channels) float32, changed in place.
        buffers: what `extract` returned.
        per_row: outliers of every row where no counts are stored.
    """
    rows = row_of_outlier(buffers, states.shape[0], per_row)
    states[rows, buffers["outlier_channels"].long()] = buffers["outlier_values"].float()
    return states


def row_of_outlier(buffers: dict[str, Tensor], rows: int, per_row: int) -> Tensor:
    """Return the row index of every stored outlier, (n,) int64."""
    index = torch.arange(rows, device=buffers["outlier_values"].device)
    counts = buffers.get("outlier_counts")
    return index.repeat_interleave(per_row if counts is None else counts.long())
