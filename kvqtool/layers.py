"""What each layer of a model keeps of a sequence, by its kind, and the bytes of that.

kvqtool packs full and sliding attention; other layers keep what the model keeps: a latent, an
index, a state that does not grow, or nothing because they read another layer's cache.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from kvqtool.accounting import paper_bytes
from kvqtool.memory import (
    ITEM_BYTES,
    LayerGeometry,
    Outliers,
    capacity,
    dropped_tokens,
    expected_outliers,
    most_outliers,
    part_buffers,
    position_buffer,
    split_tokens,
)
from kvqtool.spec import KvSpec

NO_STATES: Final = LayerGeometry(0, 0, 0)
PACKED_KINDS: Final = ("full", "sliding", "chunked")
KINDS: Final = (*PACKED_KINDS, "latent", "indexed", "linear", "hybrid", "shared", "none")


@dataclass(frozen=True)
class Angles:
    """How a layer's keys are rotated.

    Args:
        group: layers of the same group share what is stored of their tokens' angles.
        width: rotated channels of a head.
        table_after: tokens from which on positions do not give the angles, so that the angles
            themselves are stored; None where positions always do, 0 where they never do.
    """

    group: str
    width: int
    table_after: int | None = None

    def is_table(self, tokens: int) -> bool:
        """Whether a cache of that length stores angles instead of positions."""
        return self.table_after is not None and tokens > self.table_after

    def nbytes(self, batch: int, tokens: int) -> int:
        """Return the bytes stored for a cache's angles, once for each group."""
        if not self.is_table(tokens):
            return position_buffer(batch, tokens).nbytes
        return capacity(tokens) * batch * self.width * ITEM_BYTES["float32"]


@dataclass(frozen=True)
class State:
    """An array of fixed size that a sequence has in a layer; `dtype` None is the model's."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None


@dataclass(frozen=True)
class CacheLayer:
    """One layer's cache.

    Args:
        kind: one of `KINDS`.
        geometry: heads and widths of keys and values; of a latent, the latent and its rotated part.
        window: tokens a query sees, itself included; None for all.
        angles: how keys are rotated; None where kvqtool stores keys as they come.
        states: arrays that do not grow.
        index_channels: numbers a token adds for sparse attention's indexer.
        own_spec: the layer's own scheme, where a bundle spends bits by layer.
    """

    kind: str
    geometry: LayerGeometry = NO_STATES
    window: int | None = None
    angles: Angles | None = None
    states: tuple[State, ...] = ()
    index_channels: int = 0
    own_spec: KvSpec | None = None

    @property
    def is_packed(self) -> bool:
        """Whether kvqtool stores this layer; others keep the model's own cache."""
        return self.kind in PACKED_KINDS

    @property
    def is_growing(self) -> bool:
        """Whether every further token is kept in some form."""
        return self.geometry.elements > 0

    def seen(self, tokens: int) -> int:
        """Return how many of `tokens` the model's own cache would hold."""
        return min(tokens, (self.window or tokens + 1) - 1)

    def parts(self, spec: KvSpec, tokens: int) -> tuple[int, int, int]:
        """Return the tokens that are sinks, in the packed body and in the recent window."""
        sink, body, window = split_tokens(spec, tokens)
        return sink, body - dropped_tokens(spec, tokens, self.window), window

    def outliers(self, spec: KvSpec, rows: int, *, bound: bool) -> Outliers:
        """Return the outliers of `rows` packed tokens, as expected or at most."""
        return (most_outliers if bound else expected_outliers)(spec, self.geometry, rows)

    def own_bytes(self, batch: int, tokens: int, dtype: str) -> dict[str, int]:
        """Return what the model's own cache would hold, by name, in `dtype`."""
        item, held = ITEM_BYTES[dtype], batch * self.seen(tokens)
        named = {
            "own.key": held * self.geometry.key_channels * item,
            "own.value": held * self.geometry.value_channels * item,
            "own.index": held * self.index_channels * item,
        }
        for state in self.states:
            size = batch * math.prod(state.shape) * ITEM_BYTES[state.dtype or dtype]
            named[f"state.{state.name}"] = named.get(f"state.{state.name}", 0) + size
        return {name: size for name, size in named.items() if size}


