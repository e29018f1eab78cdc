"""Encode rows of states to codes and back: nearest level in each vector's range, outliers kept
beside them.

    u = (x - offset) / scale,   code = index of the nearest level,   x' = decode_level[code] * scale
    + offset

This is the reference every kernel equals: each operation below is one IEEE float32 operation, in
this order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvqtool.bits import pack_codes, unpack_words
from kvqtool.codebook import Codebook, as_half
from kvqtool.compensation import round_in_order
from kvqtool.memory import groups_per_token, outliers_per_tail
from kvqtool.outliers import cap_mask, extract, rank_mask, restore, threshold_mask
from kvqtool.side import QuantSpec


def encode(states: Tensor, codebook: Codebook, spec: QuantSpec) -> dict[str, Tensor]:
    """Encode rows.

    Args:
        states: (rows, channels) float32, finite.
        codebook: levels, and ranges where the spec fixes them per channel.
        spec: the side's scheme.

    Returns:
        The buffers of `memory.body_buffers`, exactly `rows` rows.
    """
    ranged = normalize(states, codebook, spec)
    codes, shift = choose_codes(ranged.normalized, codebook, ranged.outliers)
    if shift is not None:
        states = states - shift * ranged.scale
    buffers = {"words": pack_codes(codes, spec.bits)}
    if ranged.ranges is not None:
        buffers["ranges"] = ranged.ranges
    if ranged.outliers is not None:
        buffers |= extract(states, ranged.outliers, with_counts=spec.per_channel)
    return buffers


def choose_codes(
    normalized: Tensor, codebook: Codebook, outliers: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the codes of rows (rows, channels) in normalised space, and where the codebook
    compensates rounding, how far each number was moved before it was rounded.
    """
    if codebook.feedback is None:
        return nearest_level(normalized, codebook.levels), None
    assert codebook.order is not None
    levels = codebook.levels, codebook.decode_levels
    return round_in_order(normalized, levels, (codebook.feedback, codebook.order), outliers)


def decode(
    buffers: dict[str, Tensor], codebook: Codebook, spec: QuantSpec, channels: int
) -> Tensor:
    """Decode rows; the inverse of `encode` up to the quantization error.

    Args:
        buffers: what `encode` returned, or any run of its rows with their outliers.
        codebook: the codebook it was encoded with.
        spec: the side's scheme.
        channels: C, channels of a row.

    Returns:
        (rows, channels) float32.
    """
    states = decode_dense(buffers, codebook, spec, channels)
    if "outlier_values" in buffers:
        restore(states, buffers, 2 * outliers_per_tail(spec, channels))
    return states


def decode_dense(
    buffers: dict[str, Tensor], codebook: Codebook, spec: QuantSpec, channels: int
) -> Tensor:
    """Decode the codes alone, as if there were no outliers: (rows, channels) float32."""
    codes = unpack_words(buffers["words"], spec.bits, channels)
    return stretch(look_up(codes, codebook.decode_levels), buffers, codebook, spec)


def look_up(codes: Tensor, levels: Tensor) -> Tensor:
    """Return the levels of codes (rows, channels): those of (L,), or of each channel's own row of
    (channels, L).
    """
    if levels.dim() == 2:
        first = torch.arange(len(levels), device=codes.device, dtype=torch.int32) * levels.shape[1]
        levels, codes = levels.flatten(), codes + first
    return levels.index_select(0, codes.flatten()).view(codes.shape)


