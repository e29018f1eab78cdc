"""Pages give back the canonical rows they were made of, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_case import codebook
from torch import Tensor

from kvqtool.codec import encode
from kvqtool.packed import gather_rows
from kvqtool.page_store import PageStore, Rows
from kvqtool.pages import PageSide, build_pages
from kvqtool.recover import (
    build_rows,
    count_outliers,
    find_exceptions,
)
from kvqtool.spec import parse_spec

HEADS, DIM = 3, 64
SPECS = ("nuq3-1%", "nuq4-5%/nuq2-1%", "nuq2-1%-pc", "int4", "nf3-30%", "nuq3-1%-cap2")


def sides_of(spec: str, batch: int, seed: int = 0) -> tuple[PageSide, PageSide]:
    """Encode two pages of states whose outliers are often smaller than what their codes say."""
    parsed, random = parse_spec(spec), torch.Generator().manual_seed(seed)
    order = torch.cat([torch.arange(0, DIM, 2), torch.arange(1, DIM, 2)])
    sides = []
    for quant, places in ((parsed.key, order), (parsed.value, None)):
        states = torch.randn(256 * batch, HEADS * DIM, generator=random)
        states = states + 3 * torch.randn(HEADS * DIM, generator=random)
        states[::17] *= 1e-3
        book = codebook(quant, states.half().float())
        rows = encode(states, book, quant)
        sides.append(PageSide(rows, book, quant, HEADS, DIM, places))
    return sides[0], sides[1]


def recovered(sides: tuple[PageSide, PageSide], batch: int) -> list[dict[str, Tensor]]:
    """Return both sides' rows from their pages alone."""
    pages, counts = build_pages(*sides, batch), count_outliers(sides, batch)
    rows = []
    for side in sides:
        empty = replace(side, rows={})
        exceptions = find_exceptions(pages, counts, side, batch)
        rows.append(build_rows(pages, counts, empty, batch, exceptions))
    return rows


@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("spec", SPECS)
def test_rows_come_back_from_pages(spec: str, batch: int) -> None:
    sides = sides_of(spec, batch)
    for side, found in zip(sides, recovered(sides, batch), strict=True):
        assert found.keys() == side.rows.keys()
        for name, tensor in side.rows.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


def test_outliers_small_beside_their_codes_are_exceptions() -> None:
    sides = sides_of("nuq4-5%/nuq2-1%", 1)
    pages, counts = build_pages(*sides, 1), count_outliers(sides, 1)
    exceptions = find_exceptions(pages, counts, sides[0], 1)
    assert 0 < len(exceptions.place) < len(sides[0].rows["outlier_values"]) / 2


def part(sides: tuple[PageSide, PageSide], first: int, last: int, batch: int) -> Rows:
    """Return the rows of some pages."""
    index = torch.arange(first * 128 * batch, last * 128 * batch)
    key, value = (gather_rows(side.rows, index, side.outliers_per_row) for side in sides)
    return key, value


@pytest.mark.parametrize("spec", SPECS)
def test_pages_that_came_one_by_one_give_any_part_back(spec: str) -> None:
    sides = sides_of(spec, 2)
    store = PageStore((replace(sides[0], rows={}), replace(sides[1], rows={})), 2)
    store.append(part(sides, 0, 1, 2))
    store.append(part(sides, 1, 2, 2))
    for first in (0, 1):
        assert_same(store.rows(first), part(sides, first, 2, 2))
    assert sum(store.outliers) == sum(len(s.rows.get("outlier_values", ())) for s in sides)
    store.keep(1, 2)
    assert_same(store.rows(0), part(sides, 1, 2, 2))
    store.append(part(sides, 0, 1, 2))
    store.keep(0, 2)
    assert_same(store.rows(1), part(sides, 0, 1, 2))
    store.keep(0, 0)
    assert store.tokens == 0


def assert_same(found: Rows, expected: Rows) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.keys() == right.keys()
        for name, tensor in right.items():
            assert torch.equal(left[name], tensor), name
