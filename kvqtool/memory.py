"""The size of every buffer of a compressed cache, from a spec and shapes; arithmetic only.

One truth for three readers: the store allocates what `body_buffers` says, the report sums real
tensors that have these shapes, and the planner sums the same table for a cache nobody has
allocated. Bytes are bytes, never GB or GiB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from kvqtool.errors import InputError
from kvqtool.side import EXACT, NORMED, WIDTHS, QuantSpec, exact_share, rows_by_width
from kvqtool.spec import KvSpec

PAGE_TOKENS: Final = 128
SLAB_TOKENS: Final = 64  # what a warp of a CUDA kernel reads at once: half a page of one KV head
TILE_ROWS: Final = 16  # rows of one width that are allocated at once
WORD_BITS: Final = 32
MAX_CHANNELS: Final = 32767  # what a 16-bit outlier index and count can say
ITEM_BYTES: Final[dict[str, int]] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "uint8": 1,
}


@dataclass(frozen=True)
class LayerGeometry:
    """Shapes of one attention layer's cache: heads and the width of a key and of a value head."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def key_channels(self) -> int:
        """Channels of one token's keys, all heads together."""
        return self.num_kv_heads * self.key_dim

    @property
    def value_channels(self) -> int:
        """Channels of one token's values, all heads together."""
        return self.num_kv_heads * self.value_dim

    @property
    def elements(self) -> int:
        """Numbers one token puts into this layer, keys and values together."""
        return self.key_channels + self.value_channels


@dataclass(frozen=True)
class Buffer:
    """One array of the cache: its dtype by name and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Outliers:
    """What the tokens of one layer hold beside what the spec fixes, keys and values apart.

    Args:
        key: outliers of all keys.
        value: outliers of all values.
        key_widths: rows of each of WIDTHS where each token has its own; empty otherwise.
        value_widths: likewise.
    """

    key: int
    value: int
    key_widths: tuple[int, ...] = ()
    value_widths: tuple[int, ...] = ()


def capacity(tokens: int) -> int:
    """Return the tokens that the pages of a body with `tokens` tokens have room for."""
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS


def index_dtype(channels: int) -> str:
    """Return the dtype of an outlier's channel index."""
    return "uint8" if channels <= 256 else "int16"


def count_dtype(channels: int) -> str:
    """Return the dtype of a token's outlier count, which runs from 0 to `channels` and so needs 16
    bits at 256.
    """
    return "uint8" if channels <= 255 else "int16"


