"""A sequence's tokens over several GPUs: the planner's share is the cache's, and its bytes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from kvqtool.errors import InputError
from kvqtool.load import Workload
from kvqtool.plan import MemoryPlan, plan
from kvqtool.shape import read_shape
from kvqtool.sharding import first_pages
from kvqtool.spec import parse_spec


def planned(model: str, spec: str, context: int, processes: int, new_tokens: int = 0) -> MemoryPlan:
    work = Workload(context, prefill_chunk=512, context_parallel=processes, new_tokens=new_tokens)
    return plan(read_shape(model), parse_spec(spec), work)


def test_shares_are_contiguous_and_within_a_page_of_each_other() -> None:
    firsts = [*first_pages(10_000_000, 1, 8), (10_000_000 - 1) // 128]
    sizes = {after - before for before, after in pairwise(firsts)}
    assert firsts[0] == 0
    assert sizes == {9765, 9766}


def test_the_last_gpu_holds_what_its_share_takes_alone() -> None:
    """78,125 whole pages: the last share begins at page 68,359."""
    shared = planned("llama-7b", "nuq2", 10_000_000, 8, new_tokens=100)
    alone = planned("llama-7b", "nuq2", 10_000_000 - 68_359 * 128, 1, new_tokens=100)
    same = ("context", "context_parallel", "ranks", "assumptions")
    assert replace(shared, **{name: getattr(alone, name) for name in same}) == alone
    assert shared.ranks[0]["gpus"] == 8
    assert any("each of 8 GPUs keeps its share" in line for line in shared.assumptions)


def test_every_gpu_keeps_the_whole_model() -> None:
    one, eight = (planned("llama-3.1-8b", "nuq3-1%-sink1", 131072, n) for n in (1, 8))
    assert eight.weights_bytes == one.weights_bytes
    assert eight.cache_bytes == pytest.approx(one.cache_bytes / 8, rel=0.01)


@pytest.mark.parametrize(
    ("model", "context", "says"),
    [
        ("llama-7b", 1000, "1000 tokens has 7 whole pages of 128, too few for 8 processes"),
        ("deepseek-v3", 100_000, "shares packed layers, and deepseek-v3 has others that grow"),
        ("gemma-3-27b", 6000, "fewer tokens of 6000 than the sliding layers of gemma-3-27b keep"),
    ],
)
def test_what_cannot_be_shared_is_refused(model: str, context: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        planned(model, "nuq4", context, 8)
