"""kivi: uniform levels over ranges that are found as tokens come, keys per channel and values per
token (KIVI, arXiv 2402.02750).

`-gN` says how many numbers share a scale and an offset: N tokens of one key channel, N channels of
one value token. A group of tokens is packed when it is whole; until then its tokens stay exact,
keys and values, beside those of the recent window `-rN`. Nothing needs calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvqtool.bits import pack_codes, unpack_words
from kvqtool.codebook import Codebook, as_half, uniform_levels
from kvqtool.codec import nearest_level
from kvqtool.histogram import LevelHistogram
from kvqtool.methods.base import Method
from kvqtool.side import QuantSpec


class KiviMethod(Method):
    """Equally spaced levels over groups of tokens (keys) or of channels (values)."""

    name = "kivi"
    summary = "uniform levels; a range for N tokens of a key channel, N channels of a value token"
    paper = "https://arxiv.org/abs/2402.02750"

    def fit(self, spec: QuantSpec, histogram: LevelHistogram | None) -> tuple[Tensor, Tensor]:
        """Return the uniform levels; data does not matter."""
        levels = as_half(uniform_levels(spec.bits))
        return levels, levels

    def quantize(self, states: Tensor, codebook: Codebook, spec: QuantSpec) -> dict[str, Tensor]:
        """Encode rows, (rows, channels) float32; of keys, every N rows are one group."""
        size = spec.token_group
        if size is None:
            return super().quantize(states, codebook, spec)
        grouped = states.reshape(len(states) // size, size, states.shape[1])
        low, high = grouped.amin(1), grouped.amax(1)
        scale, offset = as_half(high * 0.5 - low * 0.5), as_half(high * 0.5 + low * 0.5)
        inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
        normalized = (grouped - offset[:, None]) * inverse[:, None]
        codes = nearest_level(normalized.view(states.shape), codebook.levels)
        ranges = torch.stack([scale, offset], -1).half()
        return {"words": pack_codes(codes, spec.bits), "group_ranges": ranges}

    def dequantize(
        self, buffers: dict[str, Tensor], codebook: Codebook, spec: QuantSpec, channels: int
    ) -> Tensor:
        """Decode rows, (rows, channels) float32."""
        size = spec.token_group
        if size is None:
            return super().dequantize(buffers, codebook, spec, channels)
        codes = unpack_words(buffers["words"], spec.bits, channels)
        levels = codebook.decode_levels.index_select(0, codes.flatten())
        scale, offset = buffers["group_ranges"].float().unbind(-1)
        grouped = levels.view(len(scale), size, channels)
        return (grouped * scale[:, None] + offset[:, None]).view(codes.shape)
