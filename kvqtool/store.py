"""One layer's cache: `[sink | packed body | recent window]`, keys and values.

Sinks and window hold what the model handed over (keys after RoPE, in its dtype). The body holds
codes of keys before RoPE and of values, and nothing else: reading it decodes, rotates and returns
fresh tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.errors import RunError
from kvqtool.memory import LayerGeometry, dropped_tokens, packed_tokens
from kvqtool.packed import Body, PackedBody
from kvqtool.padding import keep_padded_sinks, put_padded_sinks
from kvqtool.rows import (
    Pair,
    Rows,
    cut,
    decode_pair,
    encode_pair,
    flatten_pair,
    from_rows,
    join,
    join_rows,
    own,
    split_pair,
    to_rows,
)
from kvqtool.scratch import tokens_at_once
from kvqtool.seam import LayerSeam
from kvqtool.spec import SIDES, KvSpec

Angles = Callable[[int, int], tuple[Tensor, Tensor]]
# More than any speculative decoding takes back at once.
_HELD_TOKENS: Final = 256


class LayerStore:
    """Everything one layer has stored, and the only code that encodes and decodes it."""

    def __init__(self, spec: KvSpec, codebooks: tuple[Codebook, Codebook], seam: LayerSeam) -> None:
        """Start empty.

        Args:
            spec: the scheme.
            codebooks: the layer's key and value codebooks.
            seam: the layer: how its keys are taken back before RoPE, and its sliding window.
        """
        self.spec = spec
        self.rotation = seam.rotation if spec.key.pre_rope else None
        self.layer = seam.index
        self.sliding_window = seam.window
        self._codebooks = codebooks
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._exact: dict[str, tuple[Tensor, Tensor]] = {}
        self._bodies: tuple[Body, Body] | None = None
        self.tokens = 0
        self.dropped = 0
        self.padding: tuple[int, ...] = ()

    @property
    def geometry(self) -> LayerGeometry:
        """The layer's shapes, from the states it was given."""
        key, value = self.window
        return LayerGeometry(key.shape[1], key.shape[3], value.shape[3])

    @property
    def batch(self) -> int:
        """Sequences stored."""
        return self._exact["window"][0].shape[0]

    @property
    def is_empty(self) -> bool:
        """Whether no state has been seen yet."""
        return self._bodies is None

    @property
    def window(self) -> tuple[Tensor, Tensor]:
        """The recent window's exact keys and values, (B, H, <= residual_length, D)."""
        return self._exact["window"]

    @property
    def bodies(self) -> tuple[Body, Body]:
        """The packed keys and values."""
        assert self._bodies is not None, "the layer has stored nothing yet"
        return self._bodies

    def append(self, key: Tensor, value: Tensor, angles: Angles, *, hold: bool = False) -> None:
        """Store new tokens; whatever leaves the recent window is encoded, once and for good.

        Args:
            key: (batch, num_kv_heads, tokens, key_dim) after RoPE.
            value: (batch, num_kv_heads, tokens, value_dim).
            angles: (start, stop) -> (cos, sin) of stored tokens, each (tokens, batch, width / 2)
                float32.
            hold: leave the last few tokens past the window in it until `commit`; they read as if
                encoded. Cropping can then take tokens back without a trace.

        Raises:
            RunError: when a state is not finite.
        """
        self.take(key, value)
        self.commit(angles, held=_HELD_TOKENS if hold else 0)

    def take(self, key: Tensor, value: Tensor) -> None:
        """Store new tokens exactly, encoding none; see `append`."""
        if self._bodies is None:
            self._start(key, value)
        arriving, before = (key, value), self.tokens
        missing = max(self.spec.sink_tokens - self.sinks, 0)
        if missing:
            self._exact["sink"] = join(self._exact["sink"], cut(arriving, 0, missing))
        self.tokens += key.shape[2]
        keep_padded_sinks(self._exact["sink"], self.padding, arriving, before)
        self._exact["window"] = self._behind_window(cut(arriving, missing))

    def commit(self, angles: Angles, *, held: int = 0) -> None:
        """Encode what is past the recent window, but for the last `held` tokens of it."""
        leaving, staying = self._split_window(held)
        if leaving[0].shape[2]:
            self._add(self._encode(leaving, angles), angles)
            self._exact["window"] = own(staying)

    def _behind_window(self, states: Pair) -> Pair:
        return join(self.window, states)

    def _add(self, encoded: tuple[Rows, Rows], angles: Angles) -> None:
        """Put encoded tokens behind the body."""
        for body, rows in zip(self.bodies, encoded, strict=True):
            body.append(rows)

    def read(self, angles: Angles, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return the keys (after RoPE) and values of tokens from `start` on, (B, H, tokens, D) in
        the model's dtype; tokens before the pages that were dropped are gone.
        """
        (sink_key, sink_value) = self._exact["sink"]
        leaving, (window_key, window_value) = self._split_window()
        has_sinks = start < self.sinks + self.dropped
        assert not (has_sinks and self.dropped), "dropped tokens are not read"
        first = 0 if has_sinks else self.sinks + self.dropped
        keys, values = ([sink_key], [sink_value]) if has_sinks else ([], [])
        at = self.sinks + self.dropped
        parts = [(at, (self.bodies[0].read(), self.bodies[1].read()))]
        if leaving[0].shape[2]:
            parts.append((at + self.bodies[0].tokens, self._encode(leaving, angles)))
        for begin, rows in parts:
            if rows[0]:
                body_key, body_value = self._decode(rows, begin, angles)
                keys.append(body_key)
                values.append(body_value)
        key = torch.cat([*keys, window_key], dim=2)
        value = torch.cat([*values, window_value], dim=2)
        put_padded_sinks(self._exact["sink"], self.padding, (key, value), first)
        return cut((key, value), start - first)

    def drop_unseen(self) -> None:
        """Free what a sliding layer's queries will not see again: whole pages."""
        body = dropped_tokens(self.spec, self.tokens, self.sliding_window) - self.dropped
        if body > 0:
            for side in self.bodies:
                side.drop(body)
            self.dropped += body

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens. Tokens that were packed stay packed, also where the
        window has room again.
        """
        sink = min(tokens, self.sinks)
        body = min(tokens - sink - self.dropped, self.bodies[0].tokens)
        stored = self.sinks + self.dropped if self.dropped else 0
        if body < 0 or self._first_seen(tokens) < stored:
            raise RunError(
                "a sliding layer has dropped what cropping would bring back; record the past first"
            )
        group = self.spec.key.token_group or 1
        if body % group:
            raise RunError(
                f"{tokens} tokens end within a group of {group} that share ranges; "
                f"crop to a multiple of {group} behind the sinks, or to the exact tokens"
            )
        for part, length in (("sink", sink), ("window", tokens - sink - self.dropped - body)):
            self._exact[part] = own(cut(self._exact[part], 0, length))
        for side in self.bodies:
            side.truncate(body)
        self.tokens = min(tokens, self.tokens)

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences: the new batch is `sequences`, (new_batch,) int64
        indices.
        """
        if self.padding:
            self.padding = tuple(self.padding[i] for i in sequences.tolist())
        self._exact = {part: (k[sequences], v[sequences]) for part, (k, v) in self._exact.items()}
        for side in self.bodies:
            side.select(sequences)

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """Every allocated tensor, by the buffer names of `memory.layer_buffers`."""
        if self._bodies is None:
            return {}
        named = {name: [t] for name, t in self._exact_named().items()}
        for side, body in zip(SIDES, self._bodies, strict=True):
            named |= {f"{side}.{name}": tensors for name, tensors in body.tensors.items()}
        return named

    def canonical(self) -> dict[str, Tensor]:
        """Return the layer's content in the layout of saved caches, spare room left out."""
        named = zip(SIDES, self.bodies, strict=True)
        rows = {f"{side}.{name}": t for side, body in named for name, t in body.read().items()}
        return self._exact_named() | rows

    def _exact_named(self) -> dict[str, Tensor]:
        return {
            f"{part}.{side}": t
            for part, pair in self._exact.items()
            for side, t in zip(SIDES, pair, strict=True)
        }

    def restore(self, exact: dict[str, Pair], rows: tuple[Rows, Rows], tokens: int) -> None:
        """Fill an empty store with what a store of `tokens` tokens held: sink and window states,
        and encoded rows.
        """
        self._start(*exact["window"])
        self._exact = dict(exact)
        self.dropped = dropped_tokens(self.spec, tokens, self.sliding_window)
        for side, buffers in zip(self.bodies, rows, strict=True):
            if buffers:
                side.append(buffers)
        self.tokens = tokens

    @property
    def sinks(self) -> int:
        """Sink tokens stored."""
        return self._exact["sink"][0].shape[2]

    def _first_seen(self, tokens: int) -> int:
        """Return the first token that the query after `tokens` tokens sees."""
        return max(tokens - self.sliding_window + 1, 0) if self.sliding_window else 0

    def _start(self, key: Tensor, value: Tensor) -> None:
        self._exact = dict.fromkeys(("sink", "window"), own(cut((key, value), 0, 0)))
        self._codebooks = tuple(book.to(key.device) for book in self._codebooks)  # type: ignore[assignment]  # a pair
        channels = key.shape[1] * key.shape[3], value.shape[1] * value.shape[3]
        self._bodies = self._new_bodies(channels, key.shape[0])

    def _new_bodies(self, channels: tuple[int, int], batch: int) -> tuple[Body, Body]:
        """Return empty bodies for keys and values of so many channels."""
        key = PackedBody(self.spec.key, channels[0], batch)
        return key, PackedBody(self.spec.value, channels[1], batch)

    def _split_window(self, held: int = 0) -> tuple[Pair, Pair]:
        """Return the exact states that are past the recent window and `held` more, and the rest."""
        past = packed_tokens(self.spec, self.window[0].shape[2] - held)
        return cut(self.window, 0, past), cut(self.window, past)

    def _encode(self, leaving: Pair, angles: Angles, ahead: int = 0) -> tuple[Rows, Rows]:
        """Encode tokens (B, H, tokens, D), `ahead` tokens behind the body, some at a time."""
        tokens, size = leaving[0].shape[2], tokens_at_once(self.batch, self.spec.key.token_group)
        if tokens > size and not self.spec.adaptive:
            parts = ((cut(leaving, i, i + size), ahead + i) for i in range(0, tokens, size))
            return join_rows([self._encode(part, angles, at) for part, at in parts])
        return self._encode_rows(self._flat(leaving, angles, ahead), leaving[0].dtype)

    def _flat(self, leaving: Pair, angles: Angles, ahead: int = 0) -> Pair:
        """Return the same tokens as rows (tokens * batch, channels) float32, keys as stored."""
        start = self.sinks + self.dropped + self.bodies[0].tokens + ahead
        states = [to_rows(leaving[0]), to_rows(leaving[1])]
        if self.rotation is not None:
            cos, sin = (part[:, :, None] for part in angles(start, start + len(states[0])))
            states[0] = self.rotation.unrotate(states[0], cos, sin)
        return flatten_pair((states[0], states[1]), self.spec, self.layer)

    def _encode_rows(self, states: Pair, dtype: torch.dtype) -> tuple[Rows, Rows]:
        """Encode rows (tokens * batch, channels) of the tokens that follow the body."""
        return encode_pair(states, self.spec, self._codebooks, dtype)

    def _decode_rows(self, rows: tuple[Rows, Rows]) -> Pair:
        """Decode what `_encode_rows` gave: (tokens * batch, channels) float32 each."""
        channels = self.bodies[0].channels, self.bodies[1].channels
        return decode_pair(rows, self.spec, self._codebooks, channels)

    def _decode(self, rows: tuple[Rows, Rows], start: int, angles: Angles) -> Pair:
        """Decode rows of the tokens from `start` on: keys after RoPE and values, (B, H, T, D)."""
        heads = self.geometry.num_kv_heads
        states = list(split_pair(self._decode_rows(rows), self.spec, self.batch, heads))
        if self.rotation is not None:
            cos, sin = (part[:, :, None] for part in angles(start, start + len(states[0])))
            states[0] = self.rotation.rotate(states[0], cos, sin)
        dtype = self._exact["window"][0].dtype
        return from_rows(states[0], dtype), from_rows(states[1], dtype)
