"""The appending kernel on the GPU writes what packing at once does, in a graph too."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from packing_case import PackCase, append_all, build_pack, same_lists

from kvqtool.cuda import run_on_gpu
from kvqtool.pages import Pages

pytestmark = pytest.mark.gpu
CASES = (
    PackCase("nuq4-1%", tokens=140, num_kv_heads=8, batch=2),
    PackCase("nuq3-1%", tokens=70, num_kv_heads=32, tied=True),
    PackCase("nuq2-1%-pc", tokens=66, head_dim=64, bfloat16=True),
)


def moved(tables: Any) -> Any:
    """Return a dataclass with its tensors on the GPU."""
    values = {f.name: getattr(tables, f.name) for f in fields(tables)}
    return replace(tables, **{k: v.cuda() for k, v in values.items() if hasattr(v, "cuda")})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_token_by_token_equals_all_at_once(case: PackCase) -> None:
    built = build_pack(case)
    states = built.states[0].cuda(), built.states[1].cuda()
    tables = {"code": moved(built.code), "tables": moved(built.tables)}
    on_gpu = replace(built, states=states, turns=built.turns.cuda(), **tables)
    growing = append_all(on_gpu, run_on_gpu, room=(8192, 8192))  # any slab's outliers fit
    pages = Pages(*(tensor.cpu() for tensor in vars(growing.pages).values()))
    assert not growing.dropped.any()
    assert torch.equal(pages.slabs, built.expected.slabs)
    assert torch.equal(pages.ranges, built.expected.ranges)
    same_lists(pages, built.expected)
