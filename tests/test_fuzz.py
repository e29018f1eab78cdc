"""Mutated files: refused in one line or read right; see tests/fuzz.py for what is mutated how."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzz
import pytest

from kvqtool.bundle import load_bundle
from kvqtool.errors import BundleError

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


@pytest.mark.parametrize("shape", ([0, 2**63], [2**62, 0, 2**62], [1] * 5000))
def test_shapes_that_torch_cannot_hold_are_refused(tmp_path: Path, shape: list[int]) -> None:
    """Found by seed 2: safetensors lets an empty tensor have any shape, torch raises TypeError."""
    entry: dict[str, Any] = {
        "dtype": "F16",
        "shape": shape,
        "data_offsets": [0, 0 if 0 in shape else 2],
    }
    said = {"format": "kvqtool-bundle", "version": "1", "metadata": "{}", "sha256": ""}
    text = json.dumps({"__metadata__": said, "x": entry}).encode()
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * entry["data_offsets"][1])
    with pytest.raises(BundleError, match="is damaged"):
        load_bundle(path)


@pytest.mark.slow
def test_two_thousand_mutations() -> None:
    command = [sys.executable, "tests/fuzz.py", "--count", "2000", "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
