"""Exact weighted k-means on a line, many problems at once, on the CPU or a GPU.

Dynamic programming over sorted points: D_k[j] = min_i D_{k-1}[i] + cost(i, j), where cost(i, j) is
the weighted squared error of points i..j-1 about their mean. The cost satisfies the quadrangle
inequality, so each row is solved by divide and conquer, all midpoints of a depth and all problems
of the batch at once.

Prefix sums are taken on the CPU; what follows are single float64 operations and minima, so that
every device, and any number of threads, finds the same levels to the bit.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]
CPU: Final = torch.device("cpu")


def weighted_kmeans(
    points: FloatArray, weights: FloatArray, count: int, device: torch.device = CPU
) -> FloatArray:
    """Fit `count` levels to weighted points on a line, exactly: the global optimum of weighted 1-D
    k-means.

    Args:
        points: (problems, n) ascending along the last axis.
        weights: (problems, n), not negative; a point of weight zero is ignored.
        count: levels per problem.
        device: where to search; it makes no difference to the levels.

    Returns:
        (problems, count) ascending. Levels no point needs repeat the greatest; all are 0 where
        there is no weight.
    """
    prefix = _prefix(points, weights)
    _, splits = _solve(prefix, count, device)
    return _levels_of(splits, prefix, device)


def least_errors(
    points: FloatArray, weights: FloatArray, most: int, device: torch.device = CPU
) -> FloatArray:
    """Return the weighted squared error of the best 1, 2, ... `most` levels, (problems, most).

    Args:
        points: (problems, n) ascending along the last axis.
        weights: (problems, n), not negative.
        most: the greatest number of levels.
        device: where to search; it makes no difference to the errors.
    """
    errors, _ = _solve(_prefix(points, weights), most, device)
    found: FloatArray = torch.stack(errors, 1).cpu().numpy()
    return found


def _prefix(points: FloatArray, weights: FloatArray) -> tuple[FloatArray, ...]:
    """Return sums of w, w x and w x^2 before each point that has a weight, each (problems, n + 1);
    a problem with fewer such points than others ends in points of weight zero.
    """
    weighed = weights > 0
    most = max(int(weighed.sum(1).max(initial=0)), 1)
    first = np.argsort(~weighed, axis=1, kind="stable")[:, :most]  # points that matter, in order
    points, weights = (np.take_along_axis(part, first, axis=1) for part in (points, weights))
    return tuple(
        np.pad(np.cumsum(terms, axis=1), ((0, 0), (1, 0)))
        for terms in (weights, weights * points, weights * points**2)
    )


def _solve(
    prefix: tuple[FloatArray, ...], count: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the least error with 1 to `count` levels, each (problems,), and each row's splits,
    each (problems, n + 1) int64.
    """
    problems, width = prefix[0].shape
    flat = tuple(torch.from_numpy(sums).to(device).flatten() for sums in prefix)
    base = torch.arange(problems, device=device)[:, None] * width
    stop = base + torch.arange(width, device=device)
    best = _cost(flat, base.expand(problems, width).flatten(), stop.flatten()).view_as(stop)
    errors, splits = [best[:, -1]], []
    for _ in range(count - 1):
        best, split = _next_row(best, flat, base)
        errors.append(best[:, -1])
        splits.append(split)
    return errors, splits


def _cost(prefix: tuple[Tensor, ...], start: Tensor, stop: Tensor) -> Tensor:
    """Return the weighted squared error of points start..stop-1 about their mean; flat prefix
    indices.
    """
    w, wx, wxx = (sums[stop] - sums[start] for sums in prefix)
    cost = (wxx - wx * wx / w).clamp_min_(0.0)
    return cost.masked_fill_(w <= 0, 0.0)


def _next_row(best: Tensor, prefix: tuple[Tensor, ...], base: Tensor) -> tuple[Tensor, Tensor]:
    """Return D_k and its splits from D_{k-1}: positions at odd multiples of 2**p, p falling,
    between solved ones.
    """
    _, width = best.shape
    row, split = torch.zeros_like(best), torch.zeros_like(best, dtype=torch.int64)
    for power in reversed(range((width - 1).bit_length())):
        size = 1 << power
        middle = torch.arange(size, width, 2 * size, device=best.device)
        right = (middle + size).clamp_max(width - 1)
        high = torch.where(middle + size < width, split[:, right], middle).minimum(middle)
        low = split[:, middle - size].minimum(high)
        row[:, middle], split[:, middle] = _best_splits(
            best.flatten(), prefix, base, (low, middle, high)
        )
    return row, split


def _best_splits(
    best: Tensor, prefix: tuple[Tensor, ...], base: Tensor, bounds: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Minimise best[i] + cost(i, middle) over low <= i <= high, the ranges of all problems laid end
    to end.
    """
    low, middle, high = bounds
    lengths = (high - low + 1).flatten()
    starts = lengths.cumsum(0) - lengths
    whole = int(starts[-1] + lengths[-1])
    owner = torch.repeat_interleave(lengths, output_size=whole)
    offset = torch.arange(whole, device=owner.device) - starts[owner]
    candidate = (base + low).flatten()[owner] + offset
    total = best[candidate] + _cost(prefix, candidate, (base + middle).flatten()[owner])
    minimum = torch.full_like(starts, torch.inf, dtype=total.dtype)
    minimum.scatter_reduce_(0, owner, total, "amin")
    offset.masked_fill_(total != minimum[owner], whole)
    first = torch.full_like(starts, whole).scatter_reduce_(0, owner, offset, "amin")
    return minimum.view(low.shape), low + first.view(low.shape)


def _levels_of(
    splits: list[Tensor], prefix: tuple[FloatArray, ...], device: torch.device
) -> FloatArray:
    """Walk the splits back from the last point and return each segment's mean, empty segments
    filled in.
    """
    weight, weighted, _ = prefix
    problems, width = weight.shape
    stop = torch.full((problems, 1), width - 1, device=device)
    ends = [stop]
    for split in reversed(splits):
        ends.append(split.gather(1, ends[-1]))
    bounds = torch.cat([*ends, torch.zeros_like(stop)], 1).cpu().numpy()
    w, wx = (-np.diff(np.take_along_axis(sums, bounds, axis=1)) for sums in (weight, weighted))
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.where(w > 0, wx / w, np.nan)
    levels = np.sort(means, axis=1)  # NaN, a segment without weight, sorts last
    greatest = np.nanmax(np.where(np.isnan(levels[:, :1]), 0.0, levels), axis=1, keepdims=True)
    return np.where(np.isnan(levels), greatest, levels)
