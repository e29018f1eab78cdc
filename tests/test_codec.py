"""Encoding and decoding against NumPy loops, and the paper's claims about axes and outliers."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvqtool.bits import unpack_words
from kvqtool.codebook import Codebook, as_half, normalfloat_levels, uniform_levels
from kvqtool.codec import decode, decode_dense, encode, nearest_level
from kvqtool.side import QuantSpec
from kvqtool.spec import parse_spec

Array = NDArray[np.float64]

# Relative errors before RoPE by channel and by token, then after it (methods.md 7.4).
ERRORS = {
    4: (0.0509, 0.2425, 0.0842, 0.2181),
    3: (0.1094, 0.5078, 0.1790, 0.4669),
    2: (0.2587, 1.2865, 0.4510, 0.9919),
}


def normal(rows: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def levels_of(spec: QuantSpec) -> Tensor:
    return as_half(
        normalfloat_levels(spec.bits) if spec.method == "nf" else uniform_levels(spec.bits)
    )


def per_token_book(spec: QuantSpec) -> Codebook:
    return Codebook(levels_of(spec), levels_of(spec))


def per_channel_book(spec: QuantSpec, lower: Tensor, upper: Tensor) -> Codebook:
    return Codebook(levels_of(spec), levels_of(spec), as_half(lower), as_half(upper))


def half(value: float) -> float:
    return float(np.float16(value))


def nearest(u: float, levels: list[float]) -> int:
    """Return the nearest level's index, the lower one at a tie."""
    return min(range(len(levels)), key=lambda i: (abs(u - levels[i]), i))


