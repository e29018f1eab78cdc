"""Codebooks: the levels a code stands for, and the fits that find them.

Levels live in normalised space: a vector's range [lower, upper] maps to [-1, 1] by u = (x - offset)
/ scale with offset = (upper + lower) / 2 and scale = (upper - lower) / 2 (KVQuant, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvqtool.side import WIDTHS

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# NormalFloat's outermost probability (QLoRA's NF4 constant, used for every width by KVQuant's
# baseline).
_NF_TAIL: Final = 0.5 * (1 / 32 + 1 / 30)


@dataclass(frozen=True)
class Codebook:
    """What encoding and decoding one layer's keys or values needs.

    Args:
        levels: sorted levels codes are chosen by, (L,) or one row per channel (channels, L);
            float32 that fp16 holds. Where tokens have bits of their own, the levels of each of
            WIDTHS one after another.
        decode_levels: levels that are read back; differ from `levels` under moment matching only.
            Same shape.
        lower: (channels,) float32, fp16 values: each channel's least packed value; None where
            tokens bring ranges.
        upper: (channels,) float32, likewise the greatest.
        feedback: (heads, width, width) float32, fp16 values: see `compensation.BlockFisher`; None
            where rounding is not compensated.
        order: (heads, width) int16, the order a head's channels are rounded in; None likewise.
        query_norm: (heads,) float32, fp16 values: 90th percentile of the squared 2-norm of the
            queries that read a key head, softmax scale included; None where nothing asks for it.

    Example: nuq3 keys of a layer with 192 channels -> levels (8,), lower (192,), upper (192,).
    """

    levels: Tensor
    decode_levels: Tensor
    lower: Tensor | None = None
    upper: Tensor | None = None
    feedback: Tensor | None = None
    order: Tensor | None = None
    query_norm: Tensor | None = None

    def at(self, width: int) -> Codebook:
        """Return the codebook of one of WIDTHS, where levels of all of them lie end to end."""
        first = sum(1 << each for each in WIDTHS if each < width)
        levels, decoded = (
            part[..., first : first + (1 << width)] for part in (self.levels, self.decode_levels)
        )
        return replace(self, levels=levels, decode_levels=decoded)

    def to(self, device: torch.device) -> Codebook:
        """Return the codebook with its tensors on a device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Codebook(
            self.levels.to(device),
            self.decode_levels.to(device),
            move(self.lower),
            move(self.upper),
            move(self.feedback),
            move(self.order),
            move(self.query_norm),
        )


def as_half(values: Tensor) -> Tensor:
    """Round to what fp16 stores, kept in float32 for arithmetic; beyond fp16's range is clamped to
    its ends.
    """
    return values.float().clamp(-65504.0, 65504.0).half().float()


