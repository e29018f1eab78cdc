"""Exact k-means on a line: golden numbers, and brute force over every partition."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from kvqtool.kmeans import least_errors, weighted_kmeans

Array = NDArray[np.float64]

POINTS = np.array([-1, -0.9, -0.5, -0.1, 0, 0.05, 0.4, 0.8, 1])
WEIGHTS = np.array([1, 10, 1, 1, 1, 1, 5, 1, 10.0])


def fit(points: Array, weights: Array, count: int) -> Array:
    return weighted_kmeans(points[None], weights[None], count)[0]


def cost(points: Array, weights: Array, levels: Array) -> float:
    """Return the weighted squared distance of every point to its nearest level."""
    return float((weights * np.abs(points[:, None] - levels).min(1) ** 2).sum())


def least_cost(points: Array, weights: Array, count: int) -> float:
    """Return the least cost over every way to cut sorted points into `count` runs."""

    def run(start: int, stop: int) -> float:
        x, w = points[start:stop], weights[start:stop]
        return float((w * (x - np.average(x, weights=w)) ** 2).sum())

    cuts = combinations(range(1, len(points)), count - 1)
    return min(
        sum(run(a, b) for a, b in zip((0, *cut), (*cut, len(points)), strict=True)) for cut in cuts
    )


def lloyd(points: Array, weights: Array, count: int, rng: np.random.Generator) -> Array:
    """Return levels of plain k-means from a random start: what everyone else uses."""
    levels = np.sort(rng.choice(points, count, replace=False))
    for _ in range(100):
        nearest = np.abs(points[:, None] - levels).argmin(1)
        mass = np.bincount(nearest, weights, count)
        moment = np.bincount(nearest, weights * points, count)
        levels = np.where(mass > 0, moment / np.maximum(mass, 1e-300), levels)
    return np.sort(levels)


class TestWeightedKmeans:
    def test_weighted_levels_are_the_golden_ones(self) -> None:
        """methods.md 7.5."""
        levels = fit(POINTS, WEIGHTS, 4)
        assert levels.tolist() == pytest.approx([-0.875, -1 / 60, 0.4, 0.9818182], abs=1e-6)
        assert cost(POINTS, WEIGHTS, levels) == pytest.approx(0.2105303, abs=1e-6)

    def test_unweighted_levels_are_the_golden_ones(self) -> None:
        """methods.md 7.5."""
        levels = fit(POINTS, np.ones(9), 4)
        assert levels.tolist() == pytest.approx([-0.95, -0.5, 0.0875, 0.9], abs=1e-6)
        assert cost(POINTS, np.ones(9), levels) == pytest.approx(0.166875, abs=1e-6)

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("count", (2, 3, 4))
    def test_no_other_partition_costs_less(self, seed: int, count: int) -> None:
        rng = np.random.default_rng(seed)
        points, weights = np.sort(rng.normal(size=11)), rng.exponential(size=11)
        levels = fit(points, weights, count)
        expected = least_cost(points, weights, count)
        assert cost(points, weights, levels) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("count", (4, 8, 16))
    def test_plain_kmeans_never_costs_less(self, seed: int, count: int) -> None:
        """methods.md 7.5, against ten random starts of Lloyd's iteration."""
        rng = np.random.default_rng(seed)
        points, weights = np.sort(rng.standard_t(3, size=300)), rng.exponential(size=300)
        best = min(cost(points, weights, lloyd(points, weights, count, rng)) for _ in range(10))
        assert cost(points, weights, fit(points, weights, count)) <= best * (1 + 1e-9)

    def test_problems_of_a_batch_do_not_see_each_other(self) -> None:
        rng = np.random.default_rng(0)
        points, weights = np.sort(rng.normal(size=(5, 64))), rng.exponential(size=(5, 64))
        together = weighted_kmeans(points, weights, 8)
        alone = [fit(x, w, 8) for x, w in zip(points, weights, strict=True)]
        assert together.tolist() == np.stack(alone).tolist()

    def test_the_scale_of_weights_does_not_matter(self) -> None:
        assert fit(POINTS, WEIGHTS * 1e-12, 4) == pytest.approx(fit(POINTS, WEIGHTS, 4), abs=1e-9)

    def test_points_without_weight_are_ignored(self) -> None:
        weights = WEIGHTS.copy()
        weights[4] = 0.0
        without = fit(np.delete(POINTS, 4), np.delete(weights, 4), 4)
        assert fit(POINTS, weights, 4) == pytest.approx(without, abs=1e-12)

    def test_fewer_points_than_levels_are_met_exactly(self) -> None:
        levels = fit(np.array([-1.0, 0.25, 1.0]), np.ones(3), 8)
        assert sorted(set(levels.tolist())) == [-1.0, 0.25, 1.0]
        assert levels.tolist() == sorted(levels.tolist())

    def test_one_heavy_point_does_not_lose_the_others(self) -> None:
        levels = fit(np.array([-1.0, 0.0, 1.0]), np.array([1e-6, 1e6, 1e-6]), 4)
        assert sorted(set(levels.round(4).tolist())) == [-1.0, 0.0, 1.0]

    def test_no_weight_at_all_gives_zeros(self) -> None:
        assert fit(POINTS, np.zeros(9), 4).tolist() == [0.0] * 4

    def test_levels_of_every_number_have_the_least_errors(self) -> None:
        rng = np.random.default_rng(0)
        points, weights = np.sort(rng.normal(size=(3, 40))), rng.exponential(size=(3, 40))
        errors = least_errors(points, weights, 5)
        for problem, count in np.ndindex(errors.shape):
            levels = fit(points[problem], weights[problem], count + 1)
            expected = cost(points[problem], weights[problem], levels)
            assert errors[problem, count] == pytest.approx(expected, rel=1e-9)
