"""The memory that the kernels' read path takes for a moment, beside the pages themselves.

A prompt is packed `scratch.pages_at_once` tokens at a time. The pages of all layers have some room
behind them and one that takes new tokens; a layer's pages are copied when their room runs out.
Several queries attend to pages that are decoded as many at a time, one query to the pages as they
are. The formulas are bounds: each names what is alive where the code is highest.
"""

from __future__ import annotations

from typing import Final

from kvqtool.layers import CacheLayer
from kvqtool.memory import ITEM_BYTES, PAGE_TOKENS, SLAB_TOKENS, outliers_per_tail
from kvqtool.scratch import Step, pages_at_once, rows_bytes
from kvqtool.side import QuantSpec
from kvqtool.spec import KvSpec

GROWTH: Final = 16  # pages have room for this share of them, once they have grown
_FLOAT: Final = ITEM_BYTES["float32"]
_METHODS: Final = ("nuq", "int", "nf")
_SPILLED: Final = 2 * ITEM_BYTES["int64"]  # an outlier that is noted once more, on both sides


def unreadable_side(spec: QuantSpec, *, is_key: bool) -> str | None:
    """Return why kernels cannot read keys or values of a scheme, or None where they can."""
    side = "keys" if is_key else "values"
    if spec.method not in _METHODS:
        return f"{side} stored as {spec.method}"
    if spec.bits == 8 and spec.channel_levels:
        return f"a codebook per channel of {spec.bits}-bit {side}"
    if is_key != spec.per_channel:
        return f"{side} with a range per {'token' if is_key else 'channel'}"
    return f"{side} with a range per group of channels" if spec.group_size else None


def unplannable(spec: KvSpec, layer: CacheLayer) -> str | None:
    """Return why a layer's kernels are not planned, or None where they are."""
    if not layer.is_packed or layer.window is not None:
        return f"{layer.kind} layers"
    if layer.geometry.key_dim != layer.geometry.value_dim:
        return "keys and values of different size"
    if spec.adaptive or spec.has_window:
        return "bits by token or a recent window"
    return unreadable_side(spec.key, is_key=True) or unreadable_side(spec.value, is_key=False)


def room_bytes(layer: CacheLayer, step: Step) -> int:
    """Return the most room that a layer's pages keep behind them, and their open page: states, and
    lists of outliers as long as they can be.
    """
    spec, geometry, batch = step.spec_of(layer), layer.geometry, step.cache.batch
    pages = sum(rows_bytes(layer, step, step.tokens * batch)) // GROWTH
    states = step.item * PAGE_TOKENS * geometry.elements
    most = SLAB_TOKENS * geometry.key_dim
    value = 2 * outliers_per_tail(spec.value, geometry.value_channels) * SLAB_TOKENS
    listed = (most if spec.key.outlier_fraction else 0) + min(value, most)
    lists = PAGE_TOKENS // SLAB_TOKENS * geometry.num_kv_heads * listed
    return pages + batch * (states + _FLOAT * lists)


def pack_scratch(layer: CacheLayer, step: Step) -> int:
    """Return the most that packing a call's new tokens takes: the states of some of them, angles,
    marks of outliers, codes where rounding is compensated, their pages and lists; and the layer's
    pages, which are copied to grow.
    """
    spec, geometry, batch = step.spec_of(layer), layer.geometry, step.cache.batch
    grown = sum(rows_bytes(layer, step, step.tokens * batch))
    if step.fresh < PAGE_TOKENS:
        return grown  # pages grow when the open one is full
    tokens = min(step.fresh, pages_at_once(batch, geometry.key_channels))
    rows, item = tokens * batch, step.item
    states = item * rows * geometry.elements
    angles = 2 * _FLOAT * rows * geometry.key_dim
    marks = rows * geometry.elements // 4 if spec.key.outlier_fraction else 0
    found = layer.outliers(spec, rows, bound=False)
    lists = (_SPILLED + _FLOAT) * 2 * (found.key + found.value)
    sides = ((spec.key, geometry.key_channels), (spec.value, geometry.value_channels))
    coded = sum((1 + item) * rows * width for side, width in sides if side.compensated)
    return grown + states + angles + marks + coded + lists + sum(rows_bytes(layer, step, rows))


def attend_scratch(layer: CacheLayer, step: Step) -> int:
    """Return the most that attention over pages takes beside the query and its output."""
    if step.is_first or step.fresh == 1:
        return 0
    geometry, batch, item = layer.geometry, step.cache.batch, step.item
    decoded = min(step.tokens, pages_at_once(batch, geometry.key_channels)) * batch
    parts = 2 * item * decoded * geometry.elements  # the last one, while the next is decoded
    rows = step.fresh * batch
    own = 2 * item * rows * geometry.elements
    own += item * rows * step.num_heads * 2 * geometry.key_dim  # a copy for each query head
    results = rows * step.num_heads * geometry.key_dim * (2 * _FLOAT + 2 * item)
    return parts + own + results
