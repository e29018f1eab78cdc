"""Pack and unpack codes: the reference layout of every packed row.

A row's codes form one little-endian bit stream over 32-bit words: code c occupies bits `bits*c ..
bits*c + bits - 1` of the stream, the last word is padded with zeros. Three-bit codes 10 and 21 of
every 32 straddle two words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

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
    words = []
    for first, last, shifts in _codes_by_word(bits, codes.device):
        # Codes share no bit, so their sum is their union.
        word = (lanes[..., first:last] << shifts).sum(-1, dtype=torch.int32)
        if first * bits % WORD_BITS:
            word |= lanes[..., first - 1] >> (WORD_BITS - (first - 1) * bits % WORD_BITS)
        words.append(word)
    used = -(-channels * bits // WORD_BITS)
    return torch.stack(words, dim=-1).view(rows, periods * words_per_period)[:, :used].contiguous()


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
    for word, (first, last, shifts) in enumerate(_codes_by_word(bits, words.device)):
        codes[..., first:last] = lanes[..., word, None] >> shifts
        kept = WORD_BITS - (last - 1) * bits % WORD_BITS
        if kept < bits:
            # The last code goes on in the next word; the arithmetic shift filled its upper bits
            # with the sign.
            codes[..., last - 1] = (codes[..., last - 1] & ((1 << kept) - 1)) | (
                lanes[..., word + 1] << kept
            )
    return (codes & ((1 << bits) - 1)).flatten(1)[:, :channels]


def _period(bits: int) -> tuple[int, int]:
    """Return (codes, words) after which the bit stream's alignment repeats: 3 bits -> (32, 3), 4
    bits -> (8, 1).
    """
    stream = math.lcm(bits, WORD_BITS)
    return stream // bits, stream // WORD_BITS


def _codes_by_word(bits: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """Yield, for each word of a period, the codes whose lowest bit lies in it, first and past the
    last, and where.
    """
    period, words = _period(bits)
    for word in range(words):
        first = -(-word * WORD_BITS // bits)
        last = min(-(-(word + 1) * WORD_BITS // bits), period)
        start = first * bits - word * WORD_BITS
        yield (
            first,
            last,
            torch.arange(
                start, start + (last - first) * bits, bits, dtype=torch.int32, device=device
            ),
        )
