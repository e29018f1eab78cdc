"""Pack and unpack codes: the reference layout of every packed row.

A row's codes form one little-endian bit stream over 32-bit words: code c occupies bits `bits*c .. bits*c + bits - 1`
of the stream, the last word is padded with zeros. Three-bit codes 10 and 21 of every 32 straddle two words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvqtool.memory import WORD_BITS


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into words.

    Args:
        codes: (rows, channels) integers in [0, 2**bits).
        bits: width of a code, 1 to 8.

    Returns:
        (rows, ceil(channels * bits / 32)) int32. Example: (128, 192) at 3 bits -> (128, 18).
    """
    rows, channels = codes.shape
    period, words_per_period = _period(bits)
    periods = -(-channels // period)
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, periods * period - channels))
    lanes = padded.view(rows, periods, period)
    words = torch.zeros(rows, periods, words_per_period, dtype=torch.int32, device=codes.device)
    for lane in range(period):
        word, shift = divmod(lane * bits, WORD_BITS)
        words[..., word] |= lanes[..., lane] << shift
        if shift + bits > WORD_BITS:
            words[..., word + 1] |= lanes[..., lane] >> (WORD_BITS - shift)
    used = -(-channels * bits // WORD_BITS)
    return words.view(rows, -1)[:, :used].contiguous()


def unpack_words(words: Tensor, bits: int, channels: int) -> Tensor:
    """Unpack words into codes; the inverse of `pack_codes`.

    Args:
        words: (rows, ceil(channels * bits / 32)) int32.
        bits: width of a code.
        channels: codes in a row.

    Returns:
        (rows, channels) int32.
    """
    rows = words.shape[0]
    period, words_per_period = _period(bits)
    periods = -(-channels // period)
    padded = torch.nn.functional.pad(words, (0, periods * words_per_period - words.shape[1]))
    lanes = padded.view(rows, periods, words_per_period)
    codes = torch.empty(rows, periods, period, dtype=torch.int32, device=words.device)
    mask = (1 << bits) - 1
    for lane in range(period):
        word, shift = divmod(lane * bits, WORD_BITS)
        low = lanes[..., word] >> shift
        if shift + bits > WORD_BITS:
            # The arithmetic shift copied the sign into the upper bits; only 32 - shift bits of the first word count.
            low = (low & ((1 << (WORD_BITS - shift)) - 1)) | (lanes[..., word + 1] << (WORD_BITS - shift))
        codes[..., lane] = low & mask
    return codes.view(rows, -1)[:, :channels]


def _period(bits: int) -> tuple[int, int]:
    """Return (codes, words) after which the bit stream's alignment repeats: 3 bits -> (32, 3), 4 bits -> (8, 1)."""
    stream = math.lcm(bits, WORD_BITS)
    return stream // bits, stream // WORD_BITS
