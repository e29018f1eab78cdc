"""Histograms of normalised states: sums against NumPy, and fits against the data they stand for."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kvqtool.histogram import CHANNEL_BINS, LAYER_BINS, LevelHistogram
from kvqtool.kmeans import weighted_kmeans

CPU = torch.device("cpu")


def data(rows: int = 300, channels: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalised values, weights and which values are kept."""
    rng = np.random.default_rng(seed)
    u = np.clip(rng.normal(0, 0.4, (rows, channels)), -1, 1)
    weights, kept = rng.exponential(size=u.shape), rng.random(u.shape) > 0.05
    return torch.from_numpy(u).float(), torch.from_numpy(weights).float(), torch.from_numpy(kept)


def histogram_of(
    problems: int, bins: int, *batches: tuple[Tensor, Tensor | None, Tensor]
) -> LevelHistogram:
    histogram = LevelHistogram(problems, bins, CPU)
    for batch in batches:
        histogram.update(*batch)
    return histogram


def test_bins_are_numpys_weighted_sums_and_means() -> None:
    u, weights, kept = data()
    points, mass = histogram_of(1, 64, (u, weights, kept)).weighted()
    flat, w = u.double().numpy().ravel(), (weights * kept).double().numpy().ravel()
    edges = np.linspace(-1, 1, 65)
    expected = np.histogram(flat, edges, weights=w)[0]
    moment = np.histogram(flat, edges, weights=w * flat)[0]
    assert mass[0] == pytest.approx(expected, rel=1e-12)
    filled = expected > 0
    assert points[0][filled] == pytest.approx((moment / np.where(filled, expected, 1))[filled])


def test_counts_leave_weights_out() -> None:
    u, weights, kept = data()
    _, counts = histogram_of(1, 64, (u, weights, kept)).counted()
    flat = u.double().numpy()[kept.numpy()]
    assert counts[0].tolist() == np.histogram(flat, np.linspace(-1, 1, 65))[0].tolist()


def test_without_weights_both_are_counts() -> None:
    u, _, kept = data()
    histogram = histogram_of(1, 64, (u, None, kept))
    assert histogram.weighted()[1].tolist() == histogram.counted()[1].tolist()


def test_channels_are_counted_apart() -> None:
    u, weights, kept = data()
    points, mass = histogram_of(8, 32, (u, weights, kept)).weighted()
    assert points.shape == mass.shape == (8, 32)
    for channel in range(8):
        part = (u[:, [channel]], weights[:, [channel]], kept[:, [channel]])
        alone_points, alone_mass = histogram_of(1, 32, part).weighted()
        assert mass[channel] == pytest.approx(alone_mass[0])
        assert points[channel] == pytest.approx(alone_points[0])


def test_points_ascend_empty_bins_included() -> None:
    u = torch.tensor([[-1.0, -0.3, 0.3, 1.0]])
    points, _ = histogram_of(1, LAYER_BINS, (u, None, torch.ones(1, 4).bool())).weighted()
    assert (np.diff(points[0]) > 0).all()


def test_values_beyond_the_range_count_at_its_ends() -> None:
    u = torch.tensor([[-5.0, 5.0]])
    points, mass = histogram_of(1, 16, (u, None, torch.ones(1, 2).bool())).weighted()
    assert (points[0][0], points[0][-1]) == (-1.0, 1.0)
    assert (mass[0][0], mass[0][-1]) == (1.0, 1.0)


def test_batches_add_up() -> None:
    one, two = data(seed=1), data(seed=2)
    both = tuple(torch.cat(pair) for pair in zip(one, two, strict=True))
    apart = histogram_of(1, 256, one, two).weighted()
    together = histogram_of(1, 256, both).weighted()  # type: ignore[arg-type]  # a triple
    assert apart[1] == pytest.approx(together[1], rel=1e-12)
    assert apart[0] == pytest.approx(together[0], rel=1e-12)


def test_memory_does_not_grow_with_the_stream() -> None:
    def size(histogram: LevelHistogram) -> int:
        return histogram._sums.untyped_storage().nbytes()

    few, many = histogram_of(1, LAYER_BINS, data(1)), histogram_of(1, LAYER_BINS, *[data()] * 5)
    assert size(few) == size(many) == 4 * LAYER_BINS * 8


@pytest.mark.parametrize("bins", (CHANNEL_BINS, LAYER_BINS))
def test_levels_fitted_to_bins_cost_what_levels_fitted_to_values_cost(bins: int) -> None:
    """methods.md 7.5: the histogram version is within bin-width error of the exact one."""
    u, weights, _ = data(rows=250)
    points, mass = histogram_of(1, bins, (u, weights, torch.ones_like(u).bool())).weighted()
    order = u.flatten().argsort()
    values = u.flatten()[order].double().numpy()
    w = weights.flatten()[order].double().numpy()

    def cost(levels: np.ndarray) -> float:
        return float((w * np.abs(values[:, None] - levels).min(1) ** 2).sum())

    exact = cost(weighted_kmeans(values[None], w[None], 8)[0])
    # Every value moves by less than a bin: the root of the mean error by less than one, and back.
    slack = 2 * (2 / bins) * np.sqrt(w.sum())
    assert np.sqrt(cost(weighted_kmeans(points, mass, 8)[0])) <= np.sqrt(exact) + slack


def test_joined_histograms_keep_each_others_problems_apart() -> None:
    parts = [histogram_of(*shape, data(seed=seed)) for seed, shape in enumerate([(1, 64), (8, 64)])]
    whole = LevelHistogram.joined(parts)
    assert whole.problems == 9
    for read in (LevelHistogram.weighted, LevelHistogram.counted):
        expected = [np.concatenate(rows) for rows in zip(*map(read, parts), strict=True)]
        assert all(np.array_equal(a, b) for a, b in zip(read(whole), expected, strict=True))
