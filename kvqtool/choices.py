"""Multiple choice: is the right ending still the likeliest when the question's cache is compressed?

The question is read exactly but for its last token and packed; then its last token and each choice
are read on a copy of that cache, so that every token of an answer, the first among them, is scored
by queries that attend to what is packed. A choice's score is its mean log-probability a token. The
exact cache is asked in the same way.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from kvqtool.attach import Session, attached
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.calibrate import versions
from kvqtool.errors import InputError, RunError, brief
from kvqtool.forward import head_of, hidden_states
from kvqtool.models import LoadedModel
from kvqtool.progress import Progress, silent
from kvqtool.stepwise import is_stepwise
from kvqtool.usage import kernel_of, layer_report, measure

# Names of question, choices and answer: ours, HellaSwag's and PIQA's.
_FORMS: Final = (
    ("question", ("choices",), "answer"),
    ("ctx", ("endings",), "label"),
    ("goal", ("sol1", "sol2"), "label"),
)
_NORMAL_95: Final = 1.959964


@dataclass(frozen=True)
class Question:
    """A question.

    Args:
        text: what stands before the choices.
        choices: two or more endings.
        answer: the right one's index.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class ChoicesResult:
    """The figures of one run; every field is documented in docs/json.md."""

    spec: str
    questions: int
    accuracy: float
    accuracy_baseline: float
    accuracy_change: float
    accuracy_change_low: float
    accuracy_change_high: float
    same_choice: float
    answer_logprob: float
    answer_logprob_baseline: float
    effective_bits: float
    cache_bytes: int
    cache_bytes_fp16: int
    protocol: dict[str, Any]
    layers: list[dict[str, Any]]


