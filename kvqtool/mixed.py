"""Rows that have each their own width: encode and decode them with a codebook for each of WIDTHS.

Ranges and outliers are those of the codec and do not depend on a row's width. A row of 0 bits has
no codes: it becomes its mean without outliers, or per channel the one level of width 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvqtool.bits import pack_codes, unpack_words
from kvqtool.codebook import Codebook, as_half
from kvqtool.codec import Normalized, choose_codes, look_up, normalize, stretch
from kvqtool.memory import outliers_per_tail
from kvqtool.outliers import extract, restore
from kvqtool.side import WIDTHS, QuantSpec


def spread_of(ranged: Normalized) -> Tensor:
    """Return the width of each row's range, (rows,) float32, as QAQ's formula for bits asks for it.

    A row that brings its range has that. Where calibration fixed one per channel, a code's error
    grows with its channel's range whatever the row holds, and the root of their mean square counts.
    """
    wide = ranged.scale.expand_as(ranged.normalized)
    return 2 * (wide[:, 0] if ranged.ranges is not None else wide.square().mean(1).sqrt())


def encode_mixed(
    states: Tensor,
    widths: Tensor,
    codebook: Codebook,
    spec: QuantSpec,
    ranged: Normalized | None = None,
) -> dict[str, Tensor]:
    """Encode rows.

    Args:
        states: (rows, channels) float32, finite.
        widths: (rows,) uint8, one of WIDTHS for each.
        codebook: levels of all widths, and ranges where the spec fixes them per channel.
        spec: the side's scheme.
        ranged: what `normalize` says of the rows, where it has been asked already.

    Returns:
        The buffers of `memory.body_buffers`, exactly `rows` rows.
    """
    ranged = ranged or normalize(states, codebook, spec)
    buffers, shifted = {"widths": widths}, states
    if spec.compensated:
        shifted = states.clone()
    for width in WIDTHS:
        rows = (widths == width).nonzero()[:, 0]
        outliers = None if ranged.outliers is None else ranged.outliers[rows]
        codes, shift = choose_codes(ranged.normalized[rows], codebook.at(width), outliers)
        if shift is not None:
            shifted[rows] -= shift * ranged.scale.expand_as(states)[rows]
        if width:
            buffers[f"words{width}"] = pack_codes(codes, width)
    if ranged.ranges is not None:
        buffers["ranges"] = _with_means(ranged, states, widths)
    if ranged.outliers is not None:
        buffers |= extract(shifted, ranged.outliers, with_counts=spec.per_channel)
    return buffers


def decode_mixed(
    buffers: dict[str, Tensor], codebook: Codebook, spec: QuantSpec, channels: int
) -> Tensor:
    """Decode rows; the inverse of `encode_mixed` up to the quantization error.

    Args:
        buffers: what `encode_mixed` returned, or any run of its rows.
        codebook: the codebook it was encoded with.
        spec: the side's scheme.
        channels: C, channels of a row.

    Returns:
        (rows, channels) float32.
    """
    widths = buffers["widths"]
    values = codebook.at(0).decode_levels.squeeze(-1).expand(len(widths), channels).clone()
    for width in WIDTHS[1:]:
        codes = unpack_words(buffers[f"words{width}"], width, channels)
        values[widths == width] = look_up(codes, codebook.at(width).decode_levels)
    states = stretch(values, buffers, codebook, spec)
    if "outlier_values" in buffers:
        restore(states, buffers, 2 * outliers_per_tail(spec, channels))
    return states


def _with_means(ranged: Normalized, states: Tensor, widths: Tensor) -> Tensor:
    """Return the rows' ranges, those of rows without codes being their mean and no width."""
    assert ranged.ranges is not None
    kept = torch.ones_like(states, dtype=torch.bool)
    if ranged.outliers is not None:
        kept = ~ranged.outliers
    total = states.masked_fill(~kept, 0.0).sum(1)
    mean = as_half(total / kept.sum(1).clamp_min(1)).half()
    bare = torch.stack([torch.zeros_like(mean), mean], -1)[:, None]
    return torch.where((widths == 0)[:, None, None], bare, ranged.ranges)
