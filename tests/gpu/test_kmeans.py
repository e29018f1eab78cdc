"""Fits on the GPU: the same levels as on the CPU, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvqtool.kmeans import least_errors, weighted_kmeans

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("shape", ((1, 4096), (192, 1024), (5, 7)))
def test_levels_and_errors_are_those_of_the_cpu(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    points, weights = np.sort(rng.normal(size=shape)), rng.exponential(size=shape)
    weights[rng.random(shape) < 0.2] = 0.0
    for solve in (weighted_kmeans, least_errors):
        assert np.array_equal(solve(points, weights, 8, CUDA), solve(points, weights, 8))
