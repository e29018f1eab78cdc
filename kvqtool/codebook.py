"""Codebooks: the levels a code stands for, given ones and what is done to fitted ones.

Levels live in normalised space: a vector's range [lower, upper] maps to [-1, 1] by u = (x - offset)
/ scale with offset = (upper + lower) / 2 and scale = (upper - lower) / 2 (KVQuant, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kvqtool.kmeans import FloatArray
from kvqtool.side import WIDTHS

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
        held = {name: part for name, part in vars(self).items() if part is not None}
        return replace(self, **{name: send(part, device) for name, part in held.items()})


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. What comes from the host is copied aside there and does not wait
    for what a GPU still has to do.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


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