def round_range(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Round ranges to fp16 outwards, so that no value inside becomes an outlier by rounding;
    float32 results.
    """
    low, high = as_half(lower), as_half(upper)
    low = torch.where(low > lower, _next_half(low, -torch.inf), low)
    high = torch.where(high < upper, _next_half(high, torch.inf), high)
    return as_half(low), as_half(high)


def _next_half(values: Tensor, towards: float) -> Tensor:
    """Return the next fp16 number; on the CPU, where torch has nextafter for fp16."""
    ends = torch.tensor(towards, dtype=torch.float16)
    return torch.nextafter(values.cpu().half(), ends).float().to(values.device)


def uniform_levels(bits: int) -> Tensor:
    """Return 2**bits equally spaced levels from -1 to 1: asymmetric integer quantization with a
    float zero point.
    """
    return torch.linspace(-1.0, 1.0, 1 << bits, dtype=torch.float64).float()


def midpoint_levels(bits: int) -> Tensor:
    """Return the middles of 2**bits equal cells of [-1, 1]: 1 bit -> [-0.5, 0.5], 0 bits -> [0]."""
    cells = torch.arange(1 << bits, dtype=torch.float64)
    return ((2 * cells + 1) / (1 << bits) - 1).float()


def normalfloat_levels(bits: int) -> Tensor:
    """Return NormalFloat levels (QLoRA; KVQuant's nf baseline): normal quantiles, zero included,
    ends at -1 and 1.
    """
    half = 1 << (bits - 1)
    quantile = NormalDist().inv_cdf
    negative = [quantile(p) for p in np.linspace(_NF_TAIL, 0.5, half)]
    positive = [quantile(p) for p in np.linspace(0.5, 1 - _NF_TAIL, half + 1)]
    levels = [q / -negative[0] for q in negative] + [q / positive[-1] for q in positive[1:]]
    return torch.tensor(levels, dtype=torch.float32)


def weighted_kmeans(points: FloatArray, weights: FloatArray, count: int) -> FloatArray:
    """Fit `count` levels to weighted points on a line, exactly: the global optimum of weighted 1-D
    k-means.

    Dynamic programming over sorted points: D_k[j] = min_i D_{k-1}[i] + cost(i, j), where cost(i, j)
    is the weighted squared error of points i..j-1 about their mean. The cost satisfies the
    quadrangle inequality, so each row is solved by divide and conquer, all midpoints of a depth and
    all problems of the batch at once.

    Args:
        points: (problems, n) ascending along the last axis.
        weights: (problems, n), not negative; a point of weight zero is ignored.
        count: levels per problem.

    Returns:
        (problems, count) ascending. Levels no point needs repeat the greatest; all are 0 where
        there is no weight.
    """
    prefix, _, splits = _solve(points, weights, count)
    return _levels_of(splits, prefix)


def least_errors(points: FloatArray, weights: FloatArray, most: int) -> FloatArray:
    """Return the weighted squared error of the best 1, 2, ... `most` levels, (problems, most).

    Args:
        points: (problems, n) ascending along the last axis.
        weights: (problems, n), not negative.
        most: the greatest number of levels.
    """
    _, errors, _ = _solve(points, weights, most)
    return np.stack(errors, axis=1)


def _solve(
    points: FloatArray, weights: FloatArray, count: int
) -> tuple[tuple[FloatArray, ...], list[FloatArray], list[IntArray]]:
    """Return prefix sums, the least error with 1 to `count` levels, and each row's splits."""
    weighed = weights > 0
    most = max(int(weighed.sum(1).max(initial=0)), 1)
    first = np.argsort(~weighed, axis=1, kind="stable")[:, :most]  # points that matter, in order
    points, weights = (np.take_along_axis(part, first, axis=1) for part in (points, weights))
    problems, n = points.shape
    prefix = tuple(
        np.pad(np.cumsum(terms, axis=1), ((0, 0), (1, 0)))
        for terms in (weights, weights * points, weights * points**2)
    )
    flat = tuple(sums.ravel() for sums in prefix)
    base = np.arange(problems)[:, None] * (n + 1)
    best = _cost(flat, np.broadcast_to(base, (problems, n + 1)), base + np.arange(n + 1))
    errors, splits = [best[:, -1]], []
    for _ in range(count - 1):
        best, split = _next_row(best, flat)
        errors.append(best[:, -1])
        splits.append(split)
    return prefix, errors, splits


def _cost(prefix: tuple[FloatArray, ...], start: IntArray, stop: IntArray) -> FloatArray:
    """Return the weighted squared error of points start..stop-1 about their mean; flat prefix
    indices.
    """
    w, wx, wxx = (sums[stop] - sums[start] for sums in prefix)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = wxx - wx * wx / w
    return np.where(w > 0, np.maximum(cost, 0.0), 0.0)


def _next_row(best: FloatArray, prefix: tuple[FloatArray, ...]) -> tuple[FloatArray, IntArray]:
    """Return D_k and its splits from D_{k-1}: positions at odd multiples of 2**p, p falling,
    between solved ones.
    """
    problems, width = best.shape
    row, split = np.zeros_like(best), np.zeros(best.shape, dtype=np.int64)
    base = np.arange(problems)[:, None] * width
    size = 1 << max(width - 1, 1).bit_length()
    while size >= 1:
        middle = np.arange(size, width, 2 * size)
        if middle.size:
            right = np.minimum(middle + size, width - 1)
            high = np.where(middle + size < width, split[:, right], middle)
            low = np.minimum(split[:, middle - size], np.minimum(high, middle))
            row[:, middle], split[:, middle] = _best_splits(
                best.ravel(), prefix, base, (low, middle, np.minimum(high, middle))
            )
        size //= 2
    return row, split


def _best_splits(
    best: FloatArray,
    prefix: tuple[FloatArray, ...],
    base: IntArray,
    bounds: tuple[IntArray, IntArray, IntArray],
) -> tuple[FloatArray, IntArray]:
    """Minimise best[i] + cost(i, middle) over low <= i <= high, the ranges of all problems laid end
    to end.
    """
    low, middle, high = bounds
    lengths = (high - low + 1).ravel()
    starts = np.cumsum(lengths) - lengths
    offset = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    candidate = np.repeat((base + low).ravel(), lengths) + offset
    total = best[candidate] + _cost(prefix, candidate, np.repeat((base + middle).ravel(), lengths))
    minimum = np.minimum.reduceat(total, starts)
    first = np.where(total == np.repeat(minimum, lengths), offset, lengths.max())
    return minimum.reshape(low.shape), low + np.minimum.reduceat(first, starts).reshape(low.shape)


def _levels_of(splits: list[IntArray], prefix: tuple[FloatArray, ...]) -> FloatArray:
    """Walk the splits back from the last point and return each segment's mean, empty segments
    filled in.
    """
    weight, weighted, _ = prefix
    problem = np.arange(weight.shape[0])
    stop = np.full(weight.shape[0], weight.shape[1] - 1)
    means = []
    for split in [*reversed(splits), None]:
        start = np.zeros_like(stop) if split is None else split[problem, stop]
        w = weight[problem, stop] - weight[problem, start]
        with np.errstate(divide="ignore", invalid="ignore"):
            means.append(
                np.where(w > 0, (weighted[problem, stop] - weighted[problem, start]) / w, np.nan)
            )
        stop = start
    levels = np.sort(np.stack(means, axis=1), axis=1)  # NaN, a segment without weight, sorts last
    greatest = np.nanmax(np.where(np.isnan(levels[:, :1]), 0.0, levels), axis=1, keepdims=True)
    return np.where(np.isnan(levels), greatest, levels)


def match_moments(points: FloatArray, counts: FloatArray, levels: FloatArray) -> FloatArray:
    """Return decode levels g * c + o that give the quantized data its mean and deviation back
    (KVQuant's Q-Norm).

    g = sd(u) / sd(Q(u)), o = mean(u) - g * mean(Q(u)); codes are still chosen by the levels
    themselves.

    Args:
        points: (problems, n) values u.
        counts: (problems, n) how often each occurs.
        levels: (problems, L) ascending.

    Returns:
        (problems, L); the levels unchanged where the quantized data does not vary.
    """
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    codes = np.stack([np.searchsorted(row, u) for row, u in zip(middles, points, strict=True)])
    quantized = np.take_along_axis(levels, codes, axis=1)
    total = np.maximum(counts.sum(1, keepdims=True), 1e-300)

    def moments(values: FloatArray) -> tuple[FloatArray, FloatArray]:
        mean = (counts * values).sum(1, keepdims=True) / total
        return mean, np.sqrt((counts * (values - mean) ** 2).sum(1, keepdims=True) / total)

    (mean, deviation), (mean_q, deviation_q) = moments(points), moments(quantized)
    gain = np.where(deviation_q > 0, deviation / np.where(deviation_q > 0, deviation_q, 1.0), 1.0)
    return np.where(deviation_q > 0, gain * levels + (mean - gain * mean_q), levels)
