"""The cache as transformers uses it: generate, crop, reorder, and what it says it holds."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvqtool.attach import Session, attach
from kvqtool.bundle import Bundle, uncalibrated_bundle
from kvqtool.cache import KvqCache
from kvqtool.layers import CacheModel
from kvqtool.memory import Outliers, split_tokens
from kvqtool.models import LoadedModel
from kvqtool.probe import probe
from kvqtool.spec import parse_spec
from kvqtool.usage import layer_report, measure

SPEC = "nuq3-1%-sink1"
SPECS = (
    "fp",
    SPEC,
    "int4-g32-sink2-r5",
    "nuq2-5%-cap3-r3",
    "nf4-pertoken-postrope",
    "kivi2-g8-sink1-r3",
    "had4-g16/tq3-g8",
)
OPTIONS: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": None, "pad_token_id": 0}
Opened = Callable[..., tuple[Session, KvqCache]]


@pytest.fixture
def opened(builtin: LoadedModel, calibrated: Callable[[str], Bundle]) -> Iterator[Opened]:
    """Return a maker of a session and a cache of a spec; sessions close after the test."""
    from contextlib import ExitStack

    seam = probe(builtin.model)
    with ExitStack() as stack:

        def open_cache(spec: str, **options: Any) -> tuple[Session, KvqCache]:
            bundle = calibrated(spec)
            session = stack.enter_context(attach(builtin.model, bundle, seam=seam))
            return session, session.new_cache(bundle, **options)

        yield open_cache


def ids_of(batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + tokens)
    return torch.randint(2, 8192, (batch, tokens), generator=generator)


@torch.no_grad()
def step(session: Session, cache: Any, ids: Tensor) -> Tensor:
    logits: Tensor = session.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits


def loop(
    session: Session, cache: KvqCache, ids: Tensor, choose: Callable[[Tensor], Tensor]
) -> Tensor:
    """Generate the plain way."""
    logits = step(session, cache, ids)[:, -1]
    for _ in range(OPTIONS["max_new_tokens"]):
        token = choose(logits)
        ids = torch.cat([ids, token], 1)
        logits = step(session, cache, token)[:, -1]
    return ids


@pytest.mark.parametrize(("spec", "batch"), list(zip(SPECS, (1, 2, 2, 1, 2, 2, 1), strict=True)))
class TestGenerate:
    def test_greedy_tokens_are_those_of_a_plain_loop(
        self, opened: Opened, spec: str, batch: int
    ) -> None:
        ids = ids_of(batch, 20)
        session, cache = opened(spec)
        expected = loop(session, cache, ids, lambda logits: logits.argmax(-1, keepdim=True))
        _, cache = opened(spec)
        found = session.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            **OPTIONS,
        )
        assert found.tolist() == expected.tolist()

    def test_sampled_tokens_are_those_of_a_plain_loop(
        self, opened: Opened, spec: str, batch: int
    ) -> None:
        ids = ids_of(batch, 20)
        session, cache = opened(spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            expected = loop(session, cache, ids, lambda x: torch.multinomial(x.softmax(-1), 1))
            torch.manual_seed(7)
            found = session.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=opened(spec)[1],
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                **OPTIONS,
            )
        assert found.tolist() == expected.tolist()


def test_beams_are_those_of_the_stock_cache(opened: Opened) -> None:
    ids = ids_of(2, 10)
    session, cache = opened("fp")
    options = {
        **OPTIONS,
        "num_beams": 3,
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
    }
    expected = session.model.generate(ids, **options)
    assert (
        session.model.generate(ids, past_key_values=cache, **options).tolist() == expected.tolist()
    )


@pytest.mark.parametrize("spec", SPECS)
class TestRearranging:
    def test_cropped_tokens_were_never_there(self, opened: Opened, spec: str) -> None:
        ids = ids_of(2, 20)
        spec = spec.replace("-r5", "").replace("-r3", "")  # what has left a window stays packed
        session, cache = opened(spec, prefill="decode-exact")
        other = opened(spec, prefill="decode-exact")[1]
        step(session, cache, ids[:, :10])
        step(session, cache, ids_of(2, 6))
        cache.crop(-6)
        step(session, other, ids[:, :10])
        assert cache.get_seq_length() == 10
        found, expected = (step(session, each, ids[:, 10:]) for each in (cache, other))
        assert (found - expected).abs().max() < 1e-4

    @pytest.mark.parametrize("order", ([1, 0], [1, 1]))
    def test_reordered_sequences_go_on_as_themselves(
        self, opened: Opened, spec: str, order: list[int]
    ) -> None:
        ids = ids_of(2, 20)
        session, cache = opened(spec)
        other = opened(spec)[1]
        for each in (cache, other):
            step(session, each, ids[:, :15])
        cache.reorder_cache(torch.tensor(order))
        found, expected = step(session, cache, ids[order, 15:]), step(session, other, ids[:, 15:])
        assert (found - expected[order]).abs().max() < 1e-4

    def test_repeated_sequences_go_on_as_themselves(self, opened: Opened, spec: str) -> None:
        ids = ids_of(2, 20)
        session, cache = opened(spec)
        other = opened(spec)[1]
        for each in (cache, other):
            step(session, each, ids[:, :15])
        cache.batch_repeat_interleave(2)
        found = step(session, cache, ids[:, 15:].repeat_interleave(2, 0))
        expected = step(session, other, ids[:, 15:]).repeat_interleave(2, 0)
        assert (found - expected).abs().max() < 1e-4

    def test_a_reset_cache_starts_again(self, opened: Opened, spec: str) -> None:
        session, cache = opened(spec)
        expected = step(session, cache, ids_of(1, 9))
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(step(session, cache, ids_of(1, 9)), expected)


@pytest.mark.parametrize("spec", SPECS)
class TestUsage:
    @pytest.fixture
    def filled(self, opened: Opened, spec: str) -> KvqCache:
        session, cache = opened(spec)
        step(session, cache, ids_of(2, 130))
        step(session, cache, ids_of(2, 1))
        return cache

    def tensors(self, cache: KvqCache) -> list[Tensor]:
        held = [t for store in cache.stores for ts in store.tensors.values() for t in ts]
        return held + [t for angles in cache.angles.values() for t in angles.tensors]

    def test_bytes_are_those_of_the_real_storages(self, filled: KvqCache) -> None:
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in self.tensors(filled)
            if t.numel()
        }
        assert filled.nbytes == measure(filled).cache_bytes == sum(held.values())

    def test_bytes_are_those_the_planner_says(self, filled: KvqCache) -> None:
        """methods.md 7.14: the planner equals the allocated cache, given its outliers."""
        outliers = [Outliers(*(body.outliers for body in store.bodies)) for store in filled.stores]
        layers = tuple(filled.seam.cache_layers.values())
        cached = CacheModel(layers, filled.bundle.spec, 2, "float32")
        assert filled.nbytes == cached.bytes_given(131, outliers)

    def test_figures_follow_from_bytes_and_shapes(self, filled: KvqCache) -> None:
        usage, spec = measure(filled), filled.bundle.spec
        elements = 2 * 131 * 4 * (2 * 64 + 2 * 64)
        assert (usage.tokens, usage.batch) == (131, 2)
        assert usage.cache_bytes_fp16 == 2 * elements
        assert usage.effective_bits == pytest.approx(8 * filled.nbytes / elements)
        exact = 131 - split_tokens(spec, 131)[1]
        share = 0.0 if spec.key.method == "fp" else (131 - exact) / 131
        assert usage.quantized_share == pytest.approx(share)

    def test_the_report_names_every_layer(self, filled: KvqCache) -> None:
        rows = layer_report(filled)
        assert [row["layer"] for row in rows] == [0, 1, 2, 3]
        assert {row["rope"] for row in rows} == {"half 64 of 64"}
        storage = "post-RoPE" if "postrope" in str(filled.bundle.spec) else "pre-RoPE"
        assert {row["key_storage"] for row in rows} == {storage}


def test_the_first_call_of_an_exact_prefill_sees_exact_states(opened: Opened) -> None:
    session, cache = opened(SPEC)
    stock = step(session, DynamicCache(config=session.model.config), ids_of(1, 40))
    assert torch.allclose(step(session, cache, ids_of(1, 40)), stock, atol=1e-5)


def test_the_first_call_of_a_decode_exact_prefill_does_not(opened: Opened) -> None:
    session, cache = opened(SPEC, prefill="decode-exact")
    stock = step(session, DynamicCache(config=session.model.config), ids_of(1, 40))
    found = step(session, cache, ids_of(1, 40))
    assert torch.allclose(found[:, 0], stock[:, 0], atol=1e-5)  # the sink is exact
    assert (found[:, 1:] - stock[:, 1:]).abs().max() > 1e-2


def test_outputs_converge_as_bits_grow(opened: Opened) -> None:
    """methods.md 7.12."""
    ids, errors = ids_of(1, 60), []
    for spec in ("nuq2-1%", "nuq3-1%", "nuq4-1%", "int8-1%"):
        session, cache = opened(spec, prefill="decode-exact")
        stock = step(session, DynamicCache(config=session.model.config), ids)
        errors.append(float((step(session, cache, ids) - stock).norm() / stock.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("gqa", (True, False))
def test_random_models_of_every_head_shape_converge_too(
    tiny_llama: Callable[..., Any], gqa: bool, head_dim: int
) -> None:
    """methods.md 7.12."""
    model = tiny_llama(gqa=gqa, head_dim=head_dim)
    model.model.embed_tokens.weight.data *= 20  # or attention is too even to matter
    ids, errors = ids_of(2, 40) % 256, []
    with torch.no_grad():
        stock = model(ids).logits
    for bits in (2, 3, 4, 8):
        bundle = uncalibrated_bundle(parse_spec(f"int{bits}-1%-pertoken"), {}, [0, 1])
        with attach(model, bundle) as session:
            found = step(session, session.new_cache(bundle, prefill="decode-exact"), ids)
        errors.append(float((found - stock).norm() / stock.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02
