"""Products with keys or values alone: the kernels' sources on the CPU against torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_case import Built, Case, build
from shim.build import HAS_COMPILER, mostly_slow, run_on_cpu

from kvqtool.errors import InputError
from kvqtool.matvec import (
    PARTS,
    Part,
    Product,
    mix_values,
    mix_values_reference,
    score_keys,
    score_keys_reference,
)

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed")
TOLERANCE = 2e-3  # rotated keys, queries and weights are rounded to fp16
QUICK = [Case("nuq4-1%", (130, 70), group=4, sinks=1), Case("nuq2-1%", (100,), first_seen=10)]
SLOW = [
    Case("nuq3-1%", (257,), position=2**20 + 5),
    Case("nuq4-1%-pc", (70,), group=8),
    Case("nuq3-5%", (80,), num_kv_heads=1, head_dim=64, group=2),
    Case("nuq8-1%/int8-1%", (70,), num_kv_heads=1, head_dim=64, group=2),
]


def built_for_cpu(case: Case) -> Built:
    built = build(case)
    return replace(built, variant=replace(built.variant, most_warps=2))


def weights_of(built: Built, case: Case) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    room = built.context.pages.page_table.shape[1] * 128
    heads = case.num_kv_heads * case.group
    return torch.rand(len(case.lengths), heads, room, generator=random) ** 8


@needs_compiler
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("case", mostly_slow(QUICK, [*QUICK, *SLOW]), ids=str)
def test_scores_equal_torch(case: Case, part: Part) -> None:
    built = built_for_cpu(case)
    product = Product(built.context, built.tables, built.variant, part, blocks=3)
    wanted = score_keys_reference(built.query, product)
    found = score_keys(built.query, product, run_on_cpu)
    assert wanted.abs().max() > 1
    assert (found - wanted).abs().max() < TOLERANCE * wanted.abs().max()


@needs_compiler
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("case", mostly_slow(QUICK, [*QUICK, *SLOW]), ids=str)
def test_mixed_values_equal_torch(case: Case, part: Part) -> None:
    built = built_for_cpu(case)
    product = Product(built.context, built.tables, built.variant, part, blocks=3)
    wanted = mix_values_reference(weights_of(built, case), product)
    found = mix_values(weights_of(built, case), product, run_on_cpu)
    assert wanted.abs().max() > 1
    assert (found - wanted).abs().max() < TOLERANCE * wanted.abs().max()


def test_codes_and_outliers_add_up_to_all() -> None:
    built = build(QUICK[0])
    codes, outliers, whole = (
        score_keys_reference(built.query, Product(built.context, built.tables, built.variant, part))
        for part in PARTS
    )
    assert outliers.abs().max() > 1
    assert torch.allclose(codes + outliers, whole, atol=1e-3)


def test_outliers_alone_need_pages_with_outliers() -> None:
    built = build(Case("nuq4", (70,)))
    with pytest.raises(InputError, match="this variant has none"):
        score_keys(built.query, Product(built.context, built.tables, built.variant, "outliers"))
