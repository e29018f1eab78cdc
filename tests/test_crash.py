"""Commands killed at random moments leave the old file or the new one; see tests/crash.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def crash(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "tests/crash.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_few_kills_tear_no_file() -> None:
    assert "10 kills, no torn file" in crash("--kills", "10", "--processes", "0")


@pytest.mark.slow
def test_killed_processes_tear_no_file() -> None:
    assert "28 kills, no torn file" in crash("--kills", "28", "--processes", "8", "--seed", "1")
