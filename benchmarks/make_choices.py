r"""Make multiple-choice questions from held-out text: the true continuation against three from
elsewhere in it. Word lengths are equal, so that no choice stands out by its length.

    python benchmarks/make_choices.py --dataset novel.txt --questions 200 --output choices.jsonl
    kvqtool ppl MODEL --task choices --dataset choices.jsonl

Same text, numbers and seed, same file.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from kvqtool.data import load_text
from kvqtool.files import atomic_output, check_output


def main() -> None:
    """Cut, draw and write."""
    options = _options()
    check_output(options.output, options.force)
    words = re.findall(r"\s*\S+", load_text(options.dataset, part="evaluation").text)
    asked, said = options.question_words, options.choice_words
    starts = range(0, len(words) - asked - said + 1, asked + said)
    if len(starts) < max(options.questions, options.choices):
        raise SystemExit(f"error: {len(words)} words make {len(starts)} questions; ask for fewer")
    draw = random.Random(options.seed)
    chosen = sorted(draw.sample(starts, options.questions))
    lines = []
    for start in chosen:
        others = draw.sample([s for s in starts if s != start], options.choices - 1)
        endings = ["".join(words[s + asked : s + asked + said]) for s in (start, *others)]
        order = draw.sample(range(options.choices), options.choices)
        question = {
            "question": "".join(words[start : start + asked]).lstrip(),
            "choices": [endings[i] for i in order],
            "answer": order.index(0),
        }
        lines.append(json.dumps(question, ensure_ascii=False))
    with atomic_output(options.output, force=options.force) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", help="held-out text; the built-in one by default")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--question-words", type=int, default=96)
    parser.add_argument("--choice-words", type=int, default=12)
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--force", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
