"""The size of every buffer of a layer's pages, the device form of its packed body."""

from __future__ import annotations

from typing import Final

from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS, Buffer, LayerGeometry, capacity
from kvqtool.spec import KvSpec

SLABS: Final = PAGE_TOKENS // SLAB_TOKENS
QUAD: Final = 4  # outlier words are read 16 bytes at a time
HEADER: Final = 4  # words of a list in rounds that say how many rounds there are


def page_buffers(
    spec: KvSpec, layer: LayerGeometry, batch: int, tokens: int, quads: int
) -> dict[str, Buffer]:
    """Return the buffers of a layer's pages.

    Args:
        spec: the scheme.
        layer: the layer's shapes; keys and values of one head size.
        batch: sequences.
        tokens: packed tokens of each.
        quads: groups of four outlier words, the last group of each list padded.

    Example: nuq4-1%, 2 heads of 128, 1 sequence of 130 tokens, 90 quads ->
        slabs int32 (2, 2, 2, 2048), ranges float16 (2, 128, 2), outlier_index int32 (2, 2, 2, 4),
        outlier_words int32 (360,), page_table int32 (1, 2)
    """
    blocks = capacity(tokens) // PAGE_TOKENS
    lists = blocks * batch, layer.num_kv_heads, SLABS
    words = SLAB_TOKENS * layer.key_dim * (spec.key.bits + spec.value.bits) // 32
    return {
        "slabs": Buffer("int32", (*lists, words)),
        "ranges": Buffer("float16", (blocks * batch, PAGE_TOKENS, 2)),
        "outlier_index": Buffer("int32", (*lists, 4)),
        "outlier_words": Buffer("int32", (max(quads, 1) * QUAD,)),
        "page_table": Buffer("int32", (batch, blocks)),
    }
