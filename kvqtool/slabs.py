"""The order of codes on a GPU: slabs of 64 tokens of one KV head, cut into tensor-core fragments.

The same bits as the canonical rows, in the order in which 32 lanes read them; kernels/unpack.cuh is
the other half of this file. A slab has `head_dim / 16` steps. In a step, lane 4r + c holds four
tiles of 16 tokens, of each a fragment of 8 codes: register a = 0..3, half e = 0..1.

    keys:   token 16t + 8(a % 2) + r,       place 8 step + 2c + e + (a // 2) head_dim / 2
    values: token 16t + 8(a // 2) + 2c + e, place 16 step + 8(a % 2) + r

A key's place is its channel in an order that puts partners of a rotation head_dim / 2 apart.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvqtool.memory import SLAB_TOKENS

_TILES: Final = 4
_TOP: Final = 0x11111111


def slab_order(head_dim: int, *, is_key: bool) -> tuple[Tensor, Tensor]:
    """Return the (token, place) of each code, both (head_dim / 16, 32, 4, 8) int64."""
    step = torch.arange(head_dim // 16)[:, None, None, None, None]
    lane = torch.arange(32)[:, None, None, None]
    tile = torch.arange(_TILES)[:, None, None]
    register = torch.arange(4)[:, None]
    half = torch.arange(2)
    row, column = lane // 4, lane % 4
    if is_key:
        token = 16 * tile + 8 * (register % 2) + row
        place = 8 * step + 2 * column + half + register // 2 * (head_dim // 2)
    else:
        token = 16 * tile + 8 * (register // 2) + 2 * column + half
        place = 16 * step + 8 * (register % 2) + row
    shape = (head_dim // 16, 32, _TILES, 4, 2)
    return token.expand(shape).flatten(3), place.expand(shape).flatten(3)


def pack_slabs(codes: Tensor, bits: int, *, is_key: bool) -> Tensor:
    """Pack codes of whole slabs.

    Args:
        codes: (slabs, 64, head_dim) integers below 2**bits; with 16 bits, fp16 states.
        bits: 2, 3, 4, 8, or 16 for states as they are.
        is_key: which of the two orders.

    Returns:
        (slabs, 2 * bits * head_dim) int32. Example: (5, 64, 128) at 3 bits -> (5, 768).
    """
    token, place = (part.to(codes.device) for part in slab_order(codes.shape[2], is_key=is_key))
    if bits == 16:
        pairs = codes.half()[:, token, place].view(torch.int32)  # (n, steps, 32, tiles, 4)
        return pairs.permute(0, 1, 3, 2, 4).flatten(1).contiguous()
    if bits == 8:
        tiles = codes.to(torch.uint8)[:, token, place].view(torch.int32)  # (n, steps, 32, tiles, 2)
        lanes = tiles.reshape(len(codes), -1, 32, 2, 4).permute(0, 1, 3, 2, 4)
        return lanes.flatten(1).contiguous()
    nibble = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    tiles = (codes.to(torch.int32)[:, token, place] << nibble).sum(-1, dtype=torch.int32)
    if bits == 4:
        words = tiles
    elif bits == 3:
        top = [(_shift(tiles[..., 3], k) & _TOP) << 3 for k in range(3)]
        words = torch.stack([tiles[..., k] | top[k] for k in range(3)], dim=2)
    elif is_key:
        words = torch.stack([tiles[..., t] | tiles[..., t + 1] << 2 for t in (0, 2)], dim=-1)
    else:
        near = (tiles | tiles >> 6) & 0xFF00FF  # register 2i + 1 beside 2i, a byte for each i
        near = (near | near >> 8) & 0xFFFF
        words = torch.stack([near[..., t] | near[..., t + 1] << 16 for t in (0, 2)], dim=-1)
    return words.flatten(1).contiguous()


def unpack_slabs(words: Tensor, bits: int, head_dim: int, *, is_key: bool) -> Tensor:
    """Unpack whole slabs; the inverse of `pack_slabs`.

    Args:
        words: (slabs, 2 * bits * head_dim) int32.
        bits: 2, 3, 4, 8 or 16.
        head_dim: D.
        is_key: which of the two orders.

    Returns:
        (slabs, 64, head_dim) int32, or fp16 states.
    """
    token, place = (part.to(words.device) for part in slab_order(head_dim, is_key=is_key))
    shape = (len(words), SLAB_TOKENS, head_dim)
    if bits == 16:
        lanes = words.view(-1, head_dim // 16, _TILES, 32, 4).permute(0, 1, 3, 2, 4)
        states = torch.empty(shape, dtype=torch.float16, device=words.device)
        states[:, token, place] = lanes.contiguous().view(torch.float16)
        return states
    if bits == 8:
        lanes = words.view(-1, head_dim // 16, 2, 32, 4).permute(0, 1, 3, 2, 4)
        bytes_of = lanes.contiguous().view(torch.uint8).view(-1, head_dim // 16, 32, _TILES, 8)
        codes = torch.empty(shape, dtype=torch.int32, device=words.device)
        codes[:, token, place] = bytes_of.to(torch.int32)
        return codes
    nibble = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    codes = torch.empty(shape, dtype=torch.int32, device=words.device)
    codes[:, token, place] = _shift(
        _tiles(words, bits, head_dim, is_key=is_key)[..., None], nibble
    ) & ((1 << bits) - 1)
    return codes


def _tiles(words: Tensor, bits: int, head_dim: int, *, is_key: bool) -> Tensor:
    """Return a word per tile with its codes in nibbles, (slabs, steps, 32, tiles)."""
    steps = head_dim // 16
    if bits == 4:
        return words.view(-1, steps, 32, _TILES)
    if bits == 2 and not is_key:
        near = torch.stack([words, _shift(words, 16)], dim=-1).view(-1, steps, 32, _TILES) & 0xFFFF
        apart = (near | near << 8) & 0xFF00FF
        return (apart | apart << 6) & 0x33333333
    if bits == 2:
        pair = words.view(-1, steps, 32, 2)
        return torch.stack([pair, _shift(pair, 2)], dim=-1).flatten(3)
    planes = words.view(-1, steps, 3, 32)
    last = sum((_shift(planes[:, :, k], 3) & _TOP) << k for k in range(3))
    assert isinstance(last, Tensor)
    return torch.cat([planes.transpose(2, 3), last[..., None]], dim=-1)


def _shift(words: Tensor, by: int | Tensor) -> Tensor:
    """Shift right; what an int32's sign brings in from above is masked off by every caller."""
    return words >> by
