"""Prompts read in parts: the calls there are, and what they attend to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fused_case import text_ids
from torch import Tensor

from kvqtool.attach import attach
from kvqtool.bundle import Bundle
from kvqtool.forward import next_logits, read_prompt
from kvqtool.models import LoadedModel
from kvqtool.reader import PageReader

Maker = Callable[[str], Bundle]


@torch.no_grad()
def read(loaded: LoadedModel, bundle: Bundle, ids: Tensor, chunk: int | None) -> Tensor:
    with attach(loaded.model, bundle, seam=loaded.seam, read_path="fused") as session:
        return read_prompt(loaded.model, ids, session.new_cache(bundle), chunk)


@pytest.mark.parametrize("spec", ("nuq3-1%-sink1", "nuq3-1%-sink2-r40"))
def test_parts_are_calls_of_so_many_tokens(
    builtin: LoadedModel, calibrated: Maker, spec: str
) -> None:
    bundle, ids = calibrated(spec), text_ids(builtin, 2, 250)
    with torch.no_grad(), attach(builtin.model, bundle, read_path="fused") as session:
        cache = session.new_cache(bundle)
        expected = [next_logits(builtin.model, part, cache) for part in ids.split(100, 1)][-1]
    assert torch.equal(read(builtin, bundle, ids, 100), expected)


@pytest.mark.parametrize("chunk", (None, 60, 61))
def test_a_prompt_that_one_call_takes_is_read_as_ever(
    builtin: LoadedModel, calibrated: Maker, chunk: int | None
) -> None:
    bundle, ids = calibrated("nuq3-1%"), text_ids(builtin, 1, 60)
    with torch.no_grad(), attach(builtin.model, bundle, read_path="fused") as session:
        expected = next_logits(builtin.model, ids, session.new_cache(bundle))
    assert torch.equal(read(builtin, bundle, ids, chunk), expected)


def test_later_parts_never_have_the_past_decoded_all_at_once(
    builtin: LoadedModel, calibrated: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, ids = calibrated("nuq3-1%-sink1"), text_ids(builtin, 1, 300)
    expected = read(builtin, bundle, ids, 100)

    def fail(*_: object) -> None:
        raise AssertionError("the past was decoded")

    monkeypatch.setattr(PageReader, "expand", fail)
    monkeypatch.setattr("kvqtool.scratch.ELEMENTS_AT_ONCE", 128 * 128)
    found = read(builtin, bundle, ids, 100)
    # A code of a later token may fall the other side of a middle.
    assert (found - expected).square().mean().sqrt() < 0.1
