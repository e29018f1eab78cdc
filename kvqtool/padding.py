"""Attention sinks of padded sequences: a left-padded sequence's sinks are its first real tokens.

All sequences of a batch keep their sinks in one buffer and their other tokens in the body. Where a
sequence opens with padding, its body also has codes for the sinks' places; on read the exact states
are written over them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

Pair = tuple[Tensor, Tensor]


def keep_padded_sinks(sinks: Pair, padding: tuple[int, ...], arriving: Pair, before: int) -> None:
    """Copy padded sequences' sinks from arriving states into the sink buffer, in place.

    Args:
        sinks: keys and values (batch, heads, sinks, head_dim).
        padding: padded tokens of each sequence; empty where none is padded.
        arriving: keys and values (batch, heads, tokens, head_dim).
        before: tokens that were stored before these.
    """
    for row, sink, index in _places(sinks, padding, before, arriving[0].shape[2]):
        for kept, fresh in zip(sinks, arriving, strict=True):
            kept[row, :, sink] = fresh[row, :, index]


def put_padded_sinks(sinks: Pair, padding: tuple[int, ...], states: Pair, first: int) -> None:
    """Write padded sequences' exact sinks over their places in decoded states, in place.

    Args:
        sinks: keys and values (batch, heads, sinks, head_dim).
        padding: padded tokens of each sequence; empty where none is padded.
        states: keys and values (batch, heads, tokens, head_dim) from token `first` on.
        first: the first token among `states`.
    """
    for row, sink, index in _places(sinks, padding, first, states[0].shape[2]):
        for decoded, kept in zip(states, sinks, strict=True):
            decoded[row, :, index] = kept[row, :, sink]


def _places(
    sinks: Pair, padding: tuple[int, ...], start: int, tokens: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (sequence, sink, index from `start`) of padded sequences' sinks among some tokens."""
    for row, padded in enumerate(padding):
        for sink in range(sinks[0].shape[2] if padded else 0):
            if 0 <= padded + sink - start < tokens:
                yield row, sink, padded + sink - start