def read_questions(path: str | Path) -> list[Question]:
    """Read a JSONL file of questions: `question`, `choices` and the right one's index in `answer`;
    or lines of HellaSwag (`ctx`, `endings`, `label`) or PIQA (`goal`, `sol1`, `sol2`, `label`).

    Raises:
        InputError: naming the line that is none.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"questions {path} cannot be read: {brief(error)}; name a file") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InputError(f"questions {path} is empty; write a JSON object a line")
    return [_question(line, f"{path}, line {number}") for number, line in numbered]


def _question(line: str, where: str) -> Question:
    try:
        said = json.loads(line)
        text, names, answer = next(form for form in _FORMS if form[0] in said)
        parts = [said[name] for name in names]
        choices = parts[0] if len(names) == 1 else parts
        question = Question(said[text], tuple(choices), int(said[answer]))
        texts = (question.text, *question.choices)
        if not (all(isinstance(each, str) and each.strip() for each in texts) and len(choices) > 1):
            raise ValueError("texts")
        if not 0 <= question.answer < len(choices):
            raise ValueError(f"answer {question.answer}")
        return question
    except (ValueError, TypeError, KeyError, StopIteration, RecursionError) as error:
        raise InputError(
            f'{where} is no question ({brief(error)}); write {{"question": "...", "choices": '
            '["...", "..."], "answer": 0}'
        ) from error


@torch.no_grad()
def choose(
    loaded: LoadedModel, path: str | Path, bundle: Bundle, progress: Progress = silent
) -> ChoicesResult:
    """Answer a file of questions with a bundle's cache and without.

    Args:
        loaded: the model.
        path: the questions, see `read_questions`.
        bundle: scheme and codebooks, made for this model.
        progress: told of every question.

    Raises:
        InputError: when the file is none, or a question is too long for the model.
        BundleError: when the bundle is another model's.
        RunError: when logits are not finite.
    """
    bundle.check_model(loaded.identity.as_json())
    questions = read_questions(path)
    tokens = [_tokens(loaded, question) for question in questions]
    scores, exact, held = [], [], []
    with attached(loaded, bundle) as session:
        for done, (asked, choices) in enumerate(tokens):
            progress("answering questions", done, len(questions))
            packed = session.new_cache(bundle)
            scores.append(_scores(session, asked, choices, packed))
            usage = measure(packed)
            held.append((usage.cache_bytes // usage.batch, usage.cache_bytes_fp16 // usage.batch))
            stock = DynamicCache(config=loaded.model.config)
            exact.append(_scores(session, asked, choices, stock))
    progress("answering questions", len(questions), len(questions))
    figures = _compare(questions, scores, exact)
    nbytes, nbytes_fp16 = (sum(column) for column in zip(*held, strict=True))
    return ChoicesResult(
        spec=bundle.spec.name,
        questions=len(questions),
        **figures,
        effective_bits=16 * nbytes / nbytes_fp16,
        cache_bytes=round(nbytes / len(held)),
        cache_bytes_fp16=round(nbytes_fp16 / len(held)),
        protocol=_protocol(loaded, path) | {"kernel": kernel_of(packed)},
        layers=layer_report(packed),
    )


def _protocol(loaded: LoadedModel, path: str | Path) -> dict[str, Any]:
    data = Path(path).expanduser().read_bytes()
    return {
        "name": "choices",
        "score": "mean log-probability of a choice's tokens",
        "dataset": str(path),
        "dataset_sha256": hashlib.sha256(data).hexdigest(),
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def _tokens(loaded: LoadedModel, question: Question) -> tuple[Tensor, list[list[int]]]:
    """Return a question's tokens (1, n) and those of each choice; a choice that follows no space
    gets one.
    """
    asked: list[int] = loaded.tokenizer(question.text, verbose=False)["input_ids"]
    gap = "" if question.text[-1].isspace() else " "
    texts = [each if each[0].isspace() else gap + each for each in question.choices]
    choices: list[list[int]] = [
        loaded.tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"]
        for each in texts
    ]
    longest = len(asked) + max(map(len, choices))
    if len(asked) < 2 or longest > loaded.identity.max_context:
        raise InputError(
            f"question {brief(question.text)} has {longest} tokens with its longest choice; the "
            f"model takes 3 to {loaded.identity.max_context}"
        )
    return torch.tensor([asked], device=loaded.device), choices


def _scores(
    session: Session, asked: Tensor, choices: Sequence[Sequence[int]], cache: Cache
) -> list[float]:
    """Return each choice's mean log-probability a token."""
    model = session.model
    hidden_states(model, {"input_ids": asked[:, :-1]}, cache)
    cache.batch_repeat_interleave(len(choices))
    longest = max(map(len, choices))
    # What fills up the shorter choices comes after all that is scored.
    rows = [[*choice, *[0] * (longest - len(choice))] for choice in choices]
    ids = torch.tensor(rows, device=asked.device)
    fed = torch.cat([asked[:, -1:].expand(len(choices), 1), ids[:, :-1]], dim=1)
    has_steps = isinstance(cache, KvqCache) and is_stepwise(cache.bundle.spec)
    pieces = fed.T[:, :, None] if has_steps else fed[None]
    parts = [hidden_states(model, {"input_ids": piece}, cache) for piece in pieces]
    hidden = torch.cat(parts, dim=1)
    with head_of(model) as head:
        each = head(hidden).log_softmax(-1)
    said = each.gather(2, ids.to(each.device)[..., None])[..., 0]
    means = [float(row[: len(choice)].mean()) for row, choice in zip(said, choices, strict=True)]
    if not all(map(math.isfinite, means)):
        raise RunError("logits hold NaN or infinity; run in float32 or check the model's weights")
    return means


def _compare(
    questions: Sequence[Question], scores: list[list[float]], exact: list[list[float]]
) -> dict[str, float]:
    """Return accuracies, and their change with its 95 % interval, question by question."""
    right = [question.answer for question in questions]
    picks, exact_picks = (
        [max(range(len(row)), key=row.__getitem__) for row in rows] for rows in (scores, exact)
    )
    hits, exact_hits = (
        torch.tensor([p == r for p, r in zip(each, right, strict=True)], dtype=torch.float64)
        for each in (picks, exact_picks)
    )
    change = hits - exact_hits
    half = _NORMAL_95 * float(change.std(correction=0)) / math.sqrt(len(change))
    mean = float(change.mean())
    same = sum(a == b for a, b in zip(picks, exact_picks, strict=True))
    said, said_exact = (
        sum(row[r] for row, r in zip(rows, right, strict=True)) / len(right)
        for rows in (scores, exact)
    )
    return {
        "accuracy": float(hits.mean()),
        "accuracy_baseline": float(exact_hits.mean()),
        "accuracy_change": mean,
        "accuracy_change_low": mean - half,
        "accuracy_change_high": mean + half,
        "same_choice": same / len(right),
        "answer_logprob": said,
        "answer_logprob_baseline": said_exact,
    }
