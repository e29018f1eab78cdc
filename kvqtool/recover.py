"""Pages back to canonical rows, bit for bit: the inverse of `pages.build_pages`.

Codes and ranges are the same bits in another order. An outlier lies in a page as its distance to
what its code decodes to, rounded to fp16; adding it up again gives the outlier itself but for a
few, which are small beside their code. Those are kept as `Exceptions`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvqtool.bits import pack_codes
from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS, count_dtype, index_dtype
from kvqtool.outliers import HALF_MAX, row_of_outlier
from kvqtool.page_memory import HEADER, QUAD, SLABS
from kvqtool.pages import CODES_AT_ONCE, Pages, PageSide, decode_at
from kvqtool.slabs import unpack_slabs


@dataclass(frozen=True)
class Exceptions:
    """Outliers of one side that their pages do not give back exactly.

    Args:
        place: (n,) int64, row * channels + channel, ascending.
        value: (n,) float16.
    """

    place: Tensor
    value: Tensor


def count_outliers(sides: tuple[PageSide, PageSide], batch: int) -> Tensor:
    """Return how many outliers of each slab lie in pages of canonical rows.

    Returns:
        (pages, num_kv_heads, 2 slabs, 2 sides) int32.
    """
    rows = len(sides[0].rows["words"])
    shape = -(-rows // batch // PAGE_TOKENS) * batch, sides[0].num_heads, SLABS, 2
    counts = torch.zeros(shape, dtype=torch.int32, device=sides[0].rows["words"].device)
    for number, side in enumerate(sides):
        if "outlier_values" in side.rows:
            row = row_of_outlier(side.rows, rows, side.outliers_per_row)
            head = side.rows["outlier_channels"].long() // side.head_dim
            token, sequence = row // batch, row % batch
            page = token // PAGE_TOKENS * batch + sequence
            slab = (page * side.num_heads + head) * SLABS + token % PAGE_TOKENS // SLAB_TOKENS
            found = torch.bincount(slab, minlength=shape[0] * shape[1] * SLABS)
            counts[..., number] = found.view(shape[:3])
    return counts


def build_rows(
    pages: Pages, counts: Tensor, side: PageSide, batch: int, exceptions: Exceptions
) -> dict[str, Tensor]:
    """Return one side's canonical rows of whole pages (page = block * batch + sequence).

    Args:
        pages: the pages, all of them full.
        counts: what `count_outliers` returned of them.
        side: the side; its rows are ignored.
        batch: sequences.
        exceptions: the side's outliers that lie elsewhere.

    Returns:
        The buffers of `memory.body_buffers`.
    """
    rows = {"words": _words(pages, side, batch)}
    if not side.is_key:
        ranges = pages.ranges.view(-1, batch, PAGE_TOKENS, 1, 2).transpose(1, 2)
        rows["ranges"] = ranges.reshape(-1, 1, 2).contiguous()
    if side.spec.outlier_fraction:
        rows |= _outliers(pages, counts, replace(side, rows=rows), batch, exceptions)
    return rows


def find_exceptions(pages: Pages, counts: Tensor, side: PageSide, batch: int) -> Exceptions:
    """Return the outliers of a side's rows that the pages made of them do not give back."""
    rows, none = side.rows, no_exceptions(counts.device)
    if "outlier_values" not in rows:
        return none
    found = _outliers(pages, counts, side, batch, none)
    left, right = (part["outlier_values"].view(torch.int16) for part in (found, rows))
    wrong = (left != right).nonzero()[:, 0]
    row = row_of_outlier(rows, len(rows["words"]), side.outliers_per_row)[wrong]
    place = row * side.channels + rows["outlier_channels"].long()[wrong]
    return Exceptions(place, rows["outlier_values"][wrong])


def listed_words(
    pages: Pages, counts: Tensor, side: int, total: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return (slab, word) of every outlier of keys (0) or of values (1), list by list.

    Args:
        pages: the pages.
        counts: what `count_outliers` says of them.
        side: which.
        total: how many there are; None to wait for the GPU to say.
    """
    count = counts[..., side].flatten().long()
    first, quads = pages.outlier_index.view(-1, 4)[:, 2 * side : 2 * side + 2].long().unbind(1)
    head = (quads < 0).long() * HEADER  # bit 31: in rounds, behind a header
    owner = torch.arange(len(count), device=count.device).repeat_interleave(
        count, output_size=total
    )
    within = torch.arange(len(owner), device=count.device) - (count.cumsum(0) - count)[owner]
    return owner, pages.outlier_words[first[owner] * QUAD + head[owner] + within]


def no_exceptions(device: torch.device) -> Exceptions:
    """Return none."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Exceptions(none, none.half())


def _words(pages: Pages, side: PageSide, batch: int) -> Tensor:
    """Return the canonical words, some pages at a time so that codes take little room."""
    split = SLAB_TOKENS * side.head_dim * side.spec.bits // 32
    packed, block = [], PAGE_TOKENS * batch * side.channels
    step = max(CODES_AT_ONCE // block, 1) * batch
    for first in range(0, len(pages.slabs), step):
        slabs = pages.slabs[first : first + step].flatten(0, 2)
        part = slabs[:, :split] if side.is_key else slabs[:, -split:]
        placed = unpack_slabs(part, side.spec.bits, side.head_dim, is_key=side.is_key)
        codes = placed
        if side.order is not None:
            codes = torch.empty_like(placed)
            codes[..., side.order.to(placed.device)] = placed
        shaped = codes.view(-1, batch, side.num_heads, SLABS, SLAB_TOKENS, side.head_dim)
        flat = shaped.permute(0, 3, 4, 1, 2, 5).reshape(-1, side.channels)
        packed.append(pack_codes(flat, side.spec.bits))
    return torch.cat(packed)


def _outliers(
    pages: Pages, counts: Tensor, side: PageSide, batch: int, exceptions: Exceptions
) -> dict[str, Tensor]:
    owner, word = listed_words(pages, counts, 0 if side.is_key else 1)
    token, channel = _place(word, side)
    slab, page = owner % SLABS, owner // SLABS // side.num_heads
    channel = channel + owner // SLABS % side.num_heads * side.head_dim
    token = page // batch * PAGE_TOKENS + slab * SLAB_TOKENS + token
    row = token * batch + page % batch
    place = row * side.channels + channel
    rank = place.argsort()
    place, row, channel, word = place[rank], row[rank], channel[rank], word[rank]
    delta = (word >> 16).to(torch.int16).view(torch.float16).float()
    value = (decode_at(side, row, channel) + delta).clamp(-HALF_MAX, HALF_MAX).half()
    if len(exceptions.place):
        value[torch.searchsorted(place, exceptions.place)] = exceptions.value
    buffers = {
        "outlier_values": value,
        "outlier_channels": channel.to(getattr(torch, index_dtype(side.channels))),
    }
    if side.spec.per_channel:
        per_row = torch.bincount(row, minlength=len(side.rows["words"]))
        buffers["outlier_counts"] = per_row.to(getattr(torch, count_dtype(side.channels)))
    return buffers


def _place(word: Tensor, side: PageSide) -> tuple[Tensor, Tensor]:
    """Return the token in its slab and the channel of its head of an outlier's word."""
    place = (word >> 8 & 255).long()
    channel = place if side.order is None else side.order.to(word.device)[place]
    return (word >> 2 & 63).long(), channel
