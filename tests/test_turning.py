"""Angles by table and by polynomials, against exact ones."""

from __future__ import annotations

import math

import pytest
import torch
from attention_case import radians

from kvqtool.turning import (
    TERMS,
    angle_table,
    coefficient_table,
    coefficients,
    frequency_table,
    turned_steps,
)


def test_phases_are_exact_at_any_position() -> None:
    inv_freq = 500_000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
    position = 10_000_019
    turns = (frequency_table(inv_freq) * position).double() / 2.0**64
    whole = [math.fmod(position * f / math.tau, 1.0) for f in inv_freq.tolist()]
    difference = turns - torch.tensor(whole, dtype=torch.float64)
    assert (difference - difference.round()).abs().max() < 1e-8


def test_angles_lie_in_fragment_order() -> None:
    inv_freq = 10_000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
    table = angle_table(inv_freq)
    tile, step, row, column, upper, half = 5, 3, 6, 2, 1, 1
    angle = (16 * tile + 8 * upper + row - 64) * inv_freq[8 * step + 2 * column + half]
    cosine, sine = table[tile, step, 4 * row + column, upper, :, half].tolist()
    assert cosine == pytest.approx(math.cos(angle), abs=1e-3)
    assert sine == pytest.approx(math.sin(angle), abs=1e-3)


def test_coefficients_are_bessel_functions() -> None:
    found = coefficients(torch.tensor([1.0 / 64, 0.0], dtype=torch.float64))
    # J_0(1) to J_3(1), Abramowitz and Stegun, tables 9.1 and 9.2.
    known = [0.7651976866, 2 * 0.4400505857, -2 * 0.1149034849, -2 * 0.0195633540]
    assert found[0, :4].tolist() == pytest.approx(known, abs=1e-9)
    assert found[1].tolist() == pytest.approx([1] + [0] * 7, abs=1e-12)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_what_is_not_turned_is_off_by_little(theta: float, group: int) -> None:
    inv_freq = radians(128, theta)
    first = turned_steps(inv_freq, group, 4)
    terms = TERMS // group
    worst = torch.zeros(64, dtype=torch.float64)
    for place in range(-64, 64):
        polynomials = [math.cos(m * math.acos(place / 64)) for m in range(terms)]
        made = coefficients(inv_freq)[:, :terms] * torch.tensor(polynomials, dtype=torch.float64)
        exact = inv_freq * place
        off = torch.hypot(made[:, ::2].sum(1) - exact.cos(), made[:, 1::2].sum(1) - exact.sin())
        worst = torch.maximum(worst, off)
    assert (worst[8 * first :] <= 1 / 480).all()
    assert worst[8 * first - 8 : 8 * first].max() > 1 / 480  # no step is turned without need


def test_the_kernel_has_two_pairs_to_a_word() -> None:
    inv_freq = radians(128)
    table = coefficient_table(inv_freq)
    assert table.shape == (32, TERMS, 2)
    pair, term = 37, 3
    assert table[pair // 2, term, pair % 2] == coefficients(inv_freq)[pair, term].half()


def test_few_steps_of_known_models_are_turned() -> None:
    # A theta of 10,000 (LLaMA) and of 500,000 (Llama 3), heads of 128: of 8 steps.
    assert [turned_steps(radians(128), group, 4) for group in (1, 2, 4, 8)] == [3, 4, 6, 8]
    llama3 = radians(128, 500_000.0)
    assert [turned_steps(llama3, group, 4) for group in (1, 2, 4, 8)] == [2, 3, 4, 7]
    assert turned_steps(llama3, 4, 8) == 5
    assert turned_steps(torch.zeros(64), 8, 4) == 0
