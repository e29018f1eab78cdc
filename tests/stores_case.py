"""The same tokens in three stores of one layer, to hold against each other; for any device."""

from __future__ import annotations

import torch
from fused_case import assert_same
from packing_case import with_feedback
from torch import Tensor

from kvqtool.cuda import Launcher
from kvqtool.memory import LayerGeometry
from kvqtool.open_page import OpenPage
from kvqtool.page_writer import PageWriter
from kvqtool.paged import PagedStore
from kvqtool.read_path import page_form
from kvqtool.reader import PageReader, SharedTables
from kvqtool.rope import AngleFormula, Rotation
from kvqtool.seam import LayerSeam
from kvqtool.spec import parse_spec
from kvqtool.store import LayerStore
from kvqtool.synthetic import synthetic_bundle

HEADS, DIM = 2, 64
GEOMETRY = LayerGeometry(HEADS, DIM, DIM)


class Both:
    """The same tokens in three stores: rows only, pages and rows, pages and an open page written by
    kernels. Keys turn by `width` channels of a head.
    """

    def __init__(
        self,
        spec: str,
        width: int = DIM,
        batch: int = 1,
        *,
        run: Launcher | None = None,
        device: str = "cpu",
    ) -> None:
        parsed = parse_spec(spec)
        inv_freq = 10_000.0 ** (-torch.arange(width // 2) / (width // 2))
        self.formula = AngleFormula(inv_freq, 1.0, torch.float16)
        rotation = Rotation("half", width, 0, 1, "unique")
        seam = LayerSeam(0, GEOMETRY, None, True, rotation, self.formula, "")
        key, value = synthetic_bundle(parsed, {0: GEOMETRY}).codebooks_of(0)
        books = (
            with_feedback(key, parsed.key, HEADS, DIM),
            with_feedback(value, parsed.value, HEADS, DIM),
        )
        form = page_form(seam, parsed)
        self.reader = PageReader(seam, parsed, books, form, SharedTables())
        self.open = OpenPage(PageWriter(parsed, books, self.reader, run))
        self.rows = LayerStore(parsed, books, seam)
        self.closed = PagedStore(parsed, books, seam, form)
        self.opened = PagedStore(parsed, books, seam, form, self.open)
        self.stores = (self.rows, self.closed, self.opened)
        self.batch, self.device = batch, torch.device(device)
        self.random = torch.Generator().manual_seed(0)

    def angles(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(start, stop, device=self.device)
        positions = places[:, None].expand(-1, self.batch)
        cos, sin = self.formula.tables(positions)
        return cos.float(), sin.float()

    def append(self, *steps: int) -> None:
        for tokens in steps:
            key, value = (
                torch.randn(self.batch, HEADS, tokens, DIM, generator=self.random).to(
                    self.device, torch.float16
                )
                for _ in range(2)
            )
            for store in self.stores:
                store.append(key, value, self.angles)

    def attend(self, store: PagedStore, query: Tensor, start: int = 0) -> Tensor:
        first = torch.zeros(self.batch, dtype=torch.int32, device=self.device)
        context = store.context(self.angles, first, start)
        return self.reader.attend(query, context, 0.125, None).float()

    def check(self, start: int = 0) -> None:
        """Compare what the two paged stores read, and expand."""
        query = torch.randn(self.batch, 4, 1, DIM, generator=self.random).to(self.device).half()
        found, expected = (self.attend(s, query, start) for s in (self.opened, self.closed))
        assert (found - expected).abs().max() < 4e-3 * expected.abs().max() + 1e-3
        first = torch.zeros(self.batch, dtype=torch.int32, device=self.device)
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
