"""calibrate --resume: a run that was killed goes on to the same bytes, or says why it cannot."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]
OUT = "b.safetensors"
PARTIAL = f"{OUT}.partial.safetensors"
# Statistics are written every 32 windows: once in either pass, before its end.
ARGUMENTS = ("calibrate", "builtin", "--samples", "40", "--seq-len", "32", "--spec", "nuq2-1%")


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bundle of a run that nobody stopped."""
    path = tmp_path_factory.mktemp("whole") / OUT
    assert run(*ARGUMENTS, "-o", path).exit_code == 0
    assert [left.name for left in path.parent.iterdir()] == [OUT]
    return path.read_bytes()


@pytest.fixture(scope="module")
def killed(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run leaves that was killed as soon as it had left something."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "kvqtool", *ARGUMENTS, "-o", OUT]
    one_thread = {**environment, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=folder, env=one_thread, stderr=-1, stdout=-1) as running:
        while not (folder / PARTIAL).exists():
            assert running.poll() is None, "the run ended before it left anything"
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL
    assert not (folder / OUT).exists()
    return (folder / PARTIAL).read_bytes()


def test_a_killed_run_goes_on_to_the_same_bytes(
    run: Run, tmp_path: Path, killed: bytes, whole: bytes
) -> None:
    (tmp_path / PARTIAL).write_bytes(killed)
    done = run(*ARGUMENTS, "-o", tmp_path / OUT, "--resume")
    assert done.exit_code == 0, done.output
    assert f"going on from {tmp_path / PARTIAL}" in done.stderr
    assert (tmp_path / OUT).read_bytes() == whole
    assert [left.name for left in tmp_path.iterdir()] == [OUT]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("--seed", 1), "(seed: 0 there, 1 here)"),
        (("--samples", 41), "(samples: 40 there, 41 here)"),
        (("--spec", "nuq3-1%"), "(specs: ['nuq2-1%'] there, ['nuq3-1%'] here)"),
        (("--dtype", "bfloat16"), "(dtype: float32 there, bfloat16 here)"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_statistics_of_another_run_are_refused(
    run: Run, tmp_path: Path, killed: bytes, change: tuple[object, ...], says: str
) -> None:
    (tmp_path / PARTIAL).write_bytes(killed)
    done = run(*ARGUMENTS, *change, "-o", tmp_path / OUT, "--resume")
    assert done.exit_code == 2
    assert f"{says}; repeat that one, or start over without --resume" in done.stderr
    assert done.stderr.count("error:") == 1
    assert (tmp_path / PARTIAL).read_bytes() == killed


def test_damaged_statistics_are_refused(run: Run, tmp_path: Path, killed: bytes) -> None:
    (tmp_path / PARTIAL).write_bytes(killed[:-1] + bytes([killed[-1] ^ 1]))
    done = run(*ARGUMENTS, "-o", tmp_path / OUT, "--resume")
    assert done.exit_code == 2
    assert "is damaged" in done.stderr


def test_statistics_of_more_processes_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / f"{OUT}.partial-0-of-4.safetensors").write_bytes(b"")
    done = run(*ARGUMENTS, "-o", tmp_path / OUT, "--resume")
    assert done.exit_code == 2
    assert "the run that stopped had 4 processes, this one has 1; start as many" in done.stderr


def test_without_resume_they_are_replaced_and_it_is_said(
    run: Run, tmp_path: Path, killed: bytes, whole: bytes
) -> None:
    (tmp_path / PARTIAL).write_bytes(killed)
    done = run(*ARGUMENTS, "-o", tmp_path / OUT)
    assert done.exit_code == 0
    assert f"{tmp_path / PARTIAL} is left by a stopped run and is replaced" in done.stderr
    assert (tmp_path / OUT).read_bytes() == whole
    assert [left.name for left in tmp_path.iterdir()] == [OUT]


def test_resume_with_nothing_to_go_on_from_starts(run: Run, tmp_path: Path) -> None:
    small = ("--samples", 2, "--seq-len", 32)
    done = run("calibrate", "builtin", *small, "-o", tmp_path / OUT, "--resume")
    assert done.exit_code == 0
    assert "nothing to go on from" in done.stderr