def by_hand(values: list[float], levels: list[float], lost: int) -> list[float]:
    """Quantize one group of one token: outliers by rank, the range of the rest, nearest level."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    exact = order[:lost] + order[len(order) - lost :]
    rest = [values[i] for i in range(len(values)) if i not in exact]
    scale, offset = half((max(rest) - min(rest)) / 2), half((max(rest) + min(rest)) / 2)
    out = [levels[nearest((v - offset) / scale, levels)] * scale + offset for v in values]
    for i in exact:
        out[i] = half(values[i])
    return out


class TestNearestLevel:
    def test_a_tie_goes_to_the_lower_level(self) -> None:
        codes = nearest_level(torch.tensor([[-0.5, 0.5, 0.50001]]), torch.tensor([-1.0, 0.0, 1.0]))
        assert codes.tolist() == [[0, 1, 2]]

    def test_what_lies_beyond_the_ends_takes_them(self) -> None:
        assert nearest_level(torch.tensor([[-9.0, 9.0]]), torch.tensor([-1.0, 0, 1])).tolist() == [
            [0, 2]
        ]

    def test_repeated_levels_leave_the_distance_least(self) -> None:
        levels = torch.tensor([-1.0, 0.5, 0.5, 0.5])
        codes = nearest_level(torch.linspace(-1, 1, 41)[None], levels)[0]
        distance = (torch.linspace(-1, 1, 41)[:, None] - levels).abs()
        assert torch.equal(distance.gather(1, codes.long()[:, None])[:, 0], distance.amin(1))

    def test_every_channel_can_have_its_own_levels(self) -> None:
        levels = torch.sort(normal(24, 8), dim=1).values
        states = normal(50, 24, seed=1)
        expected = (states[:, :, None].double() - levels.double()).abs().argmin(-1)
        assert torch.equal(nearest_level(states, levels).long(), expected)


class TestPerToken:
    @pytest.mark.parametrize(
        ("text", "lost"), [("int4", 0), ("int2", 0), ("int3-1%", 1), ("nf4-5%", 3), ("nf3", 0)]
    )
    def test_a_token_decodes_to_what_a_loop_over_it_says(self, text: str, lost: int) -> None:
        spec, states = parse_spec(text).value, normal(9, 96)
        book = per_token_book(spec)
        decoded = decode(encode(states, book, spec), book, spec, 96)
        levels = book.levels.tolist()
        for row, values in zip(decoded.tolist(), states.tolist(), strict=True):
            assert row == pytest.approx(by_hand(values, levels, lost), abs=1e-5)

    def test_a_group_decodes_to_what_a_loop_over_it_says(self) -> None:
        spec, states = parse_spec("int3-g32").value, normal(5, 96)
        book = per_token_book(spec)
        decoded = decode(encode(states, book, spec), book, spec, 96)
        for row, values in zip(decoded.tolist(), states.tolist(), strict=True):
            for start in (0, 32, 64):
                expected = by_hand(values[start : start + 32], book.levels.tolist(), 0)
                assert row[start : start + 32] == pytest.approx(expected, abs=1e-5)

    def test_a_group_of_nothing_but_outliers_stays_exact(self) -> None:
        spec, states = parse_spec("int4-40%-g8").value, normal(1, 32).abs()
        states[0, 8:16] = 100 + torch.arange(8)
        book = per_token_book(spec)
        decoded = decode(encode(states, book, spec), book, spec, 32)
        assert torch.equal(decoded[0, 8:16], states[0, 8:16].half().float())


class TestPerChannel:
    @pytest.mark.parametrize("text", ("int4", "int3-1%", "nf4-2%", "int2-10%"))
    def test_a_channel_decodes_to_what_a_loop_over_it_says(self, text: str) -> None:
        spec, states = parse_spec(text).key, normal(60, 24)
        tail = spec.outlier_fraction / 2
        lower, upper = (torch.quantile(states, q, dim=0) for q in (tail, 1 - tail))
        book = per_channel_book(spec, lower, upper)
        decoded = decode(encode(states, book, spec), book, spec, 24)
        levels = book.levels.tolist()
        for channel in range(24):
            low, high = float(as_half(lower)[channel]), float(as_half(upper)[channel])
            scale, offset = (high - low) / 2, (high + low) / 2
            for value, found in zip(
                states[:, channel].tolist(), decoded[:, channel].tolist(), strict=True
            ):
                is_outlier = tail > 0 and not low <= value <= high
                dense = levels[nearest((value - offset) / scale, levels)] * scale + offset
                expected = half(value) if is_outlier else dense
                assert found == pytest.approx(expected, abs=1e-5)

    def test_a_cap_keeps_those_farthest_in_half_ranges(self) -> None:
        spec = parse_spec("int4-1%-cap2").key
        book = per_channel_book(
            spec, -torch.tensor([1.0] * 7 + [10.0]), torch.tensor([1.0] * 7 + [10.0])
        )
        states = torch.tensor([[0.0, 3.0, -5.0, 0.5, 1.5, 0.0, 0.0, 20.0]])  # u: 3, -5, 1.5, 2
        buffers = encode(states, book, spec)
        assert buffers["outlier_channels"].tolist() == [1, 2]
        assert buffers["outlier_counts"].tolist() == [2]

    def test_a_channel_without_range_is_its_value(self) -> None:
        spec = parse_spec("int4").key
        book = per_channel_book(spec, torch.full((8,), 0.75), torch.full((8,), 0.75))
        decoded = decode(encode(torch.full((3, 8), 0.75), book, spec), book, spec, 8)
        assert torch.equal(decoded, torch.full((3, 8), 0.75))

    def test_moved_decode_levels_leave_the_codes_alone(self) -> None:
        """methods.md 7.8: codes are chosen by the fitted levels, whatever they decode to."""
        spec, states = parse_spec("nuq3-qnorm").value, normal(8, 64)
        plain = Codebook(levels := as_half(uniform_levels(3)), levels)
        moved = Codebook(levels, levels * 1.5 + 0.25)
        assert torch.equal(
            encode(states, plain, spec)["words"], encode(states, moved, spec)["words"]
        )
        dense = decode(encode(states, moved, spec), moved, spec, 64)
        ranges = encode(states, moved, spec)["ranges"].float()[:, 0]
        u = (dense - ranges[:, 1:]) / ranges[:, :1]
        assert torch.isin((u * 64).round(), (moved.decode_levels * 64).round()).all()


class TestDenseAndSparse:
    """methods.md 7.9: dense and sparse products add up to that of the full reconstruction."""

    @pytest.mark.parametrize("text", ("int3-1%", "int3-10%", "nf4-1%"))
    @pytest.mark.parametrize("side", ("key", "value"))
    def test_products_add_up(self, text: str, side: str) -> None:
        spec, states = getattr(parse_spec(text), side), normal(40, 64)
        states[3] *= 20.0  # a token with outliers everywhere
        states[4] *= 0.01  # and one with none by threshold
        tail = spec.outlier_fraction / 2
        book = per_token_book(spec)
        if side == "key":
            book = per_channel_book(
                spec, *(normal(4000, 64).quantile(q, dim=0) for q in (tail, 1 - tail))
            )
        buffers = encode(states, book, spec)
        full, dense = decode(buffers, book, spec, 64), decode_dense(buffers, book, spec, 64)
        sparse = full - dense
        counts = (sparse != 0).sum(1)
        query = normal(64, 1, seed=9)[:, 0]
        both = dense @ query + sparse @ query
        assert both.tolist() == pytest.approx((full @ query).tolist(), abs=1e-3)
        if side == "key":
            assert counts[4] == 0
            assert counts[3] > 32

    def test_outliers_come_back_as_half_precision_stores_them(self) -> None:
        spec, states = parse_spec("int2-5%").value, normal(30, 64)
        book = per_token_book(spec)
        buffers = encode(states, book, spec)
        decoded = decode(buffers, book, spec, 64)
        order = states.argsort(dim=1)
        ends = torch.cat([order[:, :2], order[:, -2:]], 1)
        assert torch.equal(decoded.gather(1, ends), states.gather(1, ends).half().float())


class TestAxesAndRope:
    """methods.md 7.4: four large key channels, before and after RoPE, by channel or token."""

    @pytest.fixture
    def keys(self) -> Array:
        mean, deviation = np.zeros(128), np.ones(128)
        mean[[5, 37, 70, 101]] = 12, -9, 15, -20
        deviation[[5, 37, 70, 101]] = 2, 1.5, 2.5, 3
        return np.random.default_rng(1).normal(size=(2048, 128)) * deviation + mean

    def rotated(self, keys: Array) -> Array:
        phase = np.arange(2048)[:, None] * 10000.0 ** (-np.arange(64) / 64)
        first, second = keys[:, :64], keys[:, 64:]
        cos, sin = np.cos(phase), np.sin(phase)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], 1)

    def error(self, states: Array, spec: QuantSpec) -> float:
        rows = torch.from_numpy(states).float()
        book = per_token_book(spec)
        if spec.per_channel:
            book = per_channel_book(spec, rows.amin(0), rows.amax(0))
        decoded = decode(encode(rows, book, spec), book, spec, 128).double().numpy()
        return float(np.linalg.norm(decoded - states) / np.linalg.norm(states))

    def errors(self, keys: Array, bits: int) -> list[float]:
        channel, token = parse_spec(f"int{bits}").key, parse_spec(f"int{bits}-pertoken").key
        turned = self.rotated(keys)
        return [self.error(states, spec) for states in (keys, turned) for spec in (channel, token)]

    @pytest.mark.parametrize("bits", (4, 3, 2))
    def test_errors_are_the_golden_ones(self, keys: Array, bits: int) -> None:
        found = self.errors(keys, bits)
        assert found == pytest.approx(ERRORS[bits], rel=2e-3)

    @pytest.mark.parametrize("bits", (4, 3, 2))
    def test_channels_before_rope_win_and_tokens_before_rope_lose(
        self, keys: Array, bits: int
    ) -> None:
        pre_channel, pre_token, post_channel, post_token = self.errors(keys, bits)
        assert pre_channel < post_channel < post_token < pre_token


@pytest.mark.parametrize("channels", (40, 64, 80, 96, 128, 256))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_codes_lie_in_the_words_of_their_row(channels: int, bits: int) -> None:
    spec = parse_spec(f"int{bits}").value
    states, book = normal(3, channels), per_token_book(spec)
    words = encode(states, book, spec)["words"]
    assert words.shape == (3, -(-channels * bits // 32))
    codes = unpack_words(words, bits, channels)
    assert codes.gather(1, states.argmin(1, keepdim=True)).tolist() == [[0]] * 3
    assert codes.gather(1, states.argmax(1, keepdim=True)).tolist() == [[2**bits - 1]] * 3
