"""Rows of many widths: each is coded as if it were alone, stored packed, and every byte counted."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvqtool.codebook import Codebook, as_half, uniform_levels
from kvqtool.codec import encode, normalize
from kvqtool.memory import body_buffers, capacity, outliers_per_tail
from kvqtool.methods import fit_widths
from kvqtool.mixed import decode_mixed, encode_mixed, spread_of
from kvqtool.packed import PackedBody, gather_rows
from kvqtool.side import WIDTHS, QuantSpec

CHANNELS = 64
NO_LEVELS = torch.empty(0)
QAQ = QuantSpec("qaq", 0, outlier_fraction=0.05, error_budget=0.1)
KEYS = QuantSpec("nuq", 0, 0.05, pre_rope=True, per_channel=True, error_budget=0.1)
Rows = dict[str, Tensor]


def states_of(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    wide = torch.rand(CHANNELS, generator=generator) * 3 + 0.1
    return torch.randn(rows, CHANNELS, generator=generator) * wide + wide.flip(0)


def widths_of(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + 1)
    return torch.tensor(WIDTHS, dtype=torch.uint8)[torch.randint(5, (rows,), generator=generator)]


def book_of(spec: QuantSpec) -> Codebook:
    if spec.method == "qaq":
        return Codebook(*fit_widths(spec, None))
    levels = torch.cat([torch.zeros(1), *(as_half(uniform_levels(w)) for w in WIDTHS[1:])])
    upper = as_half(torch.linspace(1.0, 4.0, CHANNELS))
    return Codebook(levels, levels, -upper, upper)


@pytest.fixture(params=[QAQ, replace(QAQ, outlier_fraction=0.0), KEYS], ids=["qaq", "dense", "nuq"])
def spec(request: pytest.FixtureRequest) -> QuantSpec:
    found: QuantSpec = request.param
    return found


@pytest.mark.parametrize("bits", WIDTHS)
def test_midpoints_err_by_half_a_cell_at_most_and_outliers_not_at_all(bits: int) -> None:
    """methods.md 7.20; without bits a row is its mean, which the released code misses by far."""
    states = states_of(50)
    buffers = encode_mixed(states, torch.full((50,), bits, dtype=torch.uint8), book_of(QAQ), QAQ)
    decoded = decode_mixed(buffers, book_of(QAQ), QAQ, CHANNELS)
    ranged = normalize(states, Codebook(NO_LEVELS, NO_LEVELS), QAQ)
    assert ranged.outliers is not None
    assert torch.equal(decoded[ranged.outliers], states[ranged.outliers].half().float())
    rest = states.masked_fill(ranged.outliers, float("nan"))
    if bits == 0:
        mean = rest.nanmean(1, keepdim=True)
        wanted = mean.expand_as(states)[~ranged.outliers]
        assert torch.allclose(decoded[~ranged.outliers], wanted, rtol=2e-3, atol=1e-3)
        return
    reach = rest.nan_to_num(-torch.inf).amax(1) - rest.nan_to_num(torch.inf).amin(1)
    off = (decoded - states).abs().masked_fill(ranged.outliers, 0.0).amax(1)
    assert (off <= reach / 2 ** (bits + 1) + 2e-3 * states.abs().amax(1)).all()


@pytest.mark.parametrize("channels", [(128, 1), (4096, 21), (131072, 656)])
def test_an_outlier_share_is_what_the_reference_takes_at_each_level(
    channels: tuple[int, int],
) -> None:
    spec = QuantSpec("qaq", 4, outlier_fraction=0.01)
    assert outliers_per_tail(spec, channels[0]) == channels[1]


def test_a_row_is_coded_as_if_all_had_its_width(spec: QuantSpec) -> None:
    states, widths, book = states_of(40), widths_of(40), book_of(spec)
    decoded = decode_mixed(encode_mixed(states, widths, book, spec), book, spec, CHANNELS)
    for width in WIDTHS:
        same = torch.full_like(widths, width)
        alone = decode_mixed(encode_mixed(states, same, book, spec), book, spec, CHANNELS)
        assert torch.equal(decoded[widths == width], alone[widths == width])


@pytest.mark.parametrize("bits", WIDTHS[1:])
def test_one_width_for_all_is_the_uniform_codec(spec: QuantSpec, bits: int) -> None:
    states, book = states_of(20), book_of(spec)
    mixed = encode_mixed(states, torch.full((20,), bits, dtype=torch.uint8), book, spec)
    plain = encode(states, book.at(bits), replace(spec, bits=bits, error_budget=None))
    assert torch.equal(mixed[f"words{bits}"], plain["words"])
    assert all(torch.equal(mixed[name], plain[name]) for name in plain if name != "words")


def test_the_range_that_asks_for_bits_is_the_rows_own_or_that_of_its_channels() -> None:
    states = states_of(9)
    rest = states.sort(dim=1).values[:, 2:-2]
    own = spread_of(normalize(states, Codebook(NO_LEVELS, NO_LEVELS), QAQ))
    assert torch.allclose(own, rest[:, -1] - rest[:, 0], rtol=2e-3)
    book = book_of(KEYS)
    assert book.upper is not None
    wanted = 2 * book.upper.square().mean().sqrt()
    assert torch.allclose(spread_of(normalize(states, book, KEYS)), wanted.expand(9))


def cut(stored: Rows, spec: QuantSpec, start: int, stop: int) -> Rows:
    return gather_rows(stored, torch.arange(start, stop), 2 * outliers_per_tail(spec, CHANNELS))


def assert_same(found: Rows, expected: Rows) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def body_of(rows: Rows, spec: QuantSpec, batch: int, step: int) -> PackedBody:
    body, total = PackedBody(spec, CHANNELS, batch), len(rows["widths"])
    for start in range(0, total, step * batch):
        body.append(cut(rows, spec, start, min(start + step * batch, total)))
    return body


class TestBody:
    def test_one_by_one_and_in_bulk_hold_the_same(self, spec: QuantSpec) -> None:
        rows = encode_mixed(states_of(130), widths_of(130), book_of(spec), spec)
        assert_same(body_of(rows, spec, 2, 1).read(), rows)
        assert_same(body_of(rows, spec, 2, 65).read(), rows)

    @pytest.mark.parametrize("tokens", (1, 65, 129))
    @pytest.mark.parametrize("only", (None, *WIDTHS))
    def test_allocated_bytes_are_those_of_the_memory_table(
        self, spec: QuantSpec, tokens: int, only: int | None
    ) -> None:
        widths = widths_of(tokens * 2)
        if only is not None:
            widths = torch.full_like(widths, only)
        rows = encode_mixed(states_of(tokens * 2), widths, book_of(spec), spec)
        body = body_of(rows, spec, 2, 33)
        assert body.widths == tuple(int((widths == width).sum()) for width in WIDTHS)
        room = capacity(tokens) * 2
        table = body_buffers(spec, CHANNELS, room, body.outliers, "float32", body.widths)
        held = {n: sum(t.untyped_storage().nbytes() for t in ts) for n, ts in body.tensors.items()}
        assert held == {name: buffer.nbytes for name, buffer in table.items()}

    @pytest.mark.parametrize("kept", (0, 1, 16, 64, 99))
    def test_truncating_keeps_the_first_tokens(self, spec: QuantSpec, kept: int) -> None:
        rows = encode_mixed(states_of(130), widths_of(130), book_of(spec), spec)
        body = body_of(rows, spec, 2, 33)
        body.truncate(kept)
        assert_same(body.read(), cut(rows, spec, 0, 2 * min(kept, 65)) if kept else {})
        body.append(cut(rows, spec, 2 * min(kept, 65), 130))
        assert_same(body.read(), rows)

    def test_dropping_frees_the_first_page(self, spec: QuantSpec) -> None:
        rows = encode_mixed(states_of(300), widths_of(300), book_of(spec), spec)
        body = body_of(rows, spec, 1, 33)
        body.drop(128)
        assert_same(body.read(), cut(rows, spec, 128, 300))
        table = body_buffers(spec, CHANNELS, 256, body.outliers, "float32", body.widths)
        held = {n: sum(t.nbytes for t in ts) for n, ts in body.tensors.items()}
        assert held == {name: buffer.nbytes for name, buffer in table.items()}

    def test_selecting_takes_each_sequence_with_its_widths(self, spec: QuantSpec) -> None:
        rows = encode_mixed(states_of(15), widths_of(15), book_of(spec), spec)
        body = body_of(rows, spec, 3, 2)
        body.select(torch.tensor([2, 0, 2]))
        order = torch.tensor([3 * token + each for token in range(5) for each in (2, 0, 2)])
        wanted = encode_mixed(states_of(15)[order], widths_of(15)[order], book_of(spec), spec)
        assert_same(body.read(), wanted)
