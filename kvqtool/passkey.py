"""Passkey retrieval: hide a number in a long text and ask for it. What perplexity hides.

The prompt is raw text: an announcement, filler from a data set with the number somewhere inside,
and a question that the model completes. Both caches read the same prompts and answer greedily.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

from kvqtool.attach import attached
from kvqtool.bundle import Bundle
from kvqtool.calibrate import versions
from kvqtool.data import Text
from kvqtool.errors import InputError
from kvqtool.forward import next_logits
from kvqtool.models import LoadedModel
from kvqtool.progress import Progress, silent
from kvqtool.usage import kernel_of, layer_report

OPENING: Final = "A secret number is hidden in this text. Find it and remember it.\n\n"
NEEDLE: Final = "\n\nThe secret number is {key}. Remember it: {key} is the secret number.\n\n"
QUESTION: Final = "\n\nWhat is the secret number? The secret number is"
_DIGITS: Final = 5
_ANSWER_TOKENS: Final = 8
_TOKENS_AT_ONCE: Final = 49152  # of a batch on a GPU


@dataclass(frozen=True)
class Hunt:
    """Which prompts to ask.

    Args:
        lengths: tokens of a prompt.
        trials: prompts of each length, their numbers at even depths.
        seed: of the numbers.
        prefill: how a compressed cache reads the prompt, as in `Session.new_cache`.
    """

    lengths: tuple[int, ...]
    trials: int = 6
    seed: int = 0
    prefill: str = "decode-exact"

    def key(self, length: int, trial: int) -> str:
        """Return a prompt's number."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + length * 1009 + trial)
        low = 10 ** (_DIGITS - 1)
        return str(int(torch.randint(low, 10 * low, (), generator=generator)))


@dataclass(frozen=True)
class PasskeyRow:
    """What was found at one length.

    Args:
        tokens: of a prompt.
        trials: prompts, their numbers at even depths.
        found: answers that were right with the compressed cache.
        found_baseline: with the exact one.
    """

    tokens: int
    trials: int
    found: int
    found_baseline: int


@dataclass(frozen=True)
class PasskeyResult:
    """The figures of one run."""

    spec: str
    lengths: list[dict[str, Any]]
    protocol: dict[str, Any]
    layers: list[dict[str, Any]]


@torch.no_grad()
def passkey(
    loaded: LoadedModel, text: Text, bundle: Bundle, hunt: Hunt, progress: Progress = silent
) -> PasskeyResult:
    """Ask for hidden numbers with a bundle's cache and without.

    Args:
        loaded: the model.
        text: filler; it must hold the longest prompt.
        bundle: scheme and codebooks, made for this model.
        hunt: the prompts.
        progress: told of every prompt.

    Raises:
        InputError: when the text or a length is too short.
        BundleError: when the bundle is another model's.
    """
    bundle.check_model(loaded.identity.as_json())
    filler = _ids(loaded, text.text)
    found = {length: [0, 0] for length in hunt.lengths}
    done, whole = 0, len(hunt.lengths) * hunt.trials
    with attached(loaded, bundle) as session:
        for length, trials in _batches(loaded, hunt):
            progress("hiding numbers", done, whole)
            keys = [hunt.key(length, trial) for trial in trials]
            depths = [(trial + 0.5) / hunt.trials for trial in trials]
            prompts = [
                _prompt(loaded, filler, key, (length, depth))
                for key, depth in zip(keys, depths, strict=True)
            ]
            packed = session.new_cache(bundle, prefill=hunt.prefill)
            for which, cache in enumerate((packed, DynamicCache(config=loaded.model.config))):
                said = _answers(loaded, torch.cat(prompts), cache)
                found[length][which] += sum(map(str.__eq__, said, keys))
            done += len(trials)
    progress("hiding numbers", whole, whole)
    rows = [PasskeyRow(length, hunt.trials, *counts) for length, counts in found.items()]
    protocol = {
        "name": "passkey",
        "prefill": hunt.prefill,
        "seed": hunt.seed,
        "dataset": text.name,
        "dataset_sha256": text.sha256,
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "kernel": kernel_of(packed),
        "versions": versions(),
    }
    report = layer_report(packed)
    return PasskeyResult(bundle.spec.name, [asdict(row) for row in rows], protocol, report)


def _ids(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _prompt(loaded: LoadedModel, filler: list[int], key: str, at: tuple[int, float]) -> Tensor:
    """Return the tokens of one prompt, (1, length) int64, the number at a depth in 0..1."""
    length, depth = at
    opening = list(loaded.tokenizer(OPENING)["input_ids"])
    needle, question = _ids(loaded, NEEDLE.format(key=key)), _ids(loaded, QUESTION)
    room = length - len(opening) - len(needle) - len(question)
    if room < 1 or room > len(filler):
        raise InputError(
            f"a passkey prompt of {length} tokens needs 1 to {len(filler)} tokens of filler, "
            f"not {room}; use other --lengths, or a longer --dataset"
        )
    before = round(room * depth)
    parts = opening + filler[:before] + needle + filler[before:room] + question
    return torch.tensor([parts], device=loaded.device)


def _batches(loaded: LoadedModel, hunt: Hunt) -> Iterator[tuple[int, range]]:
    """Cut a hunt's trials into batches, (length, trials): on a GPU a single prompt leaves it
    waiting.
    """
    for length in hunt.lengths:
        at_once = max(_TOKENS_AT_ONCE // length, 1) if loaded.device.type == "cuda" else 1
        for first in range(0, hunt.trials, at_once):
            yield length, range(first, min(first + at_once, hunt.trials))


def _answers(loaded: LoadedModel, prompts: Tensor, cache: Any) -> list[str]:
    """Return the digits that greedy decoding of each prompt begins with; prompts are (B, T)."""
    token, ids = prompts, []
    for _ in range(_ANSWER_TOKENS):
        token = next_logits(loaded.model, token, cache)[:, None].argmax(-1)
        ids.append(token)
    return [_leading_digits(loaded, row) for row in torch.cat(ids, 1).tolist()]


def _leading_digits(loaded: LoadedModel, ids: list[int]) -> str:
    said = str(loaded.tokenizer.decode(ids)).strip()
    digits = "".join(c if c.isdecimal() else " " for c in said).split(" ")
    return digits[0]
