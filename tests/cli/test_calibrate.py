"""calibrate: a bundle on disk, its path on stdout."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]
SMALL = ("--samples", 2, "--seq-len", 64)


def test_stdout_is_the_path_alone_and_the_bytes_are_the_same_again(
    run: Run, tmp_path: Path, bundle: Path
) -> None:
    path = tmp_path / "again.safetensors"
    done = run("calibrate", "builtin", *SMALL, "-o", path)
    assert done.exit_code == 0
    assert done.stdout == f"{path}\n"
    assert "model builtin on cpu, float32" in done.stderr
    assert "calibrating kvq3 on 2 windows of 64 from builtin:calibration" in done.stderr
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == bundle.read_bytes()


def test_json_says_what_was_written(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    done = run("calibrate", "builtin", *SMALL, "--spec", "int4-1%", "-o", path, "--json", "-q")
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert (said["command"], said["spec"], said["model"]) == ("calibrate", "int4-1%", "builtin")
    assert said["result"]["path"] == str(path)
    assert said["result"]["file_bytes"] == path.stat().st_size > said["result"]["bundle_bytes"] > 0
    assert said["result"]["provenance"]["samples"] == 2


def test_windows_are_capped_to_the_context_and_it_is_said(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("A list is mutable. " * 400)
    arguments = ("--dataset", text, "--samples", 1, "--seq-len", 99999)
    done = run("calibrate", "builtin", *arguments, "-o", tmp_path / "b")
    assert "windows are 4096 tokens, not 99999: the model's context" in done.stderr
    assert done.exit_code == 2  # the text is shorter than even that
    assert "a window needs 4096" in done.stderr


def test_a_spec_without_codebooks_needs_no_text(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    done = run("calibrate", "builtin", "--spec", "int4-g64", "-o", path)
    assert done.exit_code == 0
    assert "calibrating" not in done.stderr
    assert path.is_file()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--spec", "nuq2-1%"), "no budget was asked for, nothing was measured"),
        (("--target-bits", 3.2), "chosen: 3."),
        (("--spec", "nuq2-nofisher"), "calibrated without gradients"),
    ],
)
def test_a_calibration_is_drawn(
    run: Run, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    path = tmp_path / "b.svg"
    done = run("calibrate", "builtin", *SMALL, *options, "-o", tmp_path / "b", "--plot", path)
    assert done.exit_code == 0, done.stderr
    assert f"drew {path}" in done.stderr
    assert says in path.read_text()
    assert {each.name for each in tmp_path.iterdir()} == {"b", "b.svg"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--plot", "b.txt"), "'txt' is no picture; end it in one of:"),
        (("--plot", "b.png", "--spec", "int4"), "int4 has no fitted codebooks to draw; use a nuq"),
        (("--plot", "b.png", "--spec", "qaq-nuq"), "has codebooks of several widths"),
        (("--plot", "none/b.png"), "output folder none is missing"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_work(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    says: str,
) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    monkeypatch.chdir(tmp_path)
    done = run("calibrate", "builtin", "-o", "b", *options)
    assert done.exit_code == 2
    assert says in done.stderr
    assert "sketching" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_picture_needs_matplotlib_and_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("calibrate", "builtin", "-o", tmp_path / "b", "--plot", tmp_path / "b.png")
    assert done.exit_code == 2
    assert done.stderr == (
        "error: --plot needs matplotlib; install it: pip install 'kvqtool[plot]'\n"
    )


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGINT, 130, "error: interrupted"), (signal.SIGTERM, 143, "")],
)
def test_an_interrupt_in_the_middle_leaves_nothing(
    tmp_path: Path, environment: dict[str, str], number: int, code: int, says: str
) -> None:
    command: list[Any] = [sys.executable, "-m", "kvqtool", "calibrate", "builtin", "-o", "b"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=-1,
        stderr=-1,
        # A test run in a shell's background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "started" in line:
                break
        running.send_signal(number)
        out, err = running.communicate(timeout=60)
    assert running.returncode == code
    assert out == ""
    assert "Traceback" not in err
    assert says in err
    assert list(tmp_path.iterdir()) == []
