"""QAQ in a model: bits by a brute-force loop in float64, and the same cache however tokens come."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from kvqtool.adaptive_store import AdaptiveStore
from kvqtool.attach import Session, attach
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.calibrate import calibrate
from kvqtool.codebook import Codebook
from kvqtool.data import Text, Windows
from kvqtool.errors import RunError
from kvqtool.layers import CacheModel
from kvqtool.methods import fit_widths
from kvqtool.models import LoadedModel
from kvqtool.packed import found_in
from kvqtool.probe import probe
from kvqtool.seam import Seam
from kvqtool.side import WIDTHS
from kvqtool.spec import parse_spec
from kvqtool.usage import layer_report

TOKENS, WINDOW = 40, 3
SPECS = (
    "qaq-k0.02-v0.2-w3-1%",
    "qaq-k0.02-v0.2-w3-head-5%-sink2",
    "qaq-k1-v0.5-w3-released",
    "qaq-k0.02-v0.2-w1",
    "qaq-k0.02-v0.2-w100",
)
Model = tuple[torch.nn.Module, Seam, Tensor]


@pytest.fixture(scope="module")
def tiny(tiny_llama: Callable[..., torch.nn.Module]) -> Model:
    """Return a 2-layer model with grouped heads in float64, its seam and two sequences."""
    model = tiny_llama().double()
    for layer in model.model.layers:  # type: ignore[union-attr, operator]
        layer.self_attn.q_proj.weight.data *= 12  # weights of attention that differ
    ids = torch.randint(256, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    return model, probe(model), ids  # type: ignore[arg-type]


def bundle_of(spec: str, seam: Seam) -> Bundle:
    parsed = parse_spec(spec)
    norms = torch.tensor([3.0, 5.0])
    books = {}
    for layer in seam.packed:
        books[layer.index, "key"] = Codebook(*fit_widths(parsed.key, None), query_norm=norms)
        books[layer.index, "value"] = Codebook(*fit_widths(parsed.value, None))
    return Bundle(parsed, {}, books, {})


def run(session: Session, bundle: Bundle, ids: Tensor, steps: list[int], prefill: str) -> KvqCache:
    cache = session.new_cache(bundle, prefill=prefill)
    with torch.no_grad():
        for part in ids.split(steps, dim=1):
            session.model(part, past_key_values=cache)
    return cache


def filled(tiny: Model, spec: str, steps: list[int], prefill: str = "decode-exact") -> KvqCache:
    model, seam, ids = tiny
    bundle = bundle_of(spec, seam)
    with attach(model, bundle, seam=seam) as session:  # type: ignore[arg-type]
        return run(session, bundle, ids[:, : sum(steps)], steps, prefill)


def assert_same(found: KvqCache, expected: KvqCache) -> None:
    for mine, theirs in zip(found.stores, expected.stores, strict=True):
        named, wanted = mine.canonical(), theirs.canonical()
        assert named.keys() == wanted.keys()
        for name, tensor in wanted.items():
            if name == "window.attention":
                assert torch.allclose(named[name], tensor, atol=1e-6)
            elif tensor.is_floating_point():
                assert torch.allclose(named[name], tensor, rtol=1e-3, atol=1e-6), name
            else:
                assert torch.equal(named[name], tensor), name


@pytest.mark.parametrize("spec", SPECS)
class TestDecoding:
    def test_a_call_of_many_tokens_stores_what_one_by_one_does(
        self, tiny: Model, spec: str
    ) -> None:
        slow = filled(tiny, spec, [1] * TOKENS)
        assert_same(filled(tiny, spec, [TOKENS]), slow)
        assert_same(filled(tiny, spec, [7, 1, 2, 20, 10]), slow)

    @pytest.mark.parametrize("prefill", ("exact", "decode-exact"))
    def test_allocated_bytes_are_the_planned_ones(
        self, tiny: Model, spec: str, prefill: str
    ) -> None:
        cache = filled(tiny, spec, [30, 1, 9], prefill)
        layers = tuple(layer.cache_layer for layer in tiny[1].packed)
        planned = CacheModel(layers, parse_spec(spec), 2, "float64")
        found = [found_in(store.bodies) for store in cache.stores]
        assert cache.nbytes == planned.bytes_given(TOKENS, found)
        assert cache.nbytes == sum(
            t.untyped_storage().nbytes()
            for store in cache.stores
            for group in store.tensors.values()
            for t in group
        )


def brute(
    layers: list[tuple[Tensor, Tensor, Tensor]], spec: str, norms: list[float]
) -> Iterator[tuple[int, int]]:
    """Yield each packed token's key and value bits of one sequence, in layers that share them, head
    by head where these have their own, by a loop over the paper's formulas.

    Args:
        layers: of each layer, keys and values (heads, tokens, dim) as the model made them, and the
            weights (num_heads, tokens, tokens) of decoding.
    """
    parsed = parse_spec(spec)
    assert parsed.adaptive is not None
    n, (heads, tokens, _) = parsed.residual_length, layers[0][0].shape
    together = parsed.adaptive.level != "head"
    groups = [range(heads)] if together else [[h] for h in range(heads)]
    share = layers[0][2].shape[0] // heads
    for token in range(parsed.sink_tokens, tokens - n):
        count = token + n
        for group in groups:
            query_heads = [h * share + g for h in group for g in range(share)]
            seen = max(float(w[query_heads][:, token:count, token].max()) for *_, w in layers)
            ranges = []
            for side, quant in enumerate((parsed.key, parsed.value)):
                widest = 0.0
                for layer in layers:
                    numbers = sorted(layer[side][list(group), token].flatten().tolist())
                    tail = math.ceil(quant.outlier_fraction / 2 * len(numbers) - 1e-9)
                    rest = numbers[tail : len(numbers) - tail]
                    widest = max(widest, rest[-1] - rest[0])
                ranges.append(widest)
            norm = max(norms[h] for h in group)
            assert parsed.key.error_budget is not None
            assert parsed.value.error_budget is not None
            growth = count**3 / (count - 1) * parsed.key.error_budget**2
            sigmas = (
                math.sqrt(math.log(growth + 1) / norm),
                parsed.value.error_budget / (math.sqrt(count) * seen),
            )
            bits = [
                math.log2(r / (2 * math.sqrt(3) * s)) for r, s in zip(ranges, sigmas, strict=True)
            ]
            for query in range(count, tokens if parsed.adaptive.shadow else 0):
                later = max(float(w[query_heads][:, query, token].max()) for *_, w in layers)
                sigma = parsed.value.error_budget / (math.sqrt(query + 1) * later)
                bits[1] = max(bits[1], math.log2(ranges[1] / (2 * math.sqrt(3) * sigma)))
            key, value = (min(w for w in (*WIDTHS, 99) if w >= min(b, 8)) for b in bits)
            yield key, value


def decoded(
    tiny: Model, spec: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[KvqCache, list[tuple[Tensor, Tensor, Tensor]]]:
    """Decode token by token; return the cache and of each layer what went into it, keys and values
    (batch, heads, tokens, dim), and the weights (batch, num_heads, tokens, tokens), rebuilt from
    what decoding had stored at every step.
    """
    model, seam, ids = tiny
    bundle = bundle_of(spec, seam)
    given: list[list[tuple[Tensor, Tensor]]] = [[], []]
    rows: list[list[Tensor]] = [[], []]
    queries: list[list[Tensor]] = [[], []]
    take = AdaptiveStore.take

    def spy(store: AdaptiveStore, key: Tensor, value: Tensor) -> None:
        given[store.layer].append((key, value))
        take(store, key, value)

    monkeypatch.setattr(AdaptiveStore, "take", spy)
    for index, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        hook = partial(_keep, queries[index])
        layer.self_attn.q_proj.register_forward_hook(hook)
    with attach(model, bundle, seam=seam) as session:  # type: ignore[arg-type]
        cache = session.new_cache(bundle, prefill="decode-exact")
        for at in range(TOKENS):
            model(ids[:, at : at + 1], past_key_values=cache)
            for index, store in enumerate(cache.stores):
                states = queries[index][-1]
                cos, sin = model.model.rotary_emb(states, torch.tensor([[at]]))  # type: ignore[union-attr, operator]
                query = states.view(2, 1, 4, 16).transpose(1, 2)
                half = torch.cat([-query[..., 8:], query[..., :8]], -1)
                query = query * cos[:, None] + half * sin[:, None]
                keys = store.read(_no_angles)[0].repeat_interleave(2, dim=1)
                weights = (query @ keys.transpose(2, 3) / 4).softmax(-1)[:, :, 0]
                rows[index].append(torch.nn.functional.pad(weights, (0, TOKENS - at - 1)))
    for layer in model.model.layers:  # type: ignore[union-attr, union-attr, operator]
        layer.self_attn.q_proj._forward_hooks.clear()
    found = []
    for states, attended in zip(given, rows, strict=True):
        key, value = (torch.cat(part, dim=2) for part in zip(*states, strict=True))
        found.append((key, value, torch.stack(attended, dim=2)))
    return cache, found


def _keep(kept: list[Tensor], module: torch.nn.Module, inputs: object, output: Tensor) -> None:
    kept.append(output)


@pytest.mark.parametrize(
    "spec",
    (
        "qaq-k0.02-v0.2-w3-1%",
        "qaq-k0.02-v0.2-w3-head-5%",
        "qaq-k0.02-v0.2-w1-sink2",
        "qaq-k0.02-v0.2-w3-token-1%",
        "qaq-k0.02-v0.05-w3-1%-shadow",
        "qaq-k0.02-v0.05-w2-head-shadow",
    ),
)
@torch.no_grad()
def test_bits_are_those_of_a_loop_over_the_papers_formulas(
    tiny: Model, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, layers = decoded(tiny, spec, monkeypatch)
    used = set()
    for store, own in zip(cache.stores, layers, strict=True):
        sharing = layers if "token" in spec else [own]
        found = [body.read()["widths"].view(-1, 2, store.units) for body in store.bodies]
        for sequence in range(2):
            shown = [tuple(part[sequence] for part in layer) for layer in sharing]
            wanted = list(brute(shown, spec, [3.0, 5.0]))  # type: ignore[arg-type]
            for side in range(2):
                mine = found[side][:, sequence].flatten().tolist()
                assert mine == [pair[side] for pair in wanted]
            used |= {bits for pair in wanted for bits in pair}
    assert len(used) > 2


SHADOW = "qaq-k0.02-v0.05-w2-1%-shadow"


class TestShadow:
    def test_bits_only_rise_and_some_do(self, tiny: Model) -> None:
        fixed, rising = (
            filled(tiny, spec, [1] * TOKENS) for spec in (SHADOW.replace("-shadow", ""), SHADOW)
        )
        for side in range(2):
            # The first layer's keys and values do not depend on how any is stored.
            before, after = (c.stores[0].bodies[side].read()["widths"] for c in (fixed, rising))
            assert torch.all(after >= before)
            assert bool(torch.any(after > before)) == (side == 1)

    def test_its_bytes_are_apart(self, tiny: Model) -> None:
        cache = filled(tiny, SHADOW, [20, *[1] * 10], "exact")
        layers = tuple(layer.cache_layer for layer in tiny[1].packed)
        planned = CacheModel(layers, parse_spec(SHADOW), 2, "float64")
        assert cache.nbytes == planned.bytes_given(30, [found_in(s.bodies) for s in cache.stores])
        # A page of 128 tokens of two sequences: 32 numbers of float64 and a spread in float32.
        page = 128 * 2 * (32 * 8 + 4)
        assert [row["shadow_bytes"] for row in layer_report(cache)] == [page, page]

    def test_chosen_sequences_rise_as_if_they_had_been_read_so(self, tiny: Model) -> None:
        model, seam, ids = tiny
        order = torch.tensor([1, 1, 0])
        cache = filled(tiny, SHADOW, [1] * 30)
        cache.batch_select_indices(order)
        bundle = bundle_of(SHADOW, seam)
        with torch.no_grad(), attach(model, bundle, seam=seam) as session:  # type: ignore[arg-type]
            for at in range(30, TOKENS):
                session.model(ids[order][:, at : at + 1], past_key_values=cache)
        assert_same(cache, filled((model, seam, ids[order]), SHADOW, [1] * TOKENS))

    def test_cropping_forgets_the_copies_of_what_is_gone(self, tiny: Model) -> None:
        cache = filled(tiny, SHADOW, [1] * 30)
        cache.crop(-8)
        for store in cache.stores:
            assert store.shadow.tokens == store.bodies[1].tokens == 22


def test_layers_that_share_bits_refuse_several_tokens_at_once(tiny: Model) -> None:
    spec = "qaq-k0.02-v0.2-w3-token-1%"
    with pytest.raises(RunError, match="ppl: --protocol true-decode"):
        filled(tiny, spec, [20, 2], "exact")
    with pytest.raises(RunError, match="feed one token at a time"):
        filled(tiny, spec, [20])


def test_layers_that_share_bits_agree_on_a_prompt_and_go_on(tiny: Model) -> None:
    spec = "qaq-k0.02-v0.2-w3-token-1%"
    cache = filled(tiny, spec, [30, *[1] * 5], "exact")
    for side in range(2):
        first, second = (store.bodies[side].read()["widths"] for store in cache.stores)
        assert len(first) == 2 * (35 - 3)
        assert torch.equal(first, second)
    layers = tuple(layer.cache_layer for layer in tiny[1].packed)
    planned = CacheModel(layers, parse_spec(spec), 2, "float64")
    assert cache.nbytes == planned.bytes_given(35, [found_in(s.bodies) for s in cache.stores])


def _no_angles(start: int, stop: int) -> tuple[Tensor, Tensor]:
    raise AssertionError("keys are stored after RoPE")


@pytest.mark.parametrize("spec", SPECS[:2])
class TestRearranging:
    def test_selected_sequences_are_as_if_read_so(self, tiny: Model, spec: str) -> None:
        model, seam, ids = tiny
        order = torch.tensor([1, 1, 0])
        cache = filled(tiny, spec, [20, 1, 9])
        cache.batch_select_indices(order)
        assert_same(cache, filled((model, seam, ids[order]), spec, [20, 1, 9]))

    def test_cropped_tokens_make_room_and_packed_ones_stay(self, tiny: Model, spec: str) -> None:
        model, seam, ids = tiny
        bundle, sinks = bundle_of(spec, seam), parse_spec(spec).sink_tokens
        kept = filled(tiny, spec, [1] * 30).stores[1].bodies
        with torch.no_grad(), attach(model, bundle, seam=seam) as session:  # type: ignore[arg-type]
            cache = run(session, bundle, ids[:, :30], [1] * 30, "decode-exact")
            cache.crop(-5)
            assert [store.tokens for store in cache.stores] == [25, 25]
            assert all(store.attention.shape[2] == 0 for store in cache.stores)
            session.model(ids[:, 25:], past_key_values=cache)
        layers = tuple(layer.cache_layer for layer in seam.packed)
        planned = CacheModel(layers, bundle.spec, 2, "float64")
        found = [found_in(store.bodies) for store in cache.stores]
        assert cache.nbytes == planned.bytes_given(TOKENS, found)
        rows = (25 - sinks) * kept[0].rows_per_token
        for mine, theirs in zip(cache.stores[1].bodies, kept, strict=True):
            widths = mine.read()["widths"], theirs.read()["widths"]
            assert torch.equal(widths[0][:rows], widths[1][:rows])


def test_an_exact_prompt_is_decided_at_its_end_by_its_last_queries(tiny: Model) -> None:
    """Without packing the weights are those of the model's own attention."""
    spec = "qaq-k0.02-v0.2-w3-1%"
    model, _, ids = tiny
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    cache = filled(tiny, spec, [TOKENS], prefill="exact")
    seen = attentions[1][:, :, -3:].amax(dim=(1, 2))
    assert torch.allclose(cache.stores[1].attention[:, 0].double(), seen[:, -3:], atol=1e-6)
    assert cache.stores[1].bodies[0].tokens == TOKENS - 3


