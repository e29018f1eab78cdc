"""Sliding layers: packed, whole pages dropped once no query sees them, the model none the wiser."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, build, learned, loaded_model, tokens
from torch import Tensor

from kvqtool.attach import Session, attach
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.calibrate import calibrate
from kvqtool.errors import RunError
from kvqtool.memory import PAGE_TOKENS, body_buffers, capacity
from kvqtool.spec import parse_spec

WINDOW = 8
LENGTH = 300  # two pages and more past the window
Setting = tuple[Session, Bundle]


@pytest.fixture(scope="module", params=["fp", "int4-sink2", "nuq3-1%-sink1-r3"])
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    assert FAMILIES["gemma3"][1]["sliding_window"] == WINDOW
    model = build("gemma3").double()  # in float32 rounding moves a state to another level at times
    loaded = loaded_model("gemma3", model)
    (bundle,) = calibrate(loaded, learned(), [parse_spec(request.param)])
    with torch.no_grad(), attach(model, bundle, seam=loaded.seam) as session:
        yield session, bundle


def run(setting: Setting, ids: Tensor, sizes: list[int]) -> tuple[Tensor, KvqCache]:
    """Return the logits of a prompt given in pieces, and the cache it filled."""
    session, bundle = setting
    cache = session.new_cache(bundle, prefill="decode-exact")
    parts = [session.model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
    return torch.cat(parts, dim=1), cache


@pytest.mark.parametrize("sizes", [[1] * LENGTH, [LENGTH], [40, 200, 1, 59]], ids=("1", "all", "4"))
def test_far_past_the_window_every_cut_of_the_prompt_gives_the_same_logits(
    setting: Setting, sizes: list[int]
) -> None:
    ids = tokens(1, LENGTH, seed=3)
    expected, _ = run(setting, ids, [100, 100, 100])
    found, cache = run(setting, ids, sizes)
    assert (found - expected).abs().max() < 1e-5
    assert cache.get_seq_length() == LENGTH
    sliding, full = cache.stores
    assert (sliding.dropped, full.dropped) == (2 * PAGE_TOKENS, 0)


def test_exact_storage_gives_stock_logits_at_many_times_the_window(setting: Setting) -> None:
    if str(setting[1].spec) != "fp":
        pytest.skip("stock logits are what exact storage gives; other specs are compared above")
    ids = tokens(2, LENGTH, seed=3)
    stock = setting[0].model(ids).logits
    assert (run(setting, ids, [150, 150])[0] - stock).abs().max() < 1e-4  # keys rotate in float32


def test_what_a_sliding_layer_holds_is_its_pages_and_no_more(setting: Setting) -> None:
    ids = tokens(2, LENGTH, seed=3)
    _, cache = run(setting, ids, [LENGTH])
    spec, store = setting[1].spec, cache.stores[0]
    body = LENGTH - store.dropped - spec.sink_tokens - spec.residual_length
    assert body < PAGE_TOKENS + WINDOW
    for side, quant, packed in zip(
        ("key", "value"), (spec.key, spec.value), store.bodies, strict=True
    ):
        rows = capacity(body) * 2
        planned = body_buffers(quant, packed.channels, rows, packed.outliers, "float64")
        held = {
            name.removeprefix(f"{side}."): sum(t.untyped_storage().nbytes() for t in tensors)
            for name, tensors in store.tensors.items()
            if name.startswith(f"{side}.")
        }
        assert held == {name: buffer.nbytes for name, buffer in planned.items()}


def test_cropping_past_what_was_dropped_is_refused(setting: Setting) -> None:
    _, cache = run(setting, tokens(1, LENGTH, seed=3), [LENGTH])
    with pytest.raises(RunError, match="sliding layer has dropped"):
        cache.crop(-(LENGTH - 20))


def test_with_the_past_recorded_cropping_leaves_no_trace(setting: Setting) -> None:
    session, _ = setting
    ids = tokens(1, LENGTH, seed=3)
    _, cache = run(setting, ids[:, : LENGTH - 20], [LENGTH - 20])
    cache.activate_past_recording()
    session.model(tokens(1, 15, seed=8), past_key_values=cache)
    cache.crop(-15)
    options: dict[str, Any] = {"past_key_values": cache}
    found = session.model(ids[:, LENGTH - 20 :], **options).logits
    expected, _ = run(setting, ids, [LENGTH - 20, 20])
    assert torch.allclose(found, expected[:, LENGTH - 20 :], atol=1e-5)
