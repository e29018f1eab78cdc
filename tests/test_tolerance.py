"""QAQ's formulas against autograd, noise and worked numbers (methods.md 7.16 to 7.19)."""

import math

import pytest
import torch

from kvqtool.side import WIDTHS
from kvqtool.tolerance import (
    RELEASED_QUERY_NORM,
    key_tolerance,
    needed_bits,
    stored_width,
    value_tolerance,
)

T = torch.tensor(101)


def bits(spread: float, sigma: torch.Tensor, formula: str) -> float:
    return float(needed_bits(torch.tensor(spread), sigma, formula))


def test_an_output_moves_by_weight_query_and_distance_of_a_key() -> None:
    """dX_j / dK_ti = S_t Q_i (V_tj - X_j), dX_j / dV_ti = S_t [i = j]: what both bounds rest on."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((4,), (6, 4), (6, 3))
    )
    by_key, by_value = torch.autograd.functional.jacobian(
        lambda k, v: (query @ k.T).softmax(0) @ v, (key, value)
    )
    weight = (query @ key.T).softmax(0)
    output = weight @ value
    wanted = torch.einsum("t,i,tj->jti", weight, query, value - output)
    assert torch.allclose(by_key, wanted, atol=1e-12)
    assert torch.allclose(by_value, torch.einsum("t,ij->jti", weight, torch.eye(3).double()))


def test_values_off_by_their_tolerance_move_the_output_by_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(64, generator=generator, dtype=torch.float64)
    weight /= weight.sum()
    sigma = value_tolerance(torch.tensor(64), 0.05, weight)
    noise = (torch.rand(20000, 64, generator=generator, dtype=torch.float64) - 0.5) * math.sqrt(12)
    moved = (noise * sigma) @ weight
    assert float(moved.std()) == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize(
    ("budget", "slack"), [(0.002, 0.03), (0.005, 0.05), (0.01, 0.15), (0.02, 0.2)]
)
def test_keys_off_by_their_tolerance_move_weights_by_the_budget(
    budget: float, slack: float
) -> None:
    """64 equal weights; the expansion holds for small budgets and then stays a bound."""
    generator = torch.Generator().manual_seed(0)
    sigma = float(key_tolerance(torch.tensor(64), budget, 1.0))
    logits = torch.randn(20000, 64, generator=generator, dtype=torch.float64) * sigma
    moved = float(logits.softmax(1).std())
    assert (1 - slack) * budget < moved < 1.001 * budget


@pytest.mark.parametrize(
    ("spread", "paper", "released"), [(4, 2.718, 2.101), (10, 4.040, 3.205), (40, 6.040, 5.083)]
)
def test_worked_key_bits(spread: float, paper: float, released: float) -> None:
    sigma = key_tolerance(T, 1.0, RELEASED_QUERY_NORM)
    assert float(sigma) * math.sqrt(12) == pytest.approx(0.6080, abs=1e-4)
    assert bits(spread, sigma, "paper") == pytest.approx(paper, abs=1e-3)
    assert bits(spread, sigma, "released") == pytest.approx(released, abs=1e-3)


@pytest.mark.parametrize(
    ("weight", "paper", "released"), [(0.5, 2.537, 1.964), (0.05, -0.785, 0.368)]
)
def test_worked_value_bits(weight: float, paper: float, released: float) -> None:
    sigma = value_tolerance(T, 1.0, torch.tensor(weight))
    assert bits(4, sigma, "paper") == pytest.approx(paper, abs=1e-3)
    assert bits(4, sigma, "released") == pytest.approx(released, abs=1e-3)


@pytest.mark.parametrize("formula", ("paper", "released"))
def test_more_range_more_weight_and_less_budget_ask_for_more_bits(formula: str) -> None:
    spreads = needed_bits(torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.tensor(0.1), formula)
    weights = needed_bits(
        torch.ones(3), value_tolerance(T, 0.1, torch.tensor([0.0, 0.1, 0.9])), formula
    )
    budgets = torch.stack([key_tolerance(T, e, 4.0) for e in (0.1, 0.05, 0.01)])
    for found in (spreads, weights, needed_bits(torch.ones(3), budgets, formula)):
        assert (found.diff() > 0).all()


def test_one_token_asks_for_finite_bits() -> None:
    assert torch.isfinite(key_tolerance(torch.tensor([1, 2]), 0.01, 4.0)).all()


def test_the_least_width_that_holds_the_bits_is_taken() -> None:
    asked = torch.tensor([-math.inf, -0.8, 0.0, 0.1, 2.0, 2.1, 3.0, 3.9, 4.2, 9.0, math.inf])
    assert stored_width(asked).tolist() == [0, 0, 0, 2, 2, 3, 3, 4, 8, 8, 8]
    assert stored_width(asked).dtype == torch.uint8
    assert set(WIDTHS) == {0, 2, 3, 4, 8}


def test_tolerance_of_keys_grows_with_the_context_so_that_bits_never_rise() -> None:
    counts = torch.arange(2, 100_000)
    found = key_tolerance(counts, 0.02, 3.0)
    assert torch.all(found[1:] > found[:-1])
