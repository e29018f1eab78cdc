"""Decoding from a CUDA graph: the tokens, and the cache, of decoding step by step."""

from __future__ import annotations

import gc
from contextlib import closing

import pytest
import torch
from fused_case import assert_same, text_ids

from kvqtool.attach import attached
from kvqtool.bundle import Bundle
from kvqtool.calibrate import calibrate
from kvqtool.data import calibration_windows, load_text
from kvqtool.decode import Decoder, DecodeReport
from kvqtool.forward import next_logits
from kvqtool.models import LoadedModel, load_model
from kvqtool.sampling import Sampling
from kvqtool.spec import parse_spec

pytestmark = pytest.mark.gpu
SPECS = ("nuq3-1%-sink1", "nuq4-1%-pc/nuq2-1%")


@pytest.fixture(scope="module")
def on_gpu() -> LoadedModel:
    """Return the built-in model on the GPU."""
    return load_model("builtin", device="cuda", dtype="float16")


@pytest.fixture(scope="module")
def bundles(builtin: LoadedModel) -> list[Bundle]:
    """Return a bundle for each of SPECS."""
    text = load_text(None, part="calibration")
    windows = calibration_windows(text, builtin.tokenizer, samples=2, seq_len=160, seed=0)
    return calibrate(builtin, windows, [parse_spec(spec) for spec in SPECS])


@torch.no_grad()
def run(
    loaded: LoadedModel, bundle: Bundle, mode: str, sampling: Sampling, take: int, batch: int = 1
) -> tuple[list[list[int]], dict[str, torch.Tensor], DecodeReport]:
    """Return the first `take` tokens, what the cache then holds, and the report."""
    with attached(loaded, bundle) as session:
        cache = session.new_cache(bundle)
        ids = text_ids(loaded, batch, 100).to(loaded.device)
        decoder, found = Decoder(loaded.model, cache, sampling, mode), []
        with closing(decoder.tokens(next_logits(loaded.model, ids, cache))) as tokens:
            for token in tokens:
                found.append(token)
                if len(found) == take:
                    break
        held = {f"{s.layer}.{n}": t for s in cache.stores for n, t in s.canonical().items()}
    return found, held, decoder.report


@pytest.mark.parametrize("number", range(len(SPECS)))
@pytest.mark.parametrize(("take", "batch"), [(300, 1), (40, 3), (77, 1)])
def test_tokens_and_codes_are_those_of_eager_decoding(
    on_gpu: LoadedModel, bundles: list[Bundle], number: int, take: int, batch: int
) -> None:
    sampling = Sampling(max_new_tokens=300 if batch == 1 else 40)
    expected = run(on_gpu, bundles[number], "eager", sampling, take, batch)
    found = run(on_gpu, bundles[number], "graph", sampling, take, batch)
    assert found[0] == expected[0]
    assert_same(found[1], expected[1])
    assert found[2].replayed > take // 2
    assert found[2].captured <= 4


def test_a_seed_draws_the_same_tokens(on_gpu: LoadedModel, bundles: list[Bundle]) -> None:
    sampling = Sampling(max_new_tokens=60, temperature=0.8, top_p=0.95, top_k=100, seed=5)
    expected, found = (run(on_gpu, bundles[0], mode, sampling, 60) for mode in ("eager", "graph"))
    assert found[0] == expected[0]


def test_memory_does_not_grow_within_a_page(on_gpu: LoadedModel, bundles: list[Bundle]) -> None:
    with attached(on_gpu, bundles[0]) as session, torch.no_grad():
        cache = session.new_cache(bundles[0])
        ids = text_ids(on_gpu, 1, 100).to(on_gpu.device)
        decoder = Decoder(on_gpu.model, cache, Sampling(max_new_tokens=200), "graph")
        held = []
        with closing(decoder.tokens(next_logits(on_gpu.model, ids, cache))) as tokens:
            for number, _ in enumerate(tokens):
                if number in (35, 120):  # one page: from token 129 to 256
                    held.append(torch.cuda.memory_allocated())
    assert held[0] == held[1]


def test_generations_leave_nothing_behind(on_gpu: LoadedModel, bundles: list[Bundle]) -> None:
    held = []
    for _ in range(4):
        run(on_gpu, bundles[0], "graph", Sampling(max_new_tokens=40), 40)
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[1:] == [held[1]] * 3
