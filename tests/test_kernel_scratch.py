"""What the kernels' read path takes for a moment: within what is planned, and what a GPU took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shim.build import HAS_COMPILER, run_on_cpu
from stores_case import DIM, GEOMETRY, HEADS, Both

from kvqtool.errors import InputError
from kvqtool.kernel_scratch import pack_scratch, room_bytes
from kvqtool.layers import Angles, CacheLayer, CacheModel
from kvqtool.live import watch
from kvqtool.load import Load, Workload
from kvqtool.plan import make_load, plan
from kvqtool.scheme import plain_scheme
from kvqtool.scratch import Step
from kvqtool.shape import read_shape
from kvqtool.spec import parse_spec

LAYER = CacheLayer("full", GEOMETRY, angles=Angles("all", DIM))
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
RECORD = json.loads((RESULTS / "generate-h200.json").read_text())
READ = [row for row in RECORD["rows"] if row["way"] == "graph"]


@pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed")
@pytest.mark.parametrize("spec", ["nuq3-1%", "nuq4"])
def test_packing_stays_within_the_plan(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvqtool.scratch.ELEMENTS_AT_ONCE", 512 * HEADS * DIM)
    both = Both(spec, run=run_on_cpu)
    both.append(128)  # what is allocated once
    states = [torch.randn(1, HEADS, 1024, DIM).half() for _ in range(2)]
    before = held(both)
    with watch(states[0].device) as live:
        both.opened.append(*states, both.angles)
    cache = CacheModel((LAYER,), parse_spec(spec), 1, "float16")
    step = Step(cache, 1152, 1024, True, 4)
    found, bound = live.peak_bytes - (held(both) - before), pack_scratch(LAYER, step)
    assert bound / 2 < found <= bound
    assert held(both) <= cache.nbytes(1152) + room_bytes(LAYER, step) + TABLES


TABLES = 64 << 10  # of codes and angles


def held(both: Both) -> int:
    return sum(t.nbytes for group in both.opened.tensors.values() for t in group)


def fused(model: str, spec: str, context: int, **options: Any) -> Load:
    work = Workload(context, read_path="fused", **options)
    return make_load(read_shape(model), plain_scheme(parse_spec(spec)), work)


@pytest.mark.parametrize("row", READ, ids=lambda row: str(row["context_tokens"]))
def test_a_prompts_peak_is_what_an_h200_took(row: dict[str, Any]) -> None:
    """Random weights of the 8B shape, read whole; margins left out on both sides."""
    context = row["context_tokens"]
    load = fused("llama-3.1-8b", RECORD["spec"], context, dtype=RECORD["dtype"])
    prefill, _ = load.peaks(0, context, row["batch"])
    beside = load.extras(0, 0)
    planned = prefill.nbytes + beside["codebooks"] + beside["workspace"]
    assert planned == pytest.approx(row["prompt_peak_bytes"], rel=0.01)


def test_reading_by_kernels_takes_less_than_through_torch() -> None:
    torch_path = plan(
        read_shape("llama-7b"), parse_spec("nuq2"), Workload(2**20, prefill_chunk=512)
    )
    load = fused("llama-7b", "nuq2", 2**20, prefill_chunk=512)
    assert load.total(0, 2**20, 1) < torch_path.total_bytes / 1.8


@pytest.mark.parametrize(
    ("model", "spec", "says"),
    [
        ("llama-7b", "fp", "not planned for keys stored as fp"),
        ("llama-7b", "nuq8-pc/nuq4", "a codebook per channel of 8-bit keys"),
        ("llama-7b", "nuq3-r128", "a recent window"),
        ("gemma-3-27b", "nuq3", "sliding layers"),
        ("deepseek-v3", "nuq3", "latent layers"),
    ],
)
def test_what_is_not_planned_is_refused(model: str, spec: str, says: str) -> None:
    work = Workload(4096, read_path="fused")
    with pytest.raises(InputError, match=says):
        plan(read_shape(model), parse_spec(spec), work)
