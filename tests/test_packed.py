"""Growing storage: what is read back is what was appended, in pages of known size."""

import pytest
import torch
from torch import Tensor

from kvqtool.buffers import PagedBuffer, RunBuffer
from kvqtool.memory import PAGE_TOKENS, body_buffers, capacity
from kvqtool.packed import PackedBody, gather_rows
from kvqtool.spec import parse_spec

LENGTHS = (1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 3 * PAGE_TOKENS + 5)
Rows = dict[str, Tensor]


def rows_of(side: str, rows: int, seed: int = 0) -> tuple[Rows, list[list[int]]]:
    """Return encoded rows of 64 channels, and each row's outlier channels as lists."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31 - 1, (rows, 6), generator=generator, dtype=torch.int32)
    counts = [2] * rows
    if side == "key":
        counts = torch.randint(0, 6, (rows,), generator=generator).tolist()
    channels = [sorted(torch.randperm(64, generator=generator)[:n].tolist()) for n in counts]
    flat = torch.tensor([c for row in channels for c in row], dtype=torch.uint8)
    buffers = {
        "words": words,
        "outlier_values": torch.randn(len(flat), generator=generator).half(),
        "outlier_channels": flat,
    }
    if side == "key":
        buffers["outlier_counts"] = torch.tensor(counts, dtype=torch.uint8)
    else:
        buffers["ranges"] = torch.randn(rows, 1, 2, generator=generator).half()
    return buffers, channels


def cut(buffers: Rows, channels: list[list[int]], start: int, stop: int) -> Rows:
    """Return rows start..stop-1 with their outliers, by counting lists."""
    first = sum(map(len, channels[:start]))
    last = sum(map(len, channels[:stop]))
    return {
        name: t[first:last] if name in ("outlier_values", "outlier_channels") else t[start:stop]
        for name, t in buffers.items()
    }


def assert_same(found: Rows, expected: Rows) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def body_with(
    side: str, buffers: Rows, channels: list[list[int]], batch: int, step: int
) -> PackedBody:
    body = PackedBody(getattr(parse_spec("nuq3-1%"), side), 64, batch)
    for start in range(0, len(channels), step * batch):
        body.append(cut(buffers, channels, start, start + step * batch))
    return body


class TestPages:
    @pytest.mark.parametrize("rows", LENGTHS)
    @pytest.mark.parametrize("step", (1, 7, 128, 1000))
    def test_rows_read_back_however_they_came(self, rows: int, step: int) -> None:
        data = torch.arange(rows * 3).view(rows, 3)
        buffer = PagedBuffer(PAGE_TOKENS)
        for part in data.split(step):
            buffer.append(part)
        assert torch.equal(buffer.read(), data)
        assert buffer.rows == rows

    @pytest.mark.parametrize("rows", LENGTHS)
    @pytest.mark.parametrize("step", (1, 100, 1000))
    def test_whole_pages_are_allocated_and_no_more(self, rows: int, step: int) -> None:
        buffer = PagedBuffer(PAGE_TOKENS)
        for part in torch.ones(rows, 3).split(step):
            buffer.append(part)
        assert sum(t.untyped_storage().nbytes() for t in buffer.tensors) == capacity(rows) * 3 * 4

    def test_spare_room_is_zero(self) -> None:
        buffer = PagedBuffer(8)
        buffer.append(torch.ones(5, 2))
        assert buffer.tensors[0][5:].tolist() == [[0, 0]] * 3

    def test_stored_rows_stay_where_they_are(self) -> None:
        buffer = PagedBuffer(8)
        buffer.append(torch.ones(5, 2))
        before = buffer.tensors[0].data_ptr()
        for _ in range(30):
            buffer.append(torch.ones(1, 2))
        assert buffer.tensors[0].data_ptr() == before

    @pytest.mark.parametrize("kept", (0, 1, 8, 9, 20, 99))
    def test_truncating_keeps_the_first_rows_and_gives_pages_back(self, kept: int) -> None:
        data = torch.arange(20.0)[:, None]
        buffer = PagedBuffer(8)
        buffer.append(data)
        buffer.truncate(kept)
        buffer.append(torch.full((1, 1), -1.0))
        assert torch.equal(buffer.read(), torch.cat([data[:kept], torch.full((1, 1), -1.0)]))
        pages = -(-(min(kept, 20) + 1) // 8)
        assert sum(len(block) for block in buffer.tensors) == 8 * pages


class TestRuns:
    @pytest.mark.parametrize("step", (1, 1000, 5000))
    def test_a_sequence_reads_back_however_it_came(self, step: int) -> None:
        data = torch.arange(9000)
        buffer = RunBuffer()
        for part in data.split(step):
            buffer.append(part.clone())
        assert torch.equal(buffer.read(), data)
        assert sum(t.untyped_storage().nbytes() for t in buffer.tensors) == 9000 * 8

    def test_many_small_runs_are_joined(self) -> None:
        buffer = RunBuffer()
        for part in torch.arange(9000).split(1):
            buffer.append(part)
        assert len(buffer.tensors) < 5

    def test_truncating_frees_what_is_dropped(self) -> None:
        buffer = RunBuffer()
        buffer.append(torch.arange(9000))
        buffer.truncate(10)
        assert buffer.read().tolist() == list(range(10))
        assert buffer.read().untyped_storage().nbytes() == 80


@pytest.mark.parametrize("side", ("key", "value"))
class TestBody:
    @pytest.mark.parametrize("batch", (1, 3))
    @pytest.mark.parametrize("tokens", (1, 127, 128, 129))
    def test_one_by_one_is_the_same_as_in_bulk(self, side: str, batch: int, tokens: int) -> None:
        """methods.md 7.11, the bytes."""
        rows, channels = rows_of(side, tokens * batch)
        assert_same(body_with(side, rows, channels, batch, 1).read(), rows)
        assert_same(body_with(side, rows, channels, batch, tokens).read(), rows)

    @pytest.mark.parametrize("batch", (1, 3))
    @pytest.mark.parametrize("tokens", (1, 127, 128, 129))
    def test_allocated_bytes_are_those_of_the_memory_table(
        self, side: str, batch: int, tokens: int
    ) -> None:
        rows, channels = rows_of(side, tokens * batch)
        body = body_with(side, rows, channels, batch, 10)
        outliers = sum(map(len, channels))
        spec = getattr(parse_spec("nuq3-1%"), side)
        table = body_buffers(spec, 64, capacity(tokens) * batch, outliers, "float32")
        found = {
            name: sum(t.untyped_storage().nbytes() for t in tensors)
            for name, tensors in body.tensors.items()
        }
        assert found == {name: buffer.nbytes for name, buffer in table.items()}
        assert body.outliers == outliers

    @pytest.mark.parametrize("kept", (0, 1, 128, 130, 999))
    def test_truncating_keeps_tokens_with_their_outliers(self, side: str, kept: int) -> None:
        rows, channels = rows_of(side, 140 * 2)
        body = body_with(side, rows, channels, 2, 33)
        body.truncate(kept)
        assert body.tokens == min(kept, 140)
        assert_same(body.read(), cut(rows, channels, 0, 2 * kept) if kept else {})

    @pytest.mark.parametrize("chosen", ([0], [2, 0], [1, 1, 0, 2]))
    def test_selecting_takes_each_sequence_with_its_outliers(
        self, side: str, chosen: list[int]
    ) -> None:
        rows, channels = rows_of(side, 5 * 3)
        body = body_with(side, rows, channels, 3, 2)
        body.select(torch.tensor(chosen))
        order = [token * 3 + sequence for token in range(5) for sequence in chosen]
        parts = [cut(rows, channels, row, row + 1) for row in order]
        assert body.batch == len(chosen)
        assert_same(body.read(), {name: torch.cat([p[name] for p in parts]) for name in rows})

    def test_rows_are_gathered_in_the_order_asked_for(self, side: str) -> None:
        rows, channels = rows_of(side, 9)
        order = [8, 0, 0, 3]
        parts = [cut(rows, channels, row, row + 1) for row in order]
        found = gather_rows(rows, torch.tensor(order), 2)
        assert_same(found, {name: torch.cat([p[name] for p in parts]) for name in rows})

    def test_an_empty_body_takes_a_new_batch(self, side: str) -> None:
        body = PackedBody(getattr(parse_spec("nuq3-1%"), side), 64, 2)
        body.select(torch.tensor([0, 1, 1]))
        assert (body.batch, body.tokens, body.read()) == (3, 0, {})
