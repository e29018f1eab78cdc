"""Levels: golden numbers, and the definition of matched moments."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvqtool.codebook import (
    as_half,
    match_moments,
    normalfloat_levels,
    uniform_levels,
)
from kvqtool.kmeans import weighted_kmeans

Array = NDArray[np.float64]


def fit(points: Array, weights: Array, count: int) -> Array:
    return weighted_kmeans(points[None], weights[None], count)[0]


def cost(points: Array, weights: Array, levels: Array) -> float:
    """Return the weighted squared distance of every point to its nearest level."""
    return float((weights * np.abs(points[:, None] - levels).min(1) ** 2).sum())


class TestGivenLevels:
    @pytest.mark.parametrize("bits", (2, 3, 4, 8))
    def test_uniform_levels_are_equally_spaced_from_end_to_end(self, bits: int) -> None:
        expected = [-1 + 2 * i / (2**bits - 1) for i in range(2**bits)]
        assert uniform_levels(bits).tolist() == pytest.approx(expected, abs=1e-7)

    @pytest.mark.parametrize("bits", (2, 3, 4))
    def test_normalfloat_has_zero_and_both_ends(self, bits: int) -> None:
        """methods.md 7.2."""
        levels = normalfloat_levels(bits).tolist()
        assert len(levels) == 2**bits
        assert 0.0 in levels
        assert (levels[0], levels[-1]) == (-1.0, 1.0)
        assert levels == sorted(set(levels))

    def test_four_bit_normalfloat_is_evenly_spaced_in_probability(self) -> None:
        """methods.md 1.8: quantiles from 0.5 (1/32 + 1/30) to one half, and on to the mirror."""
        tail = 0.5 * (1 / 32 + 1 / 30)
        z = NormalDist().inv_cdf
        negative = [z(tail + i * (0.5 - tail) / 7) / -z(tail) for i in range(8)]
        positive = [z(0.5 + i * (0.5 - tail) / 8) / z(1 - tail) for i in range(1, 9)]
        assert normalfloat_levels(4).tolist() == pytest.approx(negative + positive, abs=1e-6)

    def test_four_bit_normalfloat_is_qloras_table(self) -> None:
        """The mirror of QLoRA's published NF4, whose extra level is on the positive side too."""
        published = [-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500]
        published += [0.0, 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170]
        published += [0.7229568, 1.0]
        # QLoRA rounds its outermost probability 0.9677083 as 0.9677083; levels agree to 1e-3.
        assert normalfloat_levels(4).tolist() == pytest.approx(published, abs=1e-3)


class TestHalf:
    def test_values_are_those_numpy_rounds_to(self) -> None:
        values = np.linspace(-3, 3, 1001, dtype=np.float32)
        expected = values.astype(np.float16).astype(np.float32)
        assert as_half(torch.from_numpy(values)).numpy().tolist() == expected.tolist()

    def test_values_beyond_half_precision_end_at_its_ends(self) -> None:
        assert as_half(torch.tensor([1e9, -1e9])).tolist() == [65504.0, -65504.0]


class TestMatchedMoments:
    @pytest.fixture
    def data(self) -> tuple[Array, Array, Array]:
        rng = np.random.default_rng(4)
        points = np.sort(np.clip(rng.normal(0.1, 0.4, size=5000), -1, 1))
        counts = rng.integers(1, 5, size=5000).astype(float)
        return points, counts, fit(points, counts, 4)

    def test_mean_and_deviation_come_back(self, data: tuple[Array, Array, Array]) -> None:
        """methods.md 7.8: encoding by the levels, decoding by the matched ones."""
        points, counts, levels = data
        matched = match_moments(points[None], counts[None], levels[None])[0]
        every = np.repeat(points, counts.astype(int))
        decoded = matched[np.abs(every[:, None] - levels).argmin(1)]
        assert decoded.mean() == pytest.approx(every.mean(), abs=1e-6)
        assert decoded.std() == pytest.approx(every.std(), abs=1e-6)

    def test_centroid_levels_spread_out(self, data: tuple[Array, Array, Array]) -> None:
        """methods.md 7.8: g >= 1, for means vary less than what they are means of."""
        points, counts, levels = data
        matched = match_moments(points[None], counts[None], levels[None])[0]
        gain = np.diff(matched) / np.diff(levels)
        assert gain == pytest.approx(gain[0])
        assert gain[0] >= 1

    def test_levels_of_constant_data_stay(self) -> None:
        levels = np.array([[-1.0, -0.2, 0.3, 1.0]])
        matched = match_moments(np.full((1, 8), 0.3), np.ones((1, 8)), levels)
        assert matched.tolist() == levels.tolist()

    def test_a_problem_without_data_keeps_its_levels(self) -> None:
        levels = np.zeros((1, 4))
        assert match_moments(np.zeros((1, 8)), np.zeros((1, 8)), levels).tolist() == [[0.0] * 4]


class TestGain:
    @pytest.mark.parametrize(
        ("bits", "nuq", "uniform"), [(2, 0.105, 0.268), (3, 0.029, 0.049), (4, 0.0078, 0.0106)]
    )
    def test_fitted_levels_beat_uniform_ones_as_expected(
        self, bits: int, nuq: float, uniform: float
    ) -> None:
        """methods.md 7.7: N(0, 1) cut at its 1 % tails; mean squared error over the variance.

        The golden numbers are Lloyd's, on a sample. The exact optimum at 4 bits is 5 % lower, at
        0.00738, which Panter and Dite's integral (1 / 12 L^2) (int f^(1/3))^3 comes to as well.
        """
        tail = NormalDist().cdf(-2.5758)
        z = NormalDist().inv_cdf
        cells = np.linspace(tail, 1 - tail, 4001)
        points = np.array([z(p) for p in (cells[1:] + cells[:-1]) / 2]) / 2.5758

        def error(levels: Array) -> float:
            return cost(points, np.ones_like(points), levels) / float((points**2).sum())

        fitted = error(fit(points, np.ones_like(points), 2**bits))
        assert 0.94 * nuq < fitted < 1.03 * nuq
        assert error(uniform_levels(bits).double().numpy()) == pytest.approx(uniform, rel=0.03)
