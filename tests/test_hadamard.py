"""The rotation of value heads against Sylvester's matrix."""

import numpy as np
import pytest
import torch

from kvqtool.hadamard import rotate_heads


def sylvester(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix / np.sqrt(size)


@pytest.mark.parametrize(("head_dim", "block"), [(8, 8), (64, 64), (128, 128), (96, 32), (80, 16)])
def test_it_is_a_hadamard_matrix_per_block(head_dim: int, block: int) -> None:
    states = torch.randn(5, 3, head_dim, generator=torch.Generator().manual_seed(0))
    blocks = states.double().numpy().reshape(5, 3, -1, block)
    expected = (blocks @ sylvester(block)).reshape(5, 3, head_dim)
    assert np.abs(rotate_heads(states).numpy() - expected).max() < 2e-6


def test_it_undoes_itself() -> None:
    states = torch.randn(7, 2, 64, generator=torch.Generator().manual_seed(1))
    assert (rotate_heads(rotate_heads(states)) - states).abs().max() < 1e-6


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    states = torch.randn(33, 2, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rotate_heads(states)[5:6], rotate_heads(states[5:6]))


def test_one_great_channel_is_spread_over_all() -> None:
    states = torch.zeros(1, 1, 64)
    states[..., 17] = 8.0
    assert torch.equal(rotate_heads(states).abs(), torch.ones(1, 1, 64))
