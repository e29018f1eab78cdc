"""The kernels' own sources, compiled for the CPU, against float64 and the torch reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_case import CASES, Built, Case, build, log_tolerance
from shim.build import HAS_COMPILER, mostly_slow, run_on_cpu

from kvqtool.fused import attend, new_workspace

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed")
# Keys after rotation, queries and weights are rounded to fp16 (2**-11 each), sums are float32.
TOLERANCE = 2e-3


def attend_on_cpu(
    case: Case, blocks: int, built: Built | None = None, **fields: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shim's output and the right answer, both over the greatest value."""
    built = built or build(case)
    variant = replace(built.variant, most_warps=2, **fields)
    workspace = new_workspace(variant, built.query, case.num_kv_heads, blocks)
    out = attend(built.query, built.context, built.tables, variant, workspace, run_on_cpu)
    assert not workspace.counters.any()
    return out.double() / built.greatest_value, built.expected / built.greatest_value


def without_outliers(built: Built) -> Built:
    """Return the same case, its codes too, with every list of outliers empty."""
    index = built.context.pages.outlier_index.clone()
    index[..., 1::2] = 0
    pages = replace(built.context.pages, outlier_index=index)
    return replace(built, context=replace(built.context, pages=pages))


QUICK = (
    Case("nuq4-1%", (130,), sinks=1, window=65, group=4),
    Case("nuq2-1%", (100, 257)),
    Case("nuq3-1%", (130,), position=2**20 + 5),
    Case("nuq4-1%-pc", (70,)),
)


@pytest.mark.parametrize("case", mostly_slow(QUICK, CASES), ids=str)
def test_sources_equal_float64(case: Case) -> None:
    out, expected = attend_on_cpu(case, blocks=3)
    assert (out - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("blocks", mostly_slow([5, 40], [1, 2, 5, 40]))
def test_how_work_is_cut_does_not_matter(blocks: int) -> None:
    case = Case("nuq3-1%", (257, 64), sinks=1, window=3)
    out, expected = attend_on_cpu(case, blocks)
    assert (out - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("spec", ["nuq3-1%", "nuq4-1%/nuq2-1%"])
def test_values_are_picked_from_registers_as_well(spec: str) -> None:
    case = Case(spec, (70,), num_kv_heads=1)
    out, expected = attend_on_cpu(case, 1, value_table=False)
    assert (out - expected).abs().max() < TOLERANCE


def test_outliers_of_tokens_that_are_not_seen_add_nothing_to_what_a_warp_reads_next() -> None:
    # The only slab is not seen; exact tokens follow it in the same warp.
    built = build(Case("nuq3-1%", (70,), window=130, first_seen=70))
    out, expected = attend_on_cpu(Case("nuq3-1%"), 1, built)
    assert (out - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("spec", "chunk_steps", "most_chunks"),
    [("nuq4-1%", 2, 4), ("nuq3-1%", 2, 2), ("nuq2-1%", 4, 4), ("nuq4-1%-pc", 8, 2)],
)
def test_chunks_may_have_any_size(spec: str, chunk_steps: int, most_chunks: int) -> None:
    built = build(Case(spec, (70, 400), sinks=1))
    fields = {"chunk_steps": chunk_steps, "most_chunks": most_chunks}
    out, expected = attend_on_cpu(Case(spec, (70, 400)), 3, built, **fields)
    assert (out - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    ("spec", "ahead"), [("nuq4-1%", 1), ("nuq3-1%", 2), ("nuq2-1%", 4), ("nuq4-1%-pc", 4)]
)
def test_codes_are_read_ahead_as_well(spec: str, ahead: int, group: int) -> None:
    built = build(Case(spec, (70, 400), sinks=1, group=group))
    out, expected = attend_on_cpu(Case(spec, (70, 400)), 3, built, ahead=ahead)
    assert (out - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("blocks", [1, 5])
def test_the_log_of_the_sum_is_that_of_all_scores(blocks: int) -> None:
    built = build(QUICK[0])
    workspace = new_workspace(replace(built.variant, most_warps=2), built.query, 2, blocks)
    workspace = replace(workspace, log_sums=torch.full(built.log_sums.shape, torch.nan))
    variant = replace(built.variant, most_warps=2)
    attend(built.query, built.context, built.tables, variant, workspace, run_on_cpu)
    assert (workspace.log_sums.double() - built.log_sums).abs().max() < log_tolerance(built)


def test_outliers_matter_to_the_answer() -> None:
    case = Case("nuq2-10%", (128,), num_kv_heads=1)
    built = build(case)
    out, expected = attend_on_cpu(case, blocks=1)
    without, _ = attend_on_cpu(case, blocks=1, built=without_outliers(built))
    assert (out - expected).abs().max() < TOLERANCE
    assert (without - expected).abs().max() > 10 * TOLERANCE