def test_calls_whose_attention_stays_hidden_are_refused(tiny: Model) -> None:
    model, seam, _ = tiny
    bundle = bundle_of(SPECS[0], seam)
    states = torch.randn(2, 2, 4, 16, dtype=torch.float64)
    with attach(model, bundle, seam=seam) as session:  # type: ignore[arg-type]
        cache = session.new_cache(bundle)
        cache.update(states, states, 0)
        with pytest.raises(RunError, match="layer 0 attends where its cache cannot see it"):
            cache.update(states, states, 0)


def test_query_norms_are_measured_with_the_softmax_scale(builtin: LoadedModel) -> None:
    ids = torch.randint(2, 8192, (1, 64), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids, torch.ones(1, dtype=torch.int64), Text("", "random", ""), "", 64)
    (bundle,) = calibrate(builtin, windows, [parse_spec("qaq")])
    found = bundle.codebooks[2, "key"].query_norm
    attention = builtin.model.model.layers[2].self_attn
    queries: list[Tensor] = []
    handle = attention.q_proj.register_forward_hook(lambda *c: queries.append(c[2]))
    with torch.no_grad():
        builtin.model(ids)
    handle.remove()
    dim = attention.head_dim
    heads = queries[0].view(64, -1, dim).double() * attention.scaling
    each = heads.square().sum(-1).quantile(0.9, dim=0)
    assert found is not None
    wanted = each.view(len(found), -1).amax(1)
    assert torch.allclose(found.double(), wanted, rtol=0.02)
