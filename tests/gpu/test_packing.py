"""Packing kernels on the GPU against the codec on the CPU: the same bits."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from packing_case import CASES, PackCase, build_pack, same_pages

from kvqtool.packing import pack
from kvqtool.pages import Pages

pytestmark = pytest.mark.gpu
LONG = (
    PackCase("nuq4-1%", tokens=2000, num_kv_heads=8, batch=2),
    PackCase("nuq3-1%", tokens=1000, num_kv_heads=32, tied=True),
)


def check(case: PackCase) -> None:
    """Pack on the GPU and compare."""
    built = build_pack(case)

    def moved(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.cuda()
        assert is_dataclass(value) and not isinstance(value, type)
        tensors = {f.name: getattr(value, f.name) for f in fields(value)}
        return replace(value, **{k: t.cuda() for k, t in tensors.items() if hasattr(t, "cuda")})

    states = built.states[0].cuda(), built.states[1].cuda()
    code, tables = moved(built.code), moved(built.tables)
    pages = pack(states, built.turns.cuda(), code, tables, built.variant)  # type: ignore[arg-type]  # moved as they were
    same_pages(Pages(*(t.cpu() for t in vars(pages).values())), built.expected)


@pytest.mark.parametrize("case", (*CASES, *LONG), ids=str)
def test_packed_pages_equal_the_codec_bit_for_bit(case: PackCase) -> None:
    check(case)