def outliers_per_tail(spec: QuantSpec, channels: int) -> int:
    """Return how many outliers a per-token side keeps at each end: ceil(f / 2 * C), exactly."""
    top, bottom = exact_share(spec.outlier_fraction)
    return -(-top * channels // (2 * bottom))


def groups_per_token(spec: QuantSpec, channels: int) -> int:
    """Return the number of (scale, offset) pairs, or of norms, a token brings; 0 where calibration
    fixed the ranges.

    Example: 192 channels, int4-g64 -> 3 pairs; nuq3 values -> 1 pair; nuq3 keys -> 0.
    """
    if spec.method == EXACT or spec.per_channel or spec.token_group:
        return 0
    size = spec.group_size or channels
    if channels % size:
        raise InputError(
            f"groups of {size} do not divide the {channels} channels of a layer; choose a divisor"
        )
    return channels // size


def words_per_row(bits: int, channels: int) -> int:
    """Return the 32-bit words that hold one row's codes, the last one padded."""
    return -(-channels * bits // WORD_BITS)


def body_buffers(
    spec: QuantSpec,
    channels: int,
    rows: int,
    outliers: int,
    dtype: str,
    widths: tuple[int, ...] = (),
) -> dict[str, Buffer]:
    """Return the buffers of one side of a packed body.

    Args:
        spec: the side's scheme.
        channels: C, channels of one token on this side, all heads together.
        rows: rows there is room for; a row is one token of one sequence.
        outliers: outliers stored in all rows.
        dtype: the model's dtype, which `fp` stores in.
        widths: where each row has its own bits, the rows of each of WIDTHS. Rows of one width lie
            in order in a buffer of their own, allocated in tiles of TILE_ROWS; `widths` says of
            every row which one, so that its place is its rank among rows of that width.

    Example: nuq3-1% keys, C = 192, 128 rows, 270 outliers ->
        words int32 (128, 18), outlier_counts uint8 (128,), outlier_values float16 (270,),
        outlier_channels uint8 (270,)
    """
    if spec.method == EXACT:
        return {"states": Buffer(dtype, (rows, channels))}
    if spec.is_adaptive:
        buffers = {"widths": Buffer("uint8", (rows,))}
        for bits, count in zip(WIDTHS[1:], (widths or (0,) * len(WIDTHS))[1:], strict=True):
            room = -(-count // TILE_ROWS) * TILE_ROWS
            buffers[f"words{bits}"] = Buffer("int32", (room, words_per_row(bits, channels)))
    else:
        buffers = {"words": Buffer("int32", (rows, words_per_row(spec.bits, channels)))}
    groups = groups_per_token(spec, channels)
    if spec.token_group:
        buffers["group_ranges"] = Buffer("float16", (rows // spec.token_group, channels, 2))
    if groups and spec.method == NORMED:
        buffers["norms"] = Buffer("float16", (rows, groups))
    elif groups:
        buffers["ranges"] = Buffer("float16", (rows, groups, 2))
    if spec.outlier_fraction:
        if spec.per_channel:
            buffers["outlier_counts"] = Buffer(count_dtype(channels), (rows,))
        buffers["outlier_values"] = Buffer("float16", (outliers,))
        buffers["outlier_channels"] = Buffer(index_dtype(channels), (outliers,))
    return buffers


def layer_buffers(
    spec: KvSpec, layer: LayerGeometry, batch: int, tokens: int, outliers: Outliers, dtype: str
) -> dict[str, Buffer]:
    """Return every buffer of one layer's cache `[sink | packed body | recent window]` at a length.

    Args:
        spec: the scheme.
        layer: the layer's shapes.
        batch: sequences.
        tokens: tokens of each sequence.
        outliers: outliers in the layer's body, over all sequences.
        dtype: the model's dtype; sinks and window are kept in it.
    """
    return part_buffers(spec, layer, batch, split_tokens(spec, tokens), outliers, dtype)


def part_buffers(
    spec: KvSpec,
    layer: LayerGeometry,
    batch: int,
    parts: tuple[int, int, int],
    outliers: Outliers,
    dtype: str,
) -> dict[str, Buffer]:
    """Return the same for `parts`: tokens that are sinks, in the body and in the window."""
    (sink, body, window), heads = parts, layer.num_kv_heads
    units = units_per_token(spec, layer)
    rows = capacity(body) * batch * units
    channels = layer.key_channels // units, layer.value_channels // units
    key = body_buffers(spec.key, channels[0], rows, outliers.key, dtype, outliers.key_widths)
    widths = outliers.value_widths
    value = body_buffers(spec.value, channels[1], rows, outliers.value, dtype, widths)
    buffers = {f"key.{name}": buffer for name, buffer in key.items()}
    buffers |= {f"value.{name}": buffer for name, buffer in value.items()}
    for part, length in (("sink", sink), ("window", window)):
        buffers[f"{part}.key"] = Buffer(dtype, (batch, heads, length, layer.key_dim))
        buffers[f"{part}.value"] = Buffer(dtype, (batch, heads, length, layer.value_dim))
    if spec.adaptive:
        buffers["window.attention"] = Buffer("float32", (batch, units, window))
    return buffers


def units_per_token(spec: KvSpec, layer: LayerGeometry) -> int:
    """Return the rows of a token on a side: one for each KV head where these have own bits."""
    return spec.adaptive.units(layer.num_kv_heads) if spec.adaptive else 1


def split_tokens(spec: KvSpec, tokens: int) -> tuple[int, int, int]:
    """Return how many of `tokens` are sinks, in the packed body, and in the recent window, which
    also holds a group of tokens that is not yet whole.
    """
    sink = min(spec.sink_tokens, tokens)
    body = packed_tokens(spec, tokens - sink)
    return sink, body, tokens - sink - body


def packed_tokens(spec: KvSpec, tokens: int) -> int:
    """Return how many of the tokens behind the sinks are packed."""
    past = max(tokens - spec.residual_length, 0)
    return past - past % (spec.key.token_group or 1)


def dropped_tokens(spec: KvSpec, tokens: int, window: int | None) -> int:
    """Return how many packed tokens a layer has dropped: whole pages that no query sees any more.

    Args:
        spec: the scheme.
        tokens: tokens of the sequence so far.
        window: tokens a query sees, itself included; None where it sees all.
    """
    if window is None:
        return 0
    sink, body, _ = split_tokens(spec, tokens)
    unseen = min(max(tokens - window + 1 - sink, 0), body)
    return unseen // PAGE_TOKENS * PAGE_TOKENS


def position_buffer(batch: int, tokens: int) -> Buffer:
    """Return the buffer of token positions, kept once per cache to rotate keys again on read."""
    return Buffer("int32", (capacity(tokens), batch))


def expected_outliers(spec: KvSpec, layer: LayerGeometry, rows: int) -> Outliers:
    """Return the outliers to expect in `rows` packed tokens: exact for values, the calibrated share
    for keys, `planned_bits` where tokens choose their bits.
    """
    return _both_sides(spec, layer, rows, bound=False)


def most_outliers(spec: KvSpec, layer: LayerGeometry, rows: int) -> Outliers:
    """Return the most outliers `rows` packed tokens can hold: every key element unless the spec
    caps them; tokens that choose their bits choose the most.
    """
    return _both_sides(spec, layer, rows, bound=True)


def _both_sides(spec: KvSpec, layer: LayerGeometry, tokens: int, *, bound: bool) -> Outliers:
    units = units_per_token(spec, layer)
    rows, rule = tokens * units, spec.adaptive
    widths = rows_by_width(rows, WIDTHS[-1] if bound else rule.planned_bits) if rule else ()
    return Outliers(
        _outliers(spec.key, layer.key_channels // units, rows, bound=bound),
        _outliers(spec.value, layer.value_channels // units, rows, bound=bound),
        widths,
        widths,
    )


def _outliers(spec: QuantSpec, channels: int, rows: int, *, bound: bool) -> int:
    if not spec.outlier_fraction:
        return 0
    if not spec.per_channel:
        return 2 * outliers_per_tail(spec, channels) * rows
    limit = channels if spec.outlier_cap is None else min(spec.outlier_cap, channels)
    if bound:
        return limit * rows
    top, bottom = exact_share(spec.outlier_fraction)
    return min(limit * rows, -(-top * channels * rows // bottom))
