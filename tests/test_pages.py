"""Slabs hold the same codes in another order; pages have the sizes that arithmetic says."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from packing_case import PackCase, build_pack

from kvqtool.memory import LayerGeometry
from kvqtool.page_memory import HEADER, page_buffers
from kvqtool.pages import lay_out_lists
from kvqtool.slabs import (
    pack_slabs,
    slab_order,
    unpack_slabs,
)
from kvqtool.spec import parse_spec


@pytest.mark.parametrize(("bits", "head_dim"), [*product((2, 3, 4, 8), (64, 96, 128, 256))])
@pytest.mark.parametrize("is_key", [True, False])
def test_codes_come_back_from_slabs(bits: int, head_dim: int, is_key: bool) -> None:
    codes = torch.randint(0, 1 << bits, (3, 64, head_dim), dtype=torch.int32)
    words = pack_slabs(codes, bits, is_key=is_key)
    assert words.shape == (3, 2 * bits * head_dim)
    assert torch.equal(unpack_slabs(words, bits, head_dim, is_key=is_key), codes)


def test_states_come_back_from_slabs() -> None:
    states = torch.randn(2, 64, 128).half()
    words = pack_slabs(states, 16, is_key=True)
    assert torch.equal(unpack_slabs(words, 16, 128, is_key=True), states)


@pytest.mark.parametrize("is_key", [True, False])
def test_the_order_of_a_slab_visits_every_code_once(is_key: bool) -> None:
    token, place = slab_order(128, is_key=is_key)
    assert (token * 128 + place).flatten().sort()[0].tolist() == list(range(64 * 128))


def test_partners_of_a_rotation_lie_in_one_lane() -> None:
    _, place = slab_order(128, is_key=True)
    codes = place.unflatten(-1, (2, 2, 2))  # register = 2 partner + row
    assert torch.equal(codes[..., 1, :, :], codes[..., 0, :, :] + 64)


@pytest.mark.parametrize("spec", ["nuq4-1%", "nuq3-1%/nuq2", "int4"])
def test_pages_have_the_sizes_of_the_arithmetic(spec: str) -> None:
    case = PackCase(spec, tokens=130, batch=2)
    pages = build_pack(case).expected.pages
    layer = LayerGeometry(case.num_kv_heads, case.head_dim, case.head_dim)
    quads = int((pages.outlier_index[..., 1::2] & 0x7FFFFFFF).sum())
    planned = page_buffers(parse_spec(spec), layer, case.batch, case.tokens, quads)
    for name, tensor in vars(pages).items():
        assert planned[name].shape == tuple(tensor.shape), name
        assert planned[name].nbytes == tensor.numel() * tensor.element_size(), name
    assert sum(buffer.nbytes for buffer in planned.values()) == pages.nbytes


def test_rounds_of_values_have_different_channels_and_one_size() -> None:
    random = torch.Generator().manual_seed(0)
    owner = torch.randint(0, 6, (700,), generator=random)
    word = torch.randint(0, 1 << 14, (700,), generator=random, dtype=torch.int32)
    word[:40] = word[:40] & 0xFC | 7 << 8  # a channel with many outliers
    word |= 1 << 16  # a delta, so that no word is zero
    index, words = lay_out_lists(owner, word, lists=3)
    for number, (first, quads) in enumerate(index[:, 2:].tolist()):
        assert quads < 0
        wanted = word[owner == 2 * number + 1].sort()[0]
        many, size, longer, _ = words[4 * first : 4 * first + HEADER].tolist()
        begin, found = 4 * first + HEADER, []
        for turn in range(many):
            part = words[begin : begin + size + (turn < longer)]
            assert len(part) <= 32
            assert len(set((part >> 8 & 255).tolist())) == len(part)
            found.append(part)
            begin += len(part)
        assert torch.equal(torch.cat(found).sort()[0], wanted)
