"""Products with keys or values alone on the GPU, against torch on the CPU."""

from __future__ import annotations

import pytest
import torch
from attention_case import Case, build, on_device

from kvqtool.matvec import (
    PARTS,
    Part,
    mix_values,
    mix_values_reference,
    score_keys,
    score_keys_reference,
)

pytestmark = pytest.mark.gpu
CASE = Case("nuq4-1%", (3000, 70), num_kv_heads=4, group=4)
TOLERANCE = 2e-3  # rotated keys, queries and weights are rounded to fp16


@pytest.mark.parametrize("part", PARTS)
def test_products_equal_torch(part: Part) -> None:
    built = build(CASE)
    moved = on_device(built, "cuda")
    scores = score_keys(moved.query, moved.context, moved.tables, moved.variant, part, 132).cpu()
    wanted = score_keys_reference(built.query, built.context, built.tables, built.variant, part)
    assert (scores - wanted).abs().max() < TOLERANCE * wanted.abs().max()
    weights = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(3)) ** 8
    sums = mix_values(weights.cuda(), moved.context, moved.tables, moved.variant, part, 132).cpu()
    wanted = mix_values_reference(weights, built.context, built.tables, built.variant, part)
    assert (sums - wanted).abs().max() < TOLERANCE * wanted.abs().max()
