"""Mutated files: refused in one line or read right; see tests/fuzz.py for what is mutated how."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

ROOT = Path(__file__).parents[1]


def test_a_few_hundred_mutations_are_refused_or_read_right() -> None:
    outcome = fuzz.run(300, seed=0)
    assert outcome.failures == []
    assert outcome.refused > 100
    assert outcome.read > 10


def test_the_fuzzer_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that believe what they read fail it."""
    monkeypatch.setattr("kvqtool.restore._outliers_fit", lambda *_: True)
    monkeypatch.setattr("kvqtool.restore._LARGEST", float("inf"))
    assert len(fuzz.run(200, seed=0).failures) > 2


@pytest.mark.slow
def test_two_thousand_mutations() -> None:
    command = [sys.executable, "tests/fuzz.py", "--count", "2000", "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
