"""Steps that the host decides nothing in: the tokens and the contents of the cache itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fused_case import assert_same, text_ids
from shim.build import HAS_COMPILER, run_on_cpu
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from kvqtool.attach import Session, attached
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.decode import Decoder, ungraphed
from kvqtool.errors import RunError
from kvqtool.forward import next_logits
from kvqtool.models import LoadedModel, load_model
from kvqtool.page_writer import PageWriter
from kvqtool.paged import PagedStore
from kvqtool.reader import PageReader
from kvqtool.sampling import Sampling
from kvqtool.steady import SteadyCache, unsteady

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed")
SPEC = "nuq3-1%-sink1"


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoadedModel]:
    """Return the built-in model in float16, its open pages written by the append kernel."""
    monkeypatch.setattr("kvqtool.cache.PageWriter", lambda *given: PageWriter(*given, run_on_cpu))
    loaded = load_model("builtin", device="cpu", dtype="float16")
    loaded.read_path = "fused"
    yield loaded


@torch.no_grad()
def steadily(session: Session, cache: KvqCache, token: Tensor, count: int) -> list[Tensor]:
    """Feed `token`, then the likeliest, as decoding from a graph does; return the logits."""
    steady, logits, done, left = SteadyCache(cache), [], 0, 0
    positions = torch.full((len(token), 1), cache.get_seq_length())
    for _ in range(count):
        if not left:
            steady.settle(done)
            left, done = steady.begin(), 0
            assert left
        logits.append(next_logits(session.model, token, steady, positions))
        steady.advance()
        token, positions = logits[-1].argmax(-1)[:, None], positions + 1
        left, done = left - 1, done + 1
    steady.settle(done)
    return logits


@torch.no_grad()
def by_cache(session: Session, cache: KvqCache, token: Tensor, count: int) -> list[Tensor]:
    """Do the same through the cache itself."""
    logits = []
    for _ in range(count):
        logits.append(next_logits(session.model, token, cache))
        token = logits[-1].argmax(-1)[:, None]
    return logits


def contents(cache: KvqCache) -> dict[str, Tensor]:
    return {f"{s.layer}.{n}": t for s in cache.stores for n, t in s.canonical().items()}


@pytest.mark.parametrize(("prompt", "batch"), [(126, 1), (5, 2), (129, 1)])
def test_steady_steps_are_those_of_the_cache(
    half: LoadedModel, calibrated: Callable[[str], Bundle], prompt: int, batch: int
) -> None:
    """4 steps; from 126 tokens they fill a page, from 129 the open page starts empty."""
    ids = text_ids(half, batch, prompt)
    runs = []
    with attached(half) as session:
        for run in (steadily, by_cache):
            cache = session.new_cache(calibrated(SPEC))
            first = next_logits(half.model, ids, cache).argmax(-1)[:, None]
            logits = run(session, cache, first, 4)
            more = by_cache(session, cache, logits[-1].argmax(-1)[:, None], 2)
            assert cache.get_seq_length() == prompt + 6
            assert [a.tokens for a in cache.angles.values()] == [prompt + 6] * len(cache.angles)
            runs.append((torch.stack(logits + more), contents(cache)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert_same(runs[0][1], runs[1][1])


def test_a_step_reads_and_writes_the_same_memory_until_a_page_is_full(
    half: LoadedModel, calibrated: Callable[[str], Bundle]
) -> None:
    with attached(half) as session, torch.no_grad():
        cache = session.new_cache(calibrated(SPEC))
        next_logits(half.model, text_ids(half, 1, 120), cache)
        steady = SteadyCache(cache)
        assert steady.begin() == 128 - 119  # one sink
        before, token = steady.addresses, torch.zeros(1, 1, dtype=torch.int64)
        for step in range(3):
            next_logits(half.model, token, steady, torch.tensor([[120 + step]]))
            steady.advance()
            assert steady.addresses == before
        steady.settle(3)
        assert steady.begin() == 128 - 122
        assert steady.addresses == before


def test_a_full_page_leaves_no_layers_old_pages_behind(
    half: LoadedModel, calibrated: Callable[[str], Bundle]
) -> None:
    with attached(half) as session, torch.no_grad():
        cache = session.new_cache(calibrated(SPEC))
        next_logits(half.model, text_ids(half, 1, 254), cache)
        steady, token = SteadyCache(cache), torch.zeros(1, 1, dtype=torch.int64)
        assert steady.begin() == 256 - 253
        for step in range(3):
            next_logits(half.model, token, steady, torch.tensor([[254 + step]]))
            steady.advance()
        old = [slabs_of(layer.store) for layer in steady.steady]
        steady.settle(3)
        assert not set(old) & {slabs_of(layer.store) for layer in steady.steady}
        assert all(slabs.expired() for slabs in old)


def slabs_of(store: PagedStore) -> StorageWeakRef:
    (slabs,) = store.tensors["key.pages.slabs"]
    return StorageWeakRef(slabs.untyped_storage())


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]  # torch's own signature
        name = function.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"), name
        return function(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing(
    half: LoadedModel, calibrated: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under capture transformers makes a mask that it leaves out otherwise."""
    with attached(half) as session, torch.no_grad():
        cache = session.new_cache(calibrated(SPEC))
        next_logits(half.model, text_ids(half, 1, 20), cache)
        steady = SteadyCache(cache)
        steady.begin()
        token, positions = torch.tensor([[0]]), torch.tensor([[20]])
        monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
        monkeypatch.setattr(PageReader, "attend", lambda _, query, *__: query.transpose(1, 2))
        with NoWaiting():
            next_logits(half.model, token, steady, positions)
            steady.advance()


@pytest.mark.parametrize(
    ("spec", "read_path", "reason"),
    [
        ("nuq3-1%-sink1-r8", "fused", "recent window"),
        ("nuq3-1%-sink1", "materialise", "layer 0 is read through torch: asked for"),
        ("nuq3-1%-cap4", "fused", "the append kernel does not know"),
    ],
)
def test_caches_whose_steps_need_the_host_say_why(
    half: LoadedModel, calibrated: Callable[[str], Bundle], spec: str, read_path: str, reason: str
) -> None:
    half.read_path = read_path
    bundle = calibrated(spec)
    with attached(half, bundle) as session, torch.no_grad():
        cache = session.new_cache(bundle)
        next_logits(half.model, text_ids(half, 1, 20), cache)
    assert reason in (unsteady(cache) or "")


def test_a_cpu_holds_no_graph(half: LoadedModel, calibrated: Callable[[str], Bundle]) -> None:
    with attached(half) as session:
        assert ungraphed(half.model, session.new_cache(calibrated(SPEC))) == (
            "the model is not on one CUDA device"
        )


@pytest.mark.parametrize("mode", ["graph", "auto"])
def test_a_graph_that_was_asked_for_and_cannot_be_captured_is_an_error(
    half: LoadedModel,
    calibrated: Callable[[str], Bundle],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    def fails(self: Decoder, *_: Tensor) -> Iterator[list[int]]:
        self.report.reason = "capturing a step failed: no"
        yield [1]

    monkeypatch.setattr("kvqtool.decode.ungraphed", lambda *_: None)
    monkeypatch.setattr(Decoder, "_by_graph", fails)
    with attached(half) as session:
        cache = session.new_cache(calibrated(SPEC))
        tokens = Decoder(half.model, cache, Sampling(), mode).tokens(torch.zeros(1, 5))
        if mode == "auto":
            assert list(tokens) == [[1]]
        else:
            with pytest.raises(RunError, match="capturing a step failed: no; use --decode auto"):
                next(tokens)
