"""Tokens that fill no page yet, written by the append kernel (its sources on the CPU): what is read
and what is kept are those of the codec.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_case import assert_same, greedy, same_choices, text_ids
from shim.build import HAS_COMPILER, mostly_slow, run_on_cpu
from torch import Tensor

from kvqtool.bundle import Bundle
from kvqtool.memory import LayerGeometry
from kvqtool.models import load_model
from kvqtool.open_page import OpenPage
from kvqtool.paged import PagedStore
from kvqtool.read_path import page_form
from kvqtool.reader import PageReader, SharedTables
from kvqtool.rope import AngleFormula, Rotation
from kvqtool.seam import LayerSeam
from kvqtool.spec import parse_spec
from kvqtool.store import LayerStore
from kvqtool.synthetic import synthetic_bundle

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed")
HEADS, DIM = 2, 64
GEOMETRY = LayerGeometry(HEADS, DIM, DIM)


class Both:
    """The same tokens in three stores: rows only, pages and rows, pages and an open page."""

    def __init__(self, spec: str, width: int = DIM, batch: int = 1) -> None:
        parsed = parse_spec(spec)
        inv_freq = 10_000.0 ** (-torch.arange(width // 2) / (width // 2))
        self.formula = AngleFormula(inv_freq, 1.0, torch.float16)
        rotation = Rotation("half", width, 0, 1, "unique")
        seam = LayerSeam(0, GEOMETRY, None, True, rotation, self.formula, "")
        books = synthetic_bundle(parsed, {0: GEOMETRY}).codebooks_of(0)
        form = page_form(seam, parsed)
        self.reader = PageReader(seam, parsed, books, form, SharedTables())
        self.open = OpenPage(parsed, books, self.reader, run_on_cpu)
        self.rows = LayerStore(parsed, books, seam)
        self.closed = PagedStore(parsed, books, seam, form)
        self.opened = PagedStore(parsed, books, seam, form, self.open)
        self.stores = (self.rows, self.closed, self.opened)
        self.batch, self.random = batch, torch.Generator().manual_seed(0)

    def angles(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, stop)[:, None].expand(-1, self.batch)
        cos, sin = self.formula.tables(positions)
        return cos.float(), sin.float()

    def append(self, *steps: int) -> None:
        for tokens in steps:
            key, value = (
                torch.randn(self.batch, HEADS, tokens, DIM, generator=self.random).half()
                for _ in range(2)
            )
            for store in self.stores:
                store.append(key, value, self.angles)

    def attend(self, store: PagedStore, query: Tensor, start: int = 0) -> Tensor:
        first = torch.zeros(self.batch, dtype=torch.int32)
        context = store.context(self.angles, first, start)
        return self.reader.attend(query, context, 0.125, None).float()

    def check(self, start: int = 0) -> None:
        """Compare what the two paged stores read, and expand."""
        query = torch.randn(self.batch, 4, 1, DIM, generator=self.random).half()
        found, expected = (self.attend(s, query, start) for s in (self.opened, self.closed))
        assert (found - expected).abs().max() < 4e-3 * expected.abs().max() + 1e-3
        first = torch.zeros(self.batch, dtype=torch.int32)
        context = self.opened.context(self.angles, first, start)
        for part, exact in zip(
            self.reader.expand(context), self.rows.read(self.angles, start), strict=True
        ):
            assert part.shape == exact.shape
            assert (part - exact).abs().max() < 2e-2

    def check_rows(self) -> None:
        """Compare what would be saved."""
        for store in (self.closed, self.opened):
            assert_same(store.canonical(), self.rows.canonical())


SPECS = ("nuq3-1%-sink1", "nuq4-1%/nuq2-5%", "nf4-postrope", "nuq2-1%-pc")


@pytest.mark.parametrize("spec", mostly_slow(SPECS[:1], SPECS))
def test_tokens_one_by_one_are_read_as_the_codec_would(spec: str) -> None:
    both = Both(spec)
    both.append(120, *[1] * 20)
    assert both.open.tokens == 140 % 128 - (1 if "sink" in spec else 0)
    both.check()
    both.check_rows()
    assert both.open.tokens == 0
    both.append(*[1] * 3)
    both.check()


def test_a_prompt_opens_a_page_behind_its_own() -> None:
    both = Both("nuq3-1%", batch=2)
    both.append(300, 1, 1)
    assert both.open.tokens == 302 - 256
    both.check()
    both.append(90)
    assert both.open.tokens == 392 - 384
    both.check()
    both.append(*[1] * 3)
    both.check_rows()


def test_a_window_leaves_token_by_token() -> None:
    both = Both("nuq3-1%-sink2-r6")
    both.append(10, *[1] * 8)
    assert both.open.tokens == 10
    both.check()
    both.check_rows()


def test_part_of_a_head_rotates() -> None:
    both = Both("nuq3-1%", width=32)
    both.append(5, *[1] * 4)
    both.check()
    both.check_rows()


def test_cropping_and_choosing_keep_the_tokens() -> None:
    both = Both("nuq3-1%", batch=2)
    both.append(140, *[1] * 4)
    for store in both.stores:
        store.truncate(141)
        store.select(torch.tensor([1, 0]))
    both.check_rows()
    both.append(*[1] * 2)
    both.check()
    for store in both.stores:
        store.truncate(100)
    both.append(*[1] * 30)
    both.check()
    both.check_rows()


def test_every_tensor_of_the_page_is_counted() -> None:
    both = Both("nuq3-1%")
    both.append(3, 1)
    named: dict[str, Any] = both.opened.tensors
    held = sum(t.nbytes for t in named["open"])
    assert held > 2 * 128 * HEADS * DIM * 2
    assert named["key.pages.slabs"][0].shape[0] == 1


def test_a_model_generates_with_open_pages(
    calibrated: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model("builtin", device="cpu", dtype="float16")
    bundle = calibrated("nuq3-1%-sink1")
    ids = text_ids(loaded, 1, 121)
    expected = greedy(loaded, bundle, ids, "fused", 12)
    monkeypatch.setattr(
        "kvqtool.cache.OpenPage", lambda *arguments: OpenPage(*arguments, run_on_cpu)
    )
    found = greedy(loaded, bundle, ids, "fused", 12, expected.tokens)
    stores = found.cache.stores
    assert all("open" in store.tensors for store in stores)
    assert same_choices(found, expected, first=0.05) <= 1
    assert_same(
        {n: t for n, t in found.canonical.items() if n.startswith("0.")},
        {n: t for n, t in expected.canonical.items() if n.startswith("0.")},
    )
