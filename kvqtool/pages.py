"""The device form of one layer's packed body: pages of slabs, value ranges, outliers as deltas.

A page is 128 tokens of one sequence, all KV heads; a new page of every sequence follows the last
one (page = block * batch + sequence). Decoding what a page holds gives what the canonical rows
give: codes are the same bits, an outlier is stored as its distance to what its code decodes to, so
that a kernel adds it and never branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvqtool.bits import unpack_words
from kvqtool.codebook import Codebook, send
from kvqtool.codec import channel_affine
from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS, outliers_per_tail
from kvqtool.outliers import row_of_outlier
from kvqtool.page_memory import HEADER, QUAD, SLABS
from kvqtool.side import QuantSpec
from kvqtool.slabs import pack_slabs

# Codes that are unpacked at a time, 4 bytes each.
CODES_AT_ONCE: Final = 1 << 23


@dataclass(frozen=True)
class PageSide:
    """One side's canonical rows and what reads them.

    Args:
        rows: the buffers of `memory.body_buffers`.
        codebook: levels and ranges.
        spec: the side's scheme.
        num_heads: KV heads.
        head_dim: channels of a head.
        order: (head_dim,) int64, the channel at each place of a key; None for values.
    """

    rows: dict[str, Tensor]
    codebook: Codebook
    spec: QuantSpec
    num_heads: int
    head_dim: int
    order: Tensor | None

    @property
    def is_key(self) -> bool:
        """Whether these are keys."""
        return self.order is not None

    @property
    def channels(self) -> int:
        """C, channels of a row."""
        return self.num_heads * self.head_dim

    @property
    def outliers_per_row(self) -> int:
        """Outliers of every row, where rows do not say how many they have."""
        return 2 * outliers_per_tail(self.spec, self.channels)


@dataclass(frozen=True)
class Pages:
    """The device form of a layer's packed body.

    Args:
        slabs: (pages, num_kv_heads, 2, words) int32; a slab's keys, then its values.
        ranges: (pages, 128, 2) float16, scale and offset of each token's values.
        outlier_index: (pages, num_kv_heads, 2, 4) int32: first quad of words and quads of the
            keys, then of the values; bit 31 says that a list of values is in rounds.
        outlier_words: (4 * quads,) int32: a float16 delta above 16 bits that say where.
        page_table: (batch, blocks) int32.
    """

    slabs: Tensor
    ranges: Tensor
    outlier_index: Tensor
    outlier_words: Tensor
    page_table: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor."""
        return sum(t.numel() * t.element_size() for t in vars(self).values())


