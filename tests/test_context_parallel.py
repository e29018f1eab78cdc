"""A sequence shared by processes gives the tokens and logits of one that has it all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import context_worker
import pytest
import torch
from context_worker import BATCH, NEW_TOKENS, PROMPT, decoded
from fused_case import text_ids
from test_ranks import environment, free_port

from kvqtool.attach import attach
from kvqtool.bundle import Bundle, save_bundle
from kvqtool.context_parallel import ContextParallelCache
from kvqtool.errors import InputError, RunError
from kvqtool.forward import next_logits
from kvqtool.models import LoadedModel
from kvqtool.ranks import ALONE, Ranks
from kvqtool.shared_layer import merge
from kvqtool.spec import parse_spec

PROCESSES = 2
SPEC = "nuq3-1%-sink1"
# Sums of float32 in another order, through four layers; logits are up to 20.
LOGIT_ERROR = 1e-4
Maker = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, builtin: LoadedModel, calibrated: Maker
) -> list[dict[str, Any]]:
    """What one process finds, then what each of two finds."""
    folder, port = tmp_path_factory.mktemp("context"), free_port()
    save_bundle(calibrated(SPEC), folder / "bundle.safetensors")
    command = [sys.executable, context_worker.__file__, str(folder)]
    running = [
        subprocess.Popen(command, env=environment(rank, PROCESSES, port), stderr=-1, text=True)
        for rank in range(PROCESSES)
    ]
    alone = decoded(builtin, calibrated(SPEC), None)
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return [alone, *(torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES))]


def test_logits_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    alone, *shared = found
    for one in shared:
        assert torch.equal(one["tokens"], alone["tokens"])
        assert (one["logits"] - alone["logits"]).abs().max() < LOGIT_ERROR


def test_prompts_may_come_in_several_calls(found: list[dict[str, Any]]) -> None:
    alone, *shared = (one["in_calls"] for one in found)
    for logits in shared:
        assert (logits - alone).abs().max() < LOGIT_ERROR


def test_all_processes_have_the_same_bits(found: list[dict[str, Any]]) -> None:
    assert torch.equal(found[1]["logits"], found[2]["logits"])


def test_shares_are_whole_pages_and_new_tokens_go_to_the_last(
    found: list[dict[str, Any]],
) -> None:
    assert set(found[1]["packed"]) == {128}
    stored = PROMPT + NEW_TOKENS - 1  # the last one is not fed
    assert set(found[2]["packed"]) == {stored - 1 - 128}
    assert [one["length"] for one in found] == [stored] * 3


def test_shares_hold_the_codes_of_one_process(found: list[dict[str, Any]]) -> None:
    alone, first, last = (one["codes"] for one in found)
    for name, codes in alone.items():
        joined = torch.cat([first[name], last[name]])
        # Tokens of the prompt: later states differ in their last bits, and so may codes.
        assert torch.equal(joined[: (PROMPT - 1) * BATCH], codes[: (PROMPT - 1) * BATCH]), name


def test_merging_shares_is_attention_over_all() -> None:
    random = torch.Generator().manual_seed(0)
    score = torch.randn(3, 90, generator=random, dtype=torch.float64) * 8
    value = torch.randn(90, 16, generator=random, dtype=torch.float64)
    parts = [slice(0, 1), slice(1, 70), slice(70, 90)]  # and a share that is still empty
    outs = torch.stack([score[:, p].softmax(-1) @ value[p] for p in parts])
    log_sums = torch.stack([score[:, p].logsumexp(-1) for p in parts])
    outs = torch.cat([outs, torch.zeros_like(outs[:1])])
    log_sums = torch.cat([log_sums, torch.full_like(log_sums[:1], -torch.inf)])
    merged = merge(outs.float(), log_sums.float())
    assert (merged.double() - score.softmax(-1) @ value).abs().max() < 1e-6


@pytest.fixture
def session(builtin: LoadedModel) -> Any:
    with (
        torch.no_grad(),
        attach(builtin.model, seam=builtin.seam, read_path="fused") as opened,
    ):
        yield opened


def test_one_process_alone_changes_nothing(
    builtin: LoadedModel, session: Any, calibrated: Maker
) -> None:
    ids, logits = text_ids(builtin, 1, 140), []
    for wrap in (lambda cache: cache, lambda cache: ContextParallelCache(cache, ALONE)):
        cache = wrap(session.new_cache(calibrated(SPEC)))
        token = next_logits(builtin.model, ids, cache).argmax(-1)[:, None]
        logits.append(next_logits(builtin.model, token, cache))
    assert (logits[0] - logits[1]).abs().max() < LOGIT_ERROR


class TestRefusals:
    def test_a_prompt_without_a_page_for_each(
        self, builtin: LoadedModel, session: Any, calibrated: Maker
    ) -> None:
        cache = ContextParallelCache(session.new_cache(calibrated(SPEC)), Ranks(1, 3))
        with pytest.raises(InputError, match=r"300 tokens has 2 whole pages of 128.*3 processes"):
            next_logits(builtin.model, text_ids(builtin, 1, 300), cache)

    def test_a_call_that_ends_within_two_shares(
        self, builtin: LoadedModel, session: Any, calibrated: Maker
    ) -> None:
        cache = ContextParallelCache(session.new_cache(calibrated(SPEC)), Ranks(0, 2))
        ids = text_ids(builtin, 1, 300)
        next_logits(builtin.model, next(cache.calls(ids, 100)), cache)
        with pytest.raises(RunError, match="a call of 50 tokens after 100 ends within two shares"):
            next_logits(builtin.model, ids[:, 100:150], cache)

    def test_a_recent_window_and_another_prefill(self, session: Any, calibrated: Maker) -> None:
        bundle = calibrated(SPEC)
        with pytest.raises(InputError, match="prefill decode-exact is not shared"):
            ContextParallelCache(session.new_cache(bundle, prefill="decode-exact"), Ranks(0, 2))
        cache = session.new_cache(bundle)
        cache.bundle = replace(bundle, spec=parse_spec("nuq3-r8"))
        with pytest.raises(InputError, match="keeps a recent window; share a cache without -r"):
            ContextParallelCache(cache, Ranks(0, 2))

    def test_a_cache_that_holds_tokens(
        self, builtin: LoadedModel, session: Any, calibrated: Maker
    ) -> None:
        cache = session.new_cache(calibrated(SPEC))
        next_logits(builtin.model, text_ids(builtin, 1, 3), cache)
        with pytest.raises(InputError, match="share an empty one"):
            ContextParallelCache(cache, Ranks(0, 2))

    def test_a_layer_read_through_torch(self, session: Any, calibrated: Maker) -> None:
        session.read_path = "auto"
        with pytest.raises(InputError, match=r'layer 0 .*no CUDA device.*read_path="fused"'):
            ContextParallelCache(session.new_cache(calibrated(SPEC)), Ranks(0, 2))

    def test_going_back(self, session: Any, calibrated: Maker) -> None:
        cache = ContextParallelCache(session.new_cache(calibrated(SPEC)), Ranks(0, 2))
        with pytest.raises(RunError, match="only grows"):
            cache.crop(-1)
