"""Multiple choice: scores by a plain loop, questions of three forms, and a made file."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvqtool.attach import attach
from kvqtool.bundle import Bundle, uncalibrated_bundle
from kvqtool.choices import Question, _compare, choose, read_questions
from kvqtool.errors import InputError
from kvqtool.models import LoadedModel
from kvqtool.spec import parse_spec

ROOT = Path(__file__).parents[1]
LINES = [
    {"question": "A list is a mutable", "choices": [" sequence.", " banana or two."], "answer": 0},
    {"ctx": "The function returns the", "endings": ["value of x", "moon"], "label": "1"},
    {"goal": "To open a file, call", "sol1": "open()", "sol2": "close it", "label": 0},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    return path


def bundle_of(builtin: LoadedModel, spec: str) -> Bundle:
    layers = [layer.index for layer in builtin.seam.packed]
    return uncalibrated_bundle(parse_spec(spec), builtin.identity.as_json(), layers)


def test_three_forms_of_questions_are_read(path: Path) -> None:
    assert read_questions(path) == [
        Question("A list is a mutable", (" sequence.", " banana or two."), 0),
        Question("The function returns the", ("value of x", "moon"), 1),
        Question("To open a file, call", ("open()", "close it"), 0),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"text": "a"}',
        '{"question": "a", "choices": ["b"], "answer": 0}',
        '{"question": "a", "choices": ["b", "c"], "answer": 2}',
        '{"question": "a", "choices": ["b", 3], "answer": 0}',
        '{"question": " ", "choices": ["b", "c"], "answer": 0}',
        '{"question": "a", "choices": ["b", "c"]}',
    ],
)
def test_a_line_that_is_no_question_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(LINES[0]) + "\n" + line + "\n")
    with pytest.raises(InputError, match=r'line 2 is no question .*; write \{"question": "..."'):
        read_questions(path)


@pytest.mark.parametrize(
    "spec", ("int3-g32", "qaq-released-k0.3-v0.3-w2", "qaq-released-k0.3-v0.3-w2-token")
)
@torch.no_grad()
def test_scores_are_those_of_each_choice_on_a_cache_of_its_own(
    builtin: LoadedModel, path: Path, spec: str
) -> None:
    bundle, model = bundle_of(builtin, spec), builtin.model
    said, hits, count = [], 0, 0
    for question in read_questions(path):
        asked = builtin.tokenizer(question.text)["input_ids"]
        scores = []
        for choice in question.choices:
            spaced = choice if choice.startswith(" ") else f" {choice}"
            ids = builtin.tokenizer(spaced, add_special_tokens=False)["input_ids"]
            with attach(model, bundle, seam=builtin.seam) as session:
                cache = session.new_cache(bundle)
                model(torch.tensor([asked[:-1]]), past_key_values=cache)
                rest = torch.tensor([[asked[-1], *ids[:-1]]])
                pieces = rest.split(1 if "token" in spec else 99, dim=1)
                said_by = [model(part, past_key_values=cache).logits[0] for part in pieces]
                logits = torch.cat(said_by).double().log_softmax(-1)
            scores.append(sum(float(logits[i, token]) for i, token in enumerate(ids)) / len(ids))
        said.append(scores[question.answer])
        hits += scores.index(max(scores)) == question.answer
        count += 1
    result = choose(builtin, path, bundle)
    assert result.questions == count
    assert result.accuracy == pytest.approx(hits / count)
    assert result.answer_logprob == pytest.approx(sum(said) / count, abs=1e-3)
    assert result.answer_logprob != pytest.approx(result.answer_logprob_baseline, abs=1e-3)


def test_an_exact_cache_changes_nothing(builtin: LoadedModel, path: Path) -> None:
    result = choose(builtin, path, bundle_of(builtin, "fp"))
    assert (result.accuracy_change, result.same_choice) == (0.0, 1.0)
    assert result.answer_logprob == pytest.approx(result.answer_logprob_baseline, abs=1e-5)


def test_the_interval_is_of_the_paired_change() -> None:
    questions = [Question("q", ("a", "b"), 0)] * 100
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    exact = [right] * 80 + [wrong] * 20
    packed = [right] * 75 + [wrong] * 5 + [right] * 2 + [wrong] * 18
    found = _compare(questions, packed, exact)
    assert found["accuracy"] == pytest.approx(0.77)
    assert found["accuracy_baseline"] == pytest.approx(0.80)
    assert found["same_choice"] == pytest.approx(0.93)
    # 5 lost and 2 won: variance of the change is 0.07 - 0.03 ** 2.
    half = 1.959964 * math.sqrt((0.07 - 0.03**2) / 100)
    assert found["accuracy_change_low"] == pytest.approx(-0.03 - half)
    assert found["accuracy_change_high"] == pytest.approx(-0.03 + half)


def test_questions_are_made_from_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{n}" for n in range(400)))
    out = tmp_path / "made.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "make_choices.py"), "--dataset", str(text)]
    command += ["--questions", "6", "--question-words", "20", "--choice-words", "4"]
    subprocess.run([*command, "--output", str(out)], check=True, env={"PYTHONPATH": str(ROOT)})
    questions = read_questions(out)
    assert len(questions) == 6
    for question in questions:
        last = int(question.text.split("word")[-1])
        wanted = "".join(f" word{last + n}" for n in range(1, 5))
        assert question.choices[question.answer] == wanted
        assert len(set(question.choices)) == 4
