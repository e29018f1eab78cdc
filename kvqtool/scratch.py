"""The memory that reading and writing a packed cache takes for a moment: the torch path.

This is the read path reports call `torch (materialise)`: `update` packs the new states, decodes
the layer's whole body into fresh tensors in the model's dtype, and stock attention runs on those.
One layer is in flight at a time. Each formula follows the tensors that are alive at the highest
point of the code it names; tests trace them. A read path of kernels gets a module of its own with
the same three functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from kvqtool.layers import CacheLayer, CacheModel
from kvqtool.memory import (
    ITEM_BYTES,
    PAGE_TOKENS,
    body_buffers,
    dropped_tokens,
    groups_per_token,
    split_tokens,
    units_per_token,
)
from kvqtool.side import EXACT, WIDTHS, QuantSpec
from kvqtool.spec import KvSpec

READ_PATH: Final = "torch (materialise)"
_FLOAT: Final = ITEM_BYTES["float32"]
QUERIES_AT_ONCE: Final = 256  # whose weights are written out where a recent window is mixed
# Tokens of all sequences that are encoded at a time, so that what that takes for a moment does not
# grow with a prompt.
ROWS_AT_ONCE: Final = 8192
ELEMENTS_AT_ONCE: Final = 1 << 25  # keys, where kernels work: 64 MiB of states a side
# Codes of one period whose lowest bit lies in the fullest of its words: see bits.pack_codes.
_LANES: Final = {2: 1.0, 3: 11 / 32, 4: 1.0, 8: 1.0}


@dataclass(frozen=True)
class Step:
    """One call of the model that puts new tokens into the cache.

    Args:
        cache: the cache.
        tokens: tokens of each sequence after the call.
        fresh: how many of them are new.
        is_joined: whether the body lies in several blocks, which reading joins first.
        num_heads: query heads.
        score_bytes: what attention takes for each score, where it writes them out; else 0.
    """

    cache: CacheModel
    tokens: int
    fresh: int
    is_joined: bool
    num_heads: int
    score_bytes: int = 0

    @property
    def item(self) -> int:
        """Bytes of a number in the model's dtype."""
        return ITEM_BYTES[self.cache.dtype]

    def spec_of(self, layer: CacheLayer) -> KvSpec:
        """Return a layer's scheme."""
        return layer.own_spec or self.cache.spec

    @property
    def is_first(self) -> bool:
        """Whether the cache was empty, so that queries attend to the states as they came."""
        return self.fresh == self.tokens

    def has_mask(self, layer: CacheLayer) -> bool:
        """Whether attention needs a mask: several queries that see different parts of the past."""
        is_cut = layer.window is not None and self.tokens >= layer.window
        return self.fresh > 1 and (not self.is_first or is_cut)

    def seen(self, layer: CacheLayer) -> int:
        """Return the tokens that a call's queries see, all together."""
        window = self.tokens if layer.window is None else layer.window - 1 + self.fresh
        return min(self.tokens, window)

    @cached_property
    def mask_bytes(self) -> int:
        """One mask for each kind of window there is, made once a call."""
        layers = {layer.window: layer for layer in self.cache.distinct if layer.is_growing}
        return sum(self.fresh * self.seen(x) for x in layers.values() if self.has_mask(x))

    def table_bytes(self, tokens: int) -> int:
        """Return the bytes of float32 cosines and sines of `tokens` tokens, as caches keep them."""
        width = max((angles.width for angles in self.cache.angles), default=0)
        return width * tokens * self.cache.batch * _FLOAT


