"""Two ways to run the tool: in this process, which is quick, and as a user would."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvqtool.cli import app

ROOT = Path(__file__).parents[2]
Run = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Return what a subprocess needs to find this checkout and nothing on the network."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command in this process."""

    def call(*arguments: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return call


@pytest.fixture
def shell(tmp_path: Path, environment: dict[str, str]) -> Shell:
    """Run a command in its own process, in an empty folder."""

    def call(*arguments: object, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "kvqtool", *map(str, arguments)]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    return call


@pytest.fixture(scope="session")
def bundle(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the built-in model, calibrated on next to nothing."""
    path = tmp_path_factory.mktemp("bundle") / "nuq3.safetensors"
    done = run("calibrate", "builtin", "--samples", 2, "--seq-len", 64, "-o", path)
    assert done.exit_code == 0, done.output
    return path