@dataclass(frozen=True)
class CacheModel:
    """A model's whole cache under one spec, batch and dtype; its length is still free.

    Args:
        layers: the layers, in order.
        spec: the scheme of the packed ones.
        batch: sequences.
        dtype: the model's, which sinks, recent window, `fp` and the model's own caches have.
    """

    layers: tuple[CacheLayer, ...]
    spec: KvSpec
    batch: int
    dtype: str

    @cached_property
    def counted(self) -> Counter[CacheLayer]:
        """The distinct layers and how many there are of each; angles only count by group."""
        return Counter(replace(layer, angles=None) for layer in self.layers)

    @cached_property
    def distinct(self) -> tuple[CacheLayer, ...]:
        """One of each kind of layer there is."""
        return tuple(dict.fromkeys(self.layers))

    @cached_property
    def angles(self) -> tuple[Angles, ...]:
        """The distinct angles that are stored: none where keys are packed after RoPE."""
        if not self.spec.key.pre_rope:
            return ()
        found = {layer.angles.group: layer.angles for layer in self.layers if layer.angles}
        return tuple(found.values())

    def breakdown(self, tokens: int, *, bound: bool = False) -> dict[str, int]:
        """Return bytes by buffer name, all layers together.

        Args:
            tokens: tokens of each sequence.
            bound: count the most outliers there can be instead of the expected ones.
        """
        sums: Counter[str] = Counter()
        for layer, count in self.counted.items():
            for name, size in self.layer_bytes(layer, tokens, bound=bound).items():
                sums[name] += count * size
        for angles in self.angles:
            sums["angles"] += angles.nbytes(self.batch, tokens)
        return dict(sums)

    def layer_bytes(
        self,
        layer: CacheLayer,
        tokens: int,
        outliers: Outliers | None = None,
        *,
        bound: bool = False,
    ) -> dict[str, int]:
        """Return the bytes of one layer, by buffer name.

        Args:
            layer: the layer.
            tokens: tokens of each sequence.
            outliers: how many its body holds; None to expect them, or to bound them.
            bound: count the most outliers there can be.
        """
        if not layer.is_packed:
            return layer.own_bytes(self.batch, tokens, self.dtype)
        spec = layer.own_spec or self.spec
        parts = layer.parts(spec, tokens)
        if outliers is None:
            outliers = layer.outliers(spec, parts[1] * self.batch, bound=bound)
        buffers = part_buffers(spec, layer.geometry, self.batch, parts, outliers, self.dtype)
        return {name: buffer.nbytes for name, buffer in buffers.items()}

    def nbytes(self, tokens: int, *, bound: bool = False) -> int:
        """Return the bytes allocated at a length."""
        return sum(self.breakdown(tokens, bound=bound).values())

    def bytes_given(self, tokens: int, outliers: Sequence[Outliers]) -> int:
        """Return the bytes that packed layers and angles allocate, given each packed layer's
        outliers; equal to the allocated `nbytes`.
        """
        packed = [layer for layer in self.layers if layer.is_packed]
        total = sum(
            sum(self.layer_bytes(layer, tokens, count).values())
            for layer, count in zip(packed, outliers, strict=True)
        )
        return total + sum(angles.nbytes(self.batch, tokens) for angles in self.angles)

    def fp16_bytes(self, tokens: int) -> int:
        """Return the bytes of the model's own cache with 16-bit floats."""
        return sum(
            count * sum(layer.own_bytes(self.batch, tokens, "float16").values())
            for layer, count in self.counted.items()
        )

    def paper_bytes(self, tokens: int) -> float:
        """Return the bytes by KVQuant's own accounting; what is not packed counts as it is."""
        return sum(
            count
            * (
                paper_bytes(
                    layer.own_spec or self.spec, (layer.geometry,), self.batch, layer.seen(tokens)
                )
                if layer.is_packed
                else sum(layer.own_bytes(self.batch, tokens, "float16").values())
            )
            for layer, count in self.counted.items()
        )

    def elements(self, tokens: int) -> int:
        """Return how many numbers the cache holds at a length."""
        return self.fp16_bytes(tokens) // 2
