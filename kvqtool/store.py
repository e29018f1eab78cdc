"""One layer's cache: `[sink | packed body | recent window]`, keys and values.

Sinks and window hold what the model handed over (keys after RoPE, in its dtype). The body holds
codes of keys before RoPE and of values, and nothing else: reading it decodes, rotates and returns
fresh tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.errors import RunError
from kvqtool.memory import LayerGeometry, dropped_tokens
from kvqtool.methods import get_method
from kvqtool.packed import PackedBody
from kvqtool.padding import keep_padded_sinks, put_padded_sinks
from kvqtool.seam import LayerSeam
from kvqtool.spec import KvSpec, QuantSpec

Angles = Callable[[int, int], tuple[Tensor, Tensor]]


class LayerStore:
    """Everything one layer has stored, and the only code that encodes and decodes it."""

    def __init__(
        self,
        spec: KvSpec,
        codebooks: tuple[Codebook, Codebook],
        seam: LayerSeam,
    ) -> None:
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
        self._bodies: tuple[PackedBody, PackedBody] | None = None
        self.tokens = 0
        self.dropped = 0
        self.padding: tuple[int, ...] = ()

    @property
    def geometry(self) -> LayerGeometry:
        """The layer's shapes, from the states it was given."""
        key, value = self._exact["window"]
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
    def bodies(self) -> tuple[PackedBody, PackedBody]:
        """The packed keys and values."""
        assert self._bodies is not None, "the layer has stored nothing yet"
        return self._bodies

    def append(self, key: Tensor, value: Tensor, angles: Angles) -> None:
        """Store new tokens; whatever leaves the recent window is encoded, once and for good.

        Args:
            key: (batch, num_kv_heads, tokens, key_dim) after RoPE.
            value: (batch, num_kv_heads, tokens, value_dim).
            angles: (start, stop) -> (cos, sin) of stored tokens, each (tokens, batch, width / 2)
                float32.

        Raises:
            RunError: when a state is not finite.
        """
        if self._bodies is None:
            self._start(key, value)
        arriving, before = (key, value), self.tokens
        sinks_missing = self.spec.sink_tokens - self.sinks
        if sinks_missing > 0:
            taken = key[:, :, :sinks_missing], value[:, :, :sinks_missing]
            self._exact["sink"] = _join(self._exact["sink"], taken)
            key, value = key[:, :, sinks_missing:], value[:, :, sinks_missing:]
        self.tokens += arriving[0].shape[2]
        keep_padded_sinks(self._exact["sink"], self.padding, arriving, before)
        pool = _join(self._exact["window"], (key, value))
        leaving = pool[0].shape[2] - self.spec.residual_length
        if leaving > 0:
            start = self.sinks + self.dropped + self.bodies[0].tokens
            self._encode(pool[0][:, :, :leaving], pool[1][:, :, :leaving], angles, start)
            pool = pool[0][:, :, leaving:].clone(), pool[1][:, :, leaving:].clone()
        self._exact["window"] = pool

    def read(self, angles: Angles, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return the keys (after RoPE) and values of tokens from `start` on, (B, H, tokens, D) in
        the model's dtype; tokens before the pages that were dropped are gone.
        """
        (sink_key, sink_value), (window_key, window_value) = (
            self._exact["sink"],
            self._exact["window"],
        )
        has_sinks = start < self.sinks + self.dropped
        assert not (has_sinks and self.dropped), "dropped tokens are not read"
        first = 0 if has_sinks else self.sinks + self.dropped
        keys, values = ([sink_key], [sink_value]) if has_sinks else ([], [])
        if self.bodies[0].tokens:
            body_key, body_value = (self._decode(side) for side in (0, 1))
            if self.rotation is not None:
                at = self.sinks + self.dropped
                cos, sin = angles(at, at + self.bodies[0].tokens)
                body_key = self.rotation.rotate(body_key, cos[:, :, None], sin[:, :, None])
            keys.append(_from_rows(body_key, window_key.dtype))
            values.append(_from_rows(body_value, window_value.dtype))
        key, value = (
            torch.cat([*keys, window_key], dim=2),
            torch.cat([*values, window_value], dim=2),
        )
        put_padded_sinks(self._exact["sink"], self.padding, (key, value), first)
        return key[:, :, start - first :], value[:, :, start - first :]

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
        if body < 0 or (self.sliding_window and self._first_seen(tokens) < self._first_stored()):
            raise RunError(
                "a sliding layer has dropped what cropping would bring back; record the past first"
            )
        kept = {"sink": sink, "window": tokens - sink - self.dropped - body}
        for part, length in kept.items():
            key, value = self._exact[part]
            self._exact[part] = key[:, :, :length].clone(), value[:, :, :length].clone()
        for side in self.bodies:
            side.truncate(body)
        self.tokens = min(tokens, self.tokens)

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences: the new batch is `sequences`, (new_batch,) int64
        indices.
        """
        if self.padding:
            self.padding = tuple(self.padding[i] for i in sequences.tolist())
        for part, (key, value) in self._exact.items():
            self._exact[part] = key[sequences], value[sequences]
        for side in self.bodies:
            side.select(sequences)

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """Every allocated tensor, by the buffer names of `memory.layer_buffers`."""
        if self._bodies is None:
            return {}
        named = {
            f"{part}.{side}": [t]
            for part, pair in self._exact.items()
            for side, t in zip(_SIDES, pair, strict=True)
        }
        for side, body in zip(_SIDES, self._bodies, strict=True):
            named |= {f"{side}.{name}": tensors for name, tensors in body.tensors.items()}
        return named

    def canonical(self) -> dict[str, Tensor]:
        """Return the layer's content in the layout of saved caches, spare room left out."""
        named = {
            f"{part}.{side}": t
            for part, pair in self._exact.items()
            for side, t in zip(_SIDES, pair, strict=True)
        }
        for side, body in zip(_SIDES, self.bodies, strict=True):
            named |= {f"{side}.{name}": tensor for name, tensor in body.read().items()}
        return named

    def restore(
        self,
        exact: dict[str, tuple[Tensor, Tensor]],
        rows: tuple[dict[str, Tensor], dict[str, Tensor]],
        tokens: int,
    ) -> None:
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

    def _first_stored(self) -> int:
        return self.sinks + self.dropped if self.dropped else 0

    def _start(self, key: Tensor, value: Tensor) -> None:
        none = key[:, :, :0].clone(), value[:, :, :0].clone()
        self._exact = {"sink": none, "window": none}
        self._codebooks = tuple(book.to(key.device) for book in self._codebooks)  # type: ignore[assignment]  # a pair
        batch = key.shape[0]
        self._bodies = (
            PackedBody(self.spec.key, key.shape[1] * key.shape[3], batch),
            PackedBody(self.spec.value, value.shape[1] * value.shape[3], batch),
        )

    def _encode(self, key: Tensor, value: Tensor, angles: Angles, start: int) -> None:
        rows = _to_rows(key), _to_rows(value)
        if self.rotation is not None:
            cos, sin = angles(start, start + key.shape[2])
            rows = self.rotation.unrotate(rows[0], cos[:, :, None], sin[:, :, None]), rows[1]
        for body, states, spec, book in zip(
            self.bodies, rows, (self.spec.key, self.spec.value), self._codebooks, strict=True
        ):
            if not torch.isfinite(states).all():
                raise RunError(
                    f"layer {self.layer} produced NaN or infinite states; "
                    "run in float32 or check the model"
                )
            flat = states.reshape(-1, body.channels)
            body.append(
                get_method(spec.method).quantize(_stored_dtype(flat, spec, key.dtype), book, spec)
            )

    def _decode(self, side: int) -> Tensor:
        """Return one side's body as (tokens, batch, heads, head_dim) float32, keys as they were
        stored.
        """
        body, spec = self.bodies[side], (self.spec.key, self.spec.value)[side]
        flat = get_method(spec.method).dequantize(
            body.read(), self._codebooks[side], spec, body.channels
        )
        return flat.view(body.tokens, body.batch, self._exact["window"][side].shape[1], -1)


_SIDES = ("key", "value")


def _stored_dtype(states: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """Give fp its states in the model's dtype; codecs take float32."""
    return states.to(dtype) if spec.method == "fp" else states


def _join(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([left[0], right[0]], dim=2), torch.cat([left[1], right[1]], dim=2)


def _to_rows(states: Tensor) -> Tensor:
    """(B, H, T, D) -> (T, B, H, D) float32: the order rows are stored in."""
    return states.permute(2, 0, 1, 3).float()


def _from_rows(states: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, B, H, D) -> (B, H, T, D) in the model's dtype."""
    return states.permute(1, 2, 0, 3).to(dtype)