def build_pages(key: PageSide, value: PageSide, batch: int) -> Pages:
    """Return the device form of canonical rows (row = token * batch + sequence)."""
    tokens = len(key.rows["words"]) // batch
    blocks = -(-tokens // PAGE_TOKENS)
    device = key.rows["words"].device
    slabs = torch.cat([_pack_side(side, batch, blocks) for side in (key, value)], dim=1)
    ranges = torch.zeros(blocks * PAGE_TOKENS, batch, 2, dtype=torch.float16, device=device)
    ranges[:tokens] = value.rows["ranges"][:, 0].view(tokens, batch, 2)
    index, words = _pack_outliers((key, value), batch, blocks)
    pages = torch.arange(blocks * batch, dtype=torch.int32, device=device)
    return Pages(
        slabs.view(blocks * batch, key.num_heads, SLABS, -1),
        ranges.view(blocks, PAGE_TOKENS, batch, 2).transpose(1, 2).flatten(0, 1).contiguous(),
        index.view(blocks * batch, key.num_heads, SLABS, 4),
        words,
        pages.view(blocks, batch).T.contiguous(),
    )


def key_table(codebook: Codebook, spec: QuantSpec, order: Tensor, num_heads: int) -> Tensor:
    """Return what decodes keys on the device, float16.

    Returns:
        scales and offsets, (num_heads, steps, 4, 2, 2, 2): of places 8 step + 2 column + {0, 1}
        and their partners, two scales, then two offsets; or with levels per channel
        (num_heads, head_dim, 2**bits), scale and offset folded in.
    """
    scale, offset = channel_affine(codebook)
    head_dim = len(order)
    places = send(order, scale.device)
    scale, offset = (part.view(num_heads, head_dim)[:, places] for part in (scale, offset))
    if spec.channel_levels:
        levels = codebook.decode_levels.view(num_heads, head_dim, -1)[:, places]
        return (levels * scale[..., None] + offset[..., None]).half().contiguous()
    both = torch.stack([scale, offset], dim=-1).half()
    # (H, partner, step, column, half, scale or offset) -> (H, step, column, partner, which, half)
    split = both.view(num_heads, 2, head_dim // 16, 4, 2, 2)
    return split.permute(0, 2, 3, 1, 5, 4).contiguous()


def level_table(key: PageSide, value: PageSide) -> Tensor:
    """Return the levels of both sides, zeros where keys have their own: (2, 16) float16, or
    (2, 256) where a side has 8 bits.
    """
    room = 256 if 8 in (key.spec.bits, value.spec.bits) else 16
    table = torch.zeros(2, room, dtype=torch.float16, device=value.codebook.levels.device)
    for row, side in enumerate((key, value)):
        levels = side.codebook.decode_levels
        if levels.dim() == 1:
            table[row, : len(levels)] = levels.half()
    return table


def _pack_side(side: PageSide, batch: int, blocks: int) -> Tensor:
    """Return one side's slabs, (blocks * batch * num_heads * 2, words) int32."""
    packed = []
    rows = PAGE_TOKENS * batch
    step = max(CODES_AT_ONCE // (rows * side.channels), 1)
    for block in range(0, blocks, step):
        many = min(step, blocks - block)
        words = side.rows["words"][block * rows : (block + many) * rows]
        codes = unpack_words(words, side.spec.bits, side.channels)
        codes = torch.nn.functional.pad(codes, (0, 0, 0, many * rows - len(codes)))
        shaped = codes.view(many, SLABS, SLAB_TOKENS, batch, side.num_heads, side.head_dim)
        shaped = shaped.permute(0, 3, 4, 1, 2, 5).flatten(0, 3)
        if side.order is not None:
            shaped = shaped[..., side.order.to(codes.device)]
        packed.append(pack_slabs(shaped, side.spec.bits, is_key=side.is_key))
    return torch.cat(packed)


def _pack_outliers(
    sides: tuple[PageSide, PageSide], batch: int, blocks: int
) -> tuple[Tensor, Tensor]:
    """Return (index (lists, 4) int32, words int32): of each slab the keys' words, then the
    values', each padded to whole quads with words that add nothing.
    """
    lists = blocks * batch * sides[0].num_heads * SLABS
    device = sides[0].rows["words"].device
    owners, words = [], []
    for number, side in enumerate(sides):
        if "outlier_values" in side.rows:
            owner, word = outlier_words(side, batch)
            owners.append(owner * 2 + number)
            words.append(word)
    if not owners:
        empty = torch.zeros(lists, 4, dtype=torch.int32, device=device)
        return empty, torch.zeros(QUAD, dtype=torch.int32, device=device)
    return lay_out_lists(torch.cat(owners), torch.cat(words), lists)


def lay_out_lists(owner: Tensor, word: Tensor, lists: int) -> tuple[Tensor, Tensor]:
    """Put outliers into lists.

    Args:
        owner: (n,) int64, twice the number of an outlier's slab, and 1 more for values.
        word: (n,) int32.
        lists: slabs there are.

    Returns:
        The index (lists, 4) int32 and the words int32 of `Pages`.
    """
    device = owner.device
    # Values by channel, those of the same banks first, dealt out to rounds; keys stay in the order
    # of their tokens.
    channel = word >> 8 & 255
    channel = owner * 256 + torch.where(owner % 2 == 1, channel % 8 * 32 + channel // 8, 0)
    channel, order = channel.sort(stable=True)
    owner, word = owner[order], word[order]
    counts = torch.bincount(owner, minlength=2 * lists)
    most = torch.bincount(channel, minlength=512 * lists).view(-1, 256).amax(1)
    header, quads, in_rounds = list_sizes(counts)
    first = quads.cumsum(0) - quads
    packed = torch.zeros(max(int(quads.sum()), 1) * QUAD, dtype=torch.int32, device=device)
    rounds = torch.where(in_rounds, torch.maximum(most, (counts + 31) // 32), 1)
    size, longer = counts // rounds, counts % rounds
    at = torch.arange(len(owner), device=device) - (counts.cumsum(0) - counts)[owner]
    turn, place = at % rounds[owner], at // rounds[owner]
    at = turn * size[owner] + torch.minimum(turn, longer[owner]) + place
    packed[first[owner] * QUAD + header[owner] + at] = word
    heads = torch.stack([rounds, size, longer, torch.zeros_like(size)], dim=1)
    places = (first * QUAD)[in_rounds][:, None] + torch.arange(HEADER, device=device)
    packed[places] = heads[in_rounds].to(torch.int32)
    sizes = quads - (in_rounds.long() << 31)  # bit 31 of an int32
    return torch.stack([first, sizes], dim=1).view(lists, 4).to(torch.int32), packed


def list_sizes(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the words before a list's first outlier, its quads, and whether it is in rounds.

    Args:
        counts: (2 * lists,) outliers of each list, keys and values in turn. Lists of values are in
            rounds: up to 32 words of different channels each, which lanes add at once. There are R
            rounds, the most outliers of a channel or a 32nd of all; outlier n in the order of
            channels, by their remainder modulo 8 first, is in round n modulo R. Before the first
            stand R, the size of a round, and how many rounds have one more.
    """
    is_value = torch.arange(len(counts), device=counts.device) % 2 == 1
    in_rounds = is_value & (counts > 0)
    header = in_rounds.to(counts.dtype) * HEADER
    return header, (counts + header + (QUAD - 1)) // QUAD, in_rounds


def outlier_words(side: PageSide, batch: int) -> tuple[Tensor, Tensor]:
    """Return the list each outlier belongs to and its word, both (n,), in canonical order."""
    rows = side.rows
    row = row_of_outlier(rows, len(rows["words"]), side.outliers_per_row)
    channel = rows["outlier_channels"].long()
    delta = (rows["outlier_values"].float() - decode_at(side, row, channel)).half()
    token, sequence = row // batch, row % batch
    head, place = channel // side.head_dim, channel % side.head_dim
    block, slab, token = token // PAGE_TOKENS, token % PAGE_TOKENS // SLAB_TOKENS, token % 64
    if side.order is not None:
        place = torch.argsort(side.order.to(place.device))[place]
    owner = ((block * batch + sequence) * side.num_heads + head) * SLABS + slab
    where = place << 8 | token << 2
    return owner, delta.view(torch.int16).to(torch.int32) << 16 | where.to(torch.int32)


def decode_at(side: PageSide, row: Tensor, channel: Tensor) -> Tensor:
    """Return what the kernels decode at (row, channel) without outliers, float32."""
    bits = side.spec.bits
    at = channel * bits
    words, word = side.rows["words"], at // 32
    following = (word + 1).clamp_max(words.shape[1] - 1)
    both = (words[row, word].long() & 0xFFFFFFFF) | words[row, following].long() << 32
    code = both >> at % 32 & ((1 << bits) - 1)
    levels = side.codebook.decode_levels
    if side.is_key and side.spec.channel_levels:
        scale, offset = channel_affine(side.codebook)
        return (levels[channel, code] * scale[channel] + offset[channel]).half().float()
    level = levels.half().float()[code]
    if side.is_key:
        scale, offset = (part.half().double()[channel] for part in channel_affine(side.codebook))
        return (level.double() * scale + offset).half().float()
    scale, offset = side.rows["ranges"][:, 0].float()[row].unbind(-1)
    return level * scale + offset