def stretch(
    values: Tensor, buffers: dict[str, Tensor], codebook: Codebook, spec: QuantSpec
) -> Tensor:
    """Map rows (rows, channels) from normalised space to states: the channels' or the rows' own
    ranges.
    """
    if spec.per_channel:
        scale, offset = channel_affine(codebook)
        return values * scale + offset
    scale, offset = buffers["ranges"].float().unbind(-1)
    grouped = values.view(*scale.shape, values.shape[1] // scale.shape[1])
    return (grouped * scale[..., None] + offset[..., None]).view(values.shape)


class Normalized:
    """Rows in normalised space, with what was found on the way."""

    def __init__(
        self, normalized: Tensor, scale: Tensor, outliers: Tensor | None, ranges: Tensor | None
    ) -> None:
        """Keep the results.

        Args:
            normalized: (rows, channels) float32 u.
            scale: float32 that broadcasts to (rows, channels): half of each element's range.
            outliers: (rows, channels) bool, or None where the spec keeps none.
            ranges: (rows, groups, 2) fp16 scale and offset of each token, or None where calibration
                fixed them.
        """
        self.normalized = normalized
        self.scale = scale
        self.outliers = outliers
        self.ranges = ranges


def normalize(states: Tensor, codebook: Codebook, spec: QuantSpec) -> Normalized:
    """Find outliers and ranges and map rows to normalised space.

    Keys per channel take range and thresholds from the codebook; everything else finds its outliers
    by rank and its range among the rest, per token over all KV heads of the layer, or per group of
    channels.
    """
    states = states.contiguous()
    if spec.per_channel:
        return _normalize_per_channel(states, codebook, spec)
    return _normalize_per_token(states, spec)


def channel_affine(codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Return (scale, offset), each (channels,) float32, of a codebook with calibrated ranges."""
    assert codebook.lower is not None and codebook.upper is not None
    return (codebook.upper - codebook.lower) * 0.5, (codebook.upper + codebook.lower) * 0.5


def _normalize_per_channel(states: Tensor, codebook: Codebook, spec: QuantSpec) -> Normalized:
    scale, offset = channel_affine(codebook)
    normalized = (states - offset) * _inverse(scale)
    outliers = None
    if spec.outlier_fraction:
        assert codebook.lower is not None and codebook.upper is not None
        outliers = threshold_mask(states, codebook.lower, codebook.upper)
        if spec.outlier_cap is not None and spec.outlier_cap < states.shape[1]:
            # A channel without range has u = 0 everywhere; whatever leaves it counts as one half
            # range away.
            outliers = cap_mask(outliers, normalized.abs().clamp_min(1.0), spec.outlier_cap)
    return Normalized(normalized, scale, outliers, None)


def _normalize_per_token(states: Tensor, spec: QuantSpec) -> Normalized:
    rows, channels = states.shape
    groups = groups_per_token(spec, channels)
    outliers = None
    low_source = high_source = states
    if spec.outlier_fraction:
        outliers = rank_mask(states, outliers_per_tail(spec, channels))
        low_source = states.masked_fill(outliers, float("inf"))
        high_source = states.masked_fill(outliers, float("-inf"))
    shape = (rows, groups, channels // groups)
    low = low_source.view(shape).amin(-1)
    high = high_source.view(shape).amax(-1)
    empty = low > high  # every element of the group is an outlier
    low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
    scale, offset = as_half(high * 0.5 - low * 0.5), as_half(high * 0.5 + low * 0.5)
    normalized = (states.view(shape) - offset[..., None]) * _inverse(scale)[..., None]
    wide = scale[..., None].expand(shape).reshape(rows, channels)
    return Normalized(
        normalized.view(rows, channels), wide, outliers, torch.stack([scale, offset], -1).half()
    )


def nearest_level(normalized: Tensor, levels: Tensor) -> Tensor:
    """Return the index of each element's nearest level, the lower one at an exact tie.

    Args:
        normalized: (rows, channels) float32.
        levels: (L,) ascending, or (channels, L) with a row per channel.

    Returns:
        (rows, channels) int32.
    """
    middles = (levels[..., 1:] + levels[..., :-1]) * 0.5
    if levels.dim() == 1:
        return torch.bucketize(normalized, middles, out_int32=True)
    return torch.searchsorted(middles, normalized.T.contiguous(), out_int32=True).T


def _inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 where there is no range, so that a constant vector encodes to u =
    0.
    """
    return torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