def pages_at_once(batch: int, channels: int) -> int:
    """Return the tokens of each of `batch` sequences that kernels pack or decode at a time, whole
    pages: many, since a host may take a millisecond to ask for it.
    """
    return max(ELEMENTS_AT_ONCE // (batch * channels) // PAGE_TOKENS, 1) * PAGE_TOKENS


def tokens_at_once(batch: int, multiple: int | None = None) -> int:
    """Return the tokens of each of `batch` sequences that torch encodes at a time, a multiple of
    `multiple`.
    """
    return max(ROWS_AT_ONCE // batch // (multiple or 1), 1) * (multiple or 1)


def append_scratch(layer: CacheLayer, step: Step) -> int:
    """Return the most that packing a call's new tokens takes, above what is kept: `_encode`.

    Example: int4 keys and values of equal width, bfloat16: 33 bytes for each new key number, of
    which 2 for all of them and the rest for those that are encoded at a time.
    """
    spec, geometry, batch = step.spec_of(layer), layer.geometry, step.cache.batch
    held = step.item * step.fresh * batch * geometry.elements  # the window they pass through
    tokens = min(step.fresh, tokens_at_once(batch, spec.key.token_group))
    if spec.adaptive:
        tokens = step.fresh
    rows = tokens * batch
    held += sum(rows_bytes(layer, step, step.fresh * batch - rows))  # encoded before
    key, value = rows * geometry.key_channels, rows * geometry.value_channels
    held += _FLOAT * (key + value)
    held += step.table_bytes(tokens) if _turned(layer, step) else 0
    flat = 0 if _turned(layer, step) else _FLOAT * key
    packed = rows_bytes(layer, step, rows)[0]
    turning = 2 * _FLOAT * rows * _turned(layer, step)
    return held + max(
        turning,
        flat + _FLOAT * value,  # rows of heads, and the same without
        _encoding(spec.key, geometry.key_channels, rows, step.item),
        packed + _encoding(spec.value, geometry.value_channels, rows, step.item),
    )


def read_scratch(layer: CacheLayer, step: Step) -> int:
    """Return the most that reading a layer takes, its result included: `LayerStore.read`.

    Example: equal widths, one block: 20 bytes for each stored key number, of which 4 are kept.
    """
    spec, geometry = step.spec_of(layer), layer.geometry
    rows = _stored(layer, step) * step.cache.batch
    key, value = rows * geometry.key_channels, rows * geometry.value_channels
    joined = sum(rows_bytes(layer, step, rows)) if step.is_joined else 0
    is_exact = spec.key.method == EXACT
    decoded = (_FLOAT if not is_exact or step.item != _FLOAT else 0) * (key + value)
    if is_exact:
        decoding = decoded
    else:
        ranges = 2 * _FLOAT * rows * groups_per_token(spec.value, geometry.value_channels)
        decoding = max(4 * _FLOAT * key, _FLOAT * key + 4 * _FLOAT * value + ranges)
    turning = decoded + 2 * _FLOAT * rows * _turned(layer, step)
    turning += step.table_bytes(step.tokens) if _turned(layer, step) else 0
    if spec.value.rotated:
        tables = step.table_bytes(step.tokens) if _turned(layer, step) else 0
        turning = max(turning, _FLOAT * key + 4 * _FLOAT * value + tables)
    if 0 < _turned(layer, step) < geometry.key_channels:
        turning += _FLOAT * key  # what is not rotated is put around what is
    cast = step.item * (key + value)
    rounding = decoded + (cast if step.item != _FLOAT else 0)
    held = joined + _window_bytes(layer, step)
    return held + max(decoding, turning, rounding, cast + shown_bytes(layer, step))


def shown_bytes(layer: CacheLayer, step: Step) -> int:
    """Return the bytes of the keys and values that attention is shown."""
    if step.is_first:
        return 0  # the states as they came, which the layer's activations count
    sink, _, window = layer.parts(step.cache.spec, step.tokens)
    rows = (sink + _stored(layer, step) + window) * step.cache.batch
    return step.item * rows * layer.geometry.elements


def attention_scratch(layer: CacheLayer, step: Step) -> int:
    """Return what stock attention takes beside the states it is shown and its output.

    With a mask, transformers repeats keys and values for all query heads and torch turns the mask
    into numbers. A recent window mixes two scores, which are written out, as eager attention does.
    """
    seen = step.seen(layer)
    scores = step.cache.batch * step.fresh * seen
    kv_heads, repeated = layer.geometry.num_kv_heads, 0
    if 1 < kv_heads < step.num_heads:  # one head is repeated without a copy
        repeats = step.num_heads // kv_heads
        repeated = step.item * step.cache.batch * seen * layer.geometry.elements * repeats
    if step.score_bytes:
        return repeated + step.num_heads * scores * step.score_bytes
    if not step.has_mask(layer):
        return 0
    if step.cache.spec.has_window and layer.is_packed:
        rows = min(step.fresh, QUERIES_AT_ONCE)
        ages = ITEM_BYTES["int64"] * rows * seen
        tail = _window_bytes(layer, step) + step.item * step.fresh * layer.geometry.elements
        return 2 * _FLOAT * step.num_heads * step.cache.batch * rows * seen + ages + tail
    return repeated + step.item * scores


def _stored(layer: CacheLayer, step: Step) -> int:
    """Return the packed tokens while a call reads them: a sliding layer drops some afterwards."""
    spec, before = step.cache.spec, step.tokens - step.fresh
    dropped = dropped_tokens(spec, step.tokens, layer.window)
    return layer.parts(spec, step.tokens)[1] + dropped - dropped_tokens(spec, before, layer.window)


def _window_bytes(layer: CacheLayer, step: Step) -> int:
    """Return the bytes of the recent window as it was before the call, which a call holds on to."""
    window = split_tokens(step.cache.spec, step.tokens - step.fresh)[2]
    return step.item * step.cache.batch * window * layer.geometry.elements


def _turned(layer: CacheLayer, step: Step) -> int:
    """Return the channels of one token's keys that are rotated on the way in and out."""
    if layer.angles is None or not step.cache.spec.key.pre_rope:
        return 0
    return layer.geometry.num_kv_heads * layer.angles.width


def rows_bytes(layer: CacheLayer, step: Step, rows: int) -> tuple[int, int]:
    """Return the bytes of encoded keys and values without spare room."""
    spec, geometry, dtype = step.spec_of(layer), layer.geometry, step.cache.dtype
    outliers = layer.outliers(spec, rows, bound=False)
    units, widths = units_per_token(spec, geometry), (outliers.key_widths, outliers.value_widths)
    channels = geometry.key_channels // units, geometry.value_channels // units
    rows *= units
    key = body_buffers(spec.key, channels[0], rows, outliers.key, dtype, widths[0])
    value = body_buffers(spec.value, channels[1], rows, outliers.value, dtype, widths[1])
    sizes = [sum(buffer.nbytes for buffer in side.values()) for side in (key, value)]
    return sizes[0], sizes[1]


def _encoding(spec: QuantSpec, channels: int, rows: int, item: int) -> int:
    """Return the most that `codec.encode` takes for rows of float32 states, those apart."""
    if spec.method == EXACT:
        return item * rows * channels
    marks = 1 if spec.outlier_fraction else 0
    groups = groups_per_token(spec, channels)
    wide = _FLOAT if groups > 1 else 0
    normalizing = 2 * _FLOAT + marks
    if spec.outlier_cap is not None and spec.outlier_cap < channels:
        normalizing = 6 * _FLOAT + marks  # ranked: distances, their masked copy, values and indices
    elif spec.compensated:
        normalizing = 6 * _FLOAT + 2 * marks  # in order of rounding: states, codes, what is owed
    elif marks and not spec.per_channel:
        normalizing = 4 * _FLOAT + marks  # the least and the greatest are looked for without them
    bits = WIDTHS[-1] if spec.is_adaptive else spec.bits
    packing = 3 * _FLOAT + wide + marks + _FLOAT * _LANES[bits] + bits / 8
    return int(rows * channels * max(normalizing, packing))
