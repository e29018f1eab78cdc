"""Passkey prompts, and a model that always finds the number."""

from typing import Any

import pytest
import torch

from kvqtool import passkey as module
from kvqtool.bundle import uncalibrated_bundle
from kvqtool.data import load_text
from kvqtool.errors import InputError
from kvqtool.models import LoadedModel
from kvqtool.passkey import Hunt, passkey
from kvqtool.spec import parse_spec


def ask(builtin: LoadedModel, *options: Any) -> module.PasskeyResult:
    layers = [layer.index for layer in builtin.seam.packed]
    bundle = uncalibrated_bundle(parse_spec("int4-g64"), builtin.identity.as_json(), layers)
    text = load_text(None, part="evaluation")
    return passkey(builtin, text, bundle, Hunt(*options))


def test_prompts_hold_the_number_once_announced_at_even_depths(
    builtin: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def answers(loaded: LoadedModel, prompts: torch.Tensor, cache: Any) -> list[str]:
        (prompt,) = prompts
        text = loaded.tokenizer.decode(prompt)
        key = text.split("The secret number is ")[1][:5]
        seen.append((len(prompt), text.index(key) / len(text), text.count(key), text))
        return [key]

    monkeypatch.setattr(module, "_answers", answers)
    result = ask(builtin, (200, 300), 4)
    assert result.lengths == [
        {"tokens": n, "trials": 4, "found": 4, "found_baseline": 4} for n in (200, 300)
    ]
    assert [tokens for tokens, *_ in seen] == [200] * 8 + [300] * 8
    assert all(count == 2 for _, _, count, _ in seen)
    assert all(text.endswith("The secret number is") for *_, text in seen)
    depths = [depth for _, depth, *_ in seen[:8:2]]
    assert depths == sorted(depths)
    assert len(set(depths)) == 4
    assert seen[0] == seen[1]  # both caches read the same prompt


def test_a_batch_of_prompts_is_answered_one_by_one(
    builtin: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = ask(builtin, (150,), 3)
    sizes, answers = [], module._answers

    def listen(loaded: LoadedModel, prompts: torch.Tensor, cache: Any) -> list[str]:
        sizes.append(len(prompts))
        return answers(loaded, prompts, cache)

    monkeypatch.setattr(module, "_answers", listen)
    monkeypatch.setattr(module, "_batches", lambda *_: [(150, range(2)), (150, range(2, 3))])
    assert ask(builtin, (150,), 3).lengths == alone.lengths
    assert sizes == [2, 2, 1, 1]


def test_an_exact_cache_finds_what_the_stock_one_finds(builtin: LoadedModel) -> None:
    layers = [layer.index for layer in builtin.seam.packed]
    bundle = uncalibrated_bundle(parse_spec("fp"), builtin.identity.as_json(), layers)
    text = load_text(None, part="evaluation")
    (row,) = passkey(builtin, text, bundle, Hunt((150,), 3)).lengths
    assert row["found"] == row["found_baseline"]


def test_a_length_without_room_is_refused(builtin: LoadedModel) -> None:
    with pytest.raises(InputError, match=r"prompt of 20 tokens needs 1 to .* use other --lengths"):
        ask(builtin, (20,))
