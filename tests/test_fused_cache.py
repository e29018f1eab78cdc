"""The cache read from pages, by the kernels' torch references: the same codes and the same tokens
as through torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import SIZES, learned, loaded_model, rope, tokens
from fused_case import assert_same, greedy, same_choices, text_ids
from torch import Tensor

from kvqtool.attach import Session, attach, attached
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.cachefile import load_cache, quantize_text, restore_cache
from kvqtool.calibrate import calibrate
from kvqtool.data import Text
from kvqtool.errors import InputError, RunError
from kvqtool.forward import next_logits
from kvqtool.models import LoadedModel
from kvqtool.spec import parse_spec
from kvqtool.usage import kernel_of, layer_report

SPECS = (
    "nuq3-1%-sink1",
    "kvq3",
    "nuq4-1%-pc/nuq2-5%",
    "nuq3-1%-comp/nuq3-1%-comp-vrot",
    "nuq3-1%-cap3-r40-sink2",
    "nf4-postrope/int8",
)
Maker = Callable[[str], Bundle]


@contextmanager
def fused(
    loaded: LoadedModel, bundle: Bundle, **options: Any
) -> Iterator[tuple[Session, KvqCache]]:
    """Open a session and a cache that is read from pages."""
    read_path = options.pop("read_path", "fused")
    attached_to = attach(loaded.model, bundle, seam=loaded.seam, read_path=read_path)
    with torch.no_grad(), attached_to as session:
        yield session, session.new_cache(bundle, **options)


def feed(session: Session, cache: KvqCache, ids: Tensor, **inputs: Tensor) -> Tensor:
    logits: Tensor = session.model(input_ids=ids, past_key_values=cache, **inputs).logits
    return logits


@pytest.mark.parametrize("spec", SPECS)
def test_tokens_and_codes_are_those_of_the_torch_path(
    builtin: LoadedModel, calibrated: Maker, spec: str
) -> None:
    ids = text_ids(builtin, 2, 250)
    expected = greedy(builtin, calibrated(spec), ids, "materialise", 24)
    found = greedy(builtin, calibrated(spec), ids, "fused", 24, expected.tokens)
    assert same_choices(found, expected) <= 4
    assert found.calls == {"exact": 1, "fused": 23, "dequantize": 0, "materialise": 0}
    assert kernel_of(found.cache) == "torch (fused reference)"
    # The first layer's states do not depend on how any layer is read.
    first = {name: t for name, t in expected.canonical.items() if name.startswith("0.")}
    assert_same({name: found.canonical[name] for name in first}, first)


@pytest.mark.parametrize("tokens", (1, 126, 127, 128, 129, 255, 256, 257))
def test_lengths_around_a_page(builtin: LoadedModel, calibrated: Maker, tokens: int) -> None:
    bundle, ids = calibrated("nuq3-1%"), text_ids(builtin, 3, tokens)
    expected = greedy(builtin, bundle, ids, "materialise", 4)
    found = greedy(builtin, bundle, ids, "fused", 4, expected.tokens)
    assert same_choices(found, expected) <= 2
    assert found.cache.stores[0].tokens == tokens + 3


def test_true_decoding_is_one_call_of_decode_exact(builtin: LoadedModel, calibrated: Maker) -> None:
    bundle, ids = calibrated("nuq3-1%-sink1"), text_ids(builtin, 1, 140)
    with fused(builtin, bundle, prefill="decode-exact") as (session, cache):
        steps = torch.cat([feed(session, cache, ids[:, i : i + 1]) for i in range(140)], 1)
        whole = feed(session, session.new_cache(bundle, prefill="decode-exact"), ids)
    assert (steps - whole).square().mean().sqrt() < 0.1
    assert steps.argmax(-1).eq(whole.argmax(-1)).float().mean() > 0.97


def test_several_tokens_see_what_one_by_one_would(builtin: LoadedModel, calibrated: Maker) -> None:
    ids = text_ids(builtin, 1, 300)
    for spec in ("nuq3-1%-sink1", "nuq3-1%-cap3-r40-sink2"):
        with fused(builtin, calibrated(spec)) as (session, cache):
            feed(session, cache, ids[:, :200])
            chunk = feed(session, cache, ids[:, 200:])
            other = session.new_cache(calibrated(spec))
            feed(session, other, ids[:, :200])
            steps = [feed(session, other, ids[:, i : i + 1]) for i in range(200, 300)]
        assert (chunk - torch.cat(steps, 1)).square().mean().sqrt() < 0.1
        assert cache.layers[0].path.calls["dequantize"] == 1


def test_cropping_leaves_what_was_stored_before(builtin: LoadedModel, calibrated: Maker) -> None:
    bundle, ids = calibrated("nuq3-1%-sink1"), text_ids(builtin, 1, 300)
    with fused(builtin, bundle) as (session, cache):
        feed(session, cache, ids[:, :250])
        before = [store.canonical() for store in cache.stores]
        feed(session, cache, ids[:, 250:])
        cache.crop(-50)
        for store, expected in zip(cache.stores, before, strict=True):
            assert_same(store.canonical(), expected)
        assert torch.isfinite(feed(session, cache, ids[:, 250:251])).all()


def test_prompt_lookup_generates_what_plain_decoding_does(
    builtin: LoadedModel, calibrated: Maker
) -> None:
    bundle, ids = calibrated("nuq3-1%-sink1"), text_ids(builtin, 1, 140)
    expected = greedy(builtin, bundle, ids, "fused", 8).tokens
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with fused(builtin, bundle) as (session, cache):
        found = session.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            prompt_lookup_num_tokens=3,
            **options,
        )
    assert found[:, 140:].tolist() == expected.tolist()


def test_sequences_can_be_chosen_and_repeated(builtin: LoadedModel, calibrated: Maker) -> None:
    bundle, ids = calibrated("nuq3-1%-sink1"), text_ids(builtin, 2, 150)
    chosen = torch.tensor([1, 0, 1])
    with fused(builtin, bundle) as (session, cache):
        feed(session, cache, ids)
        cache.batch_select_indices(chosen)
        found = feed(session, cache, ids[chosen][:, :1])
        alike = session.new_cache(bundle)
        feed(session, alike, ids[chosen])
        expected = feed(session, alike, ids[chosen][:, :1])
    assert (found - expected).abs().max() < 1e-3
    for store, other in zip(cache.stores, alike.stores, strict=True):
        assert_same(store.canonical(), other.canonical())


def test_saved_files_are_the_same_bytes_and_go_on(
    builtin: LoadedModel, calibrated: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, document = calibrated("nuq3-1%-sink1"), Text("A list is a sequence. " * 60, "t", "0")
    for read_path in ("materialise", "fused"):
        monkeypatch.setattr(builtin, "read_path", read_path)
        report = quantize_text(builtin, bundle, document, tmp_path / read_path)
        assert report.kernel == "none: nothing packed was read"
    saved = tmp_path / "fused"
    assert saved.read_bytes() == (tmp_path / "materialise").read_bytes()
    with torch.no_grad(), attached(builtin, bundle) as session:
        cache = restore_cache(session, load_cache(saved), builtin)
        logits = [next_logits(builtin.model, torch.tensor([[5]]), cache) for _ in range(3)]
    assert torch.isfinite(torch.cat(logits)).all()
    assert cache.layers[0].path.calls == {
        "exact": 0, "fused": 2, "dequantize": 1, "materialise": 0
    }  # fmt: skip


def test_bytes_are_those_of_every_tensor(builtin: LoadedModel, calibrated: Maker) -> None:
    run = greedy(builtin, calibrated("nuq3-1%-sink1"), text_ids(builtin, 1, 260), "fused", 2)
    pages = [t for s in run.cache.stores for n, ts in s.tensors.items() if "pages" in n for t in ts]
    assert 0 < sum(t.nbytes for t in pages) < run.cache.nbytes
    report = layer_report(run.cache)
    assert sum(row["cache_bytes"] for row in report) < run.cache.nbytes
    assert {row["read_path"] for row in report} == {"fused"}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("fp", "stored as fp"),
        ("int4-g64", "range per token"),
        ("nuq8-1%-pc/nuq4", "a codebook per channel of 8-bit keys"),
        ("nuq3-1%-pertoken", "range per token"),
        ("qaq4", "stored as qaq"),
        ("qaq-k0.03-v1-w4", "bits by token"),
    ],
)
def test_schemes_without_a_kernel_are_refused_or_said(
    builtin: LoadedModel, calibrated: Maker, spec: str, reason: str
) -> None:
    bundle = calibrated(spec)
    with (
        pytest.raises(InputError, match=f"layer 0 .*{reason}.*--read-path"),
        fused(builtin, bundle),
    ):
        pass
    with fused(builtin, bundle, read_path="auto") as (session, cache):
        feed(session, cache, text_ids(builtin, 1, 5))
    assert {row["read_reason"] for row in layer_report(cache)} == {"no CUDA device"}


def test_left_padding_is_refused_or_read_by_torch(builtin: LoadedModel, calibrated: Maker) -> None:
    ids, bundle = text_ids(builtin, 2, 20), calibrated("nuq3-1%-sink1")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with fused(builtin, bundle) as (session, cache), pytest.raises(RunError, match="left padding"):
        feed(session, cache, ids, attention_mask=mask)


def test_attention_of_another_kind_is_refused(builtin: LoadedModel, calibrated: Maker) -> None:
    bundle = calibrated("nuq3-1%-sink1")
    builtin.model.set_attn_implementation("eager")
    try:
        with pytest.raises(InputError, match="eager attention"), fused(builtin, bundle):
            pass
    finally:
        builtin.model.set_attn_implementation("sdpa")


def test_placeholders_poison_what_reads_them(builtin: LoadedModel, calibrated: Maker) -> None:
    bundle, ids = calibrated("nuq3-1%-sink1"), text_ids(builtin, 1, 20)
    with fused(builtin, bundle) as (session, cache):
        feed(session, cache, ids)
        builtin.model.set_attn_implementation("sdpa")
        with pytest.raises(RunError, match="NaN"):
            feed(session, cache, ids[:, :1])


ROTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": (
        "Llama",
        {"head_dim": 64} | rope("yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "part of a head": ("GPTNeoX", {"hidden_size": 256}),
    "pairs": ("Cohere", {"hidden_size": 256}),
    "sliding": ("Mistral", {"hidden_size": 256, "sliding_window": 150}),
    "some layers without": ("SmolLM3", {"no_rope_layers": [1, 0], "hidden_size": 256}),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_what_models_rotate_and_cap(name: str) -> None:
    config_class, options = ROTATIONS[name]
    config = getattr(transformers, f"{config_class}Config")(**(SIZES | options))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    loaded = loaded_model(name, model.eval())
    (bundle,) = calibrate(loaded, learned(), [parse_spec("nuq4-1%-sink1/nuq4-1%-vrot")])
    ids = tokens(1, 300)
    expected = greedy(loaded, bundle, ids, "materialise", 6)
    found = greedy(loaded, bundle, ids, "fused", 6, expected.tokens)
    assert found.calls["fused"] == 5
    assert (found.logits - expected.logits).abs().max() < 0.01 * expected.logits.abs().max()
    for store, other in zip(found.cache.stores, expected.cache.stores, strict=True):
        assert store.bodies[0].tokens == other.bodies[0].tokens
