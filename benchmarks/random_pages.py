"""Random packed contexts for benchmarks: codes of normal data, outliers at random places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvqtool.codebook import normalfloat_levels
from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS
from kvqtool.pages import Pages, lay_out_lists
from kvqtool.slabs import pack_slabs
from kvqtool.variant import Variant

HEAD_DIM: Final = 128
Levels = Callable[[int], Tensor]  # of so many bits, ascending


@dataclass(frozen=True)
class Shape:
    """A decode step: sequences, heads, tokens of context."""

    batch: int
    num_heads: int
    num_kv_heads: int
    context: int


def random_pages(
    shape: Shape, variant: Variant, value_outliers: int = 0, levels: Levels = normalfloat_levels
) -> Pages:
    """Return pages of random codes; `value_outliers` a token over all KV heads."""
    pages = shape.batch * -(-shape.context // PAGE_TOKENS)
    slabs = pages * shape.num_kv_heads * 2
    sides = []
    for bits, is_key in ((variant.key_bits, True), (variant.value_bits, False)):
        parts = []
        for start in range(0, slabs, 2048):
            states = (
                torch.randn(min(2048, slabs - start), SLAB_TOKENS, HEAD_DIM, device="cuda") * 0.4
            )
            if bits <= 8:
                known = levels(bits).cuda()
                states = torch.bucketize(states, (known[1:] + known[:-1]) / 2, out_int32=True)
            parts.append(pack_slabs(states, bits, is_key=is_key))
        sides.append(torch.cat(parts))
    words = torch.cat(sides, dim=1).view(pages, shape.num_kv_heads, 2, -1)
    ranges = torch.rand(pages, PAGE_TOKENS, 2, device="cuda").half()
    table = (
        torch.arange(pages, dtype=torch.int32, device="cuda").view(-1, shape.batch).T.contiguous()
    )
    index, outliers = _random_outliers(slabs, shape, value_outliers if variant.outliers else 0)
    return Pages(words, ranges, index.view(pages, shape.num_kv_heads, 2, 4), outliers, table)


def _random_outliers(slabs: int, shape: Shape, per_token: int) -> tuple[Tensor, Tensor]:
    """Return lists of outliers at random places: 1 % of keys, `per_token` of a token's values."""
    if not per_token:
        empty = torch.zeros(slabs, 4, dtype=torch.int32, device="cuda")
        return empty, torch.zeros(4, dtype=torch.int32, device="cuda")
    shares = torch.tensor([0.01, per_token / shape.num_kv_heads / HEAD_DIM], device="cuda")
    trials = torch.full((slabs, 2), float(SLAB_TOKENS * HEAD_DIM), device="cuda")
    counts = torch.binomial(trials, shares.expand(slabs, 2)).long().flatten()
    owner = torch.arange(2 * slabs, device="cuda").repeat_interleave(counts)
    token = torch.randint(0, 64, owner.shape, device="cuda")
    place = torch.randint(0, HEAD_DIM, owner.shape, device="cuda")
    where = place << 8 | token << 2
    delta = torch.randn(len(owner), device="cuda").half().view(torch.int16).to(torch.int32)
    return lay_out_lists(owner, delta << 16 | where.to(torch.int32), slabs)
