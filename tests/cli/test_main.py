"""The program as a whole: help, version, and how failures end."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from kvqtool import __version__
from kvqtool.cli import COMMANDS, failures
from kvqtool.cli.failures import Command
from kvqtool.errors import BundleError, InputError, RunError, SpecError

Run = Callable[..., Result]


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


def end_of(failure: BaseException, *arguments: str) -> Result:
    """Run a command whose body raises."""
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command(cls=Command)
    def fail(model: str = "builtin", debug: bool = False) -> None:
        raise failure

    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (SpecError("spec is wrong; fix it"), 2, "error: spec is wrong; fix it\n"),
        (InputError("two\n lines"), 2, "error: two lines\n"),
        (BundleError("damaged"), 2, "error: damaged\n"),
        (RunError("NaN in layer 3"), 3, "error: NaN in layer 3\n"),
        (OSError(28, "No space left on device"), 3, "error: no room left on the disk"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (MemoryError(), 3, "Plan it with: kvqtool memory-plan builtin"),
        (OutOfMemoryError("CUDA out of memory.\nTried"), 3, "error: out of memory: CUDA out of"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "error: out of memory"),
    ],
)
def test_known_failures_end_in_one_line(failure: BaseException, code: int, says: str) -> None:
    done = end_of(failure)
    assert done.exit_code == code
    assert done.stdout == ""
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_debug_adds_the_traceback_to_the_line() -> None:
    done = end_of(InputError("wrong"), "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("error: wrong\n")


def test_a_bug_keeps_its_traceback_and_is_no_gate() -> None:
    done = end_of(ZeroDivisionError("1/0"))
    assert done.exit_code == 3
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: 1/0" in done.stderr
    assert "bug in kvqtool" in done.stderr


def test_a_deliberate_exit_passes_through() -> None:
    assert end_of(typer.Exit(1)).exit_code == 1


def test_help_names_every_command(run: Run) -> None:
    done = run("--help")
    assert done.exit_code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"kvqtool {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("ppl",), ("ppl", "builtin", "--bits", "3"), ("calibrate", "b")]
)
def test_a_wrong_command_line_is_code_2_on_stderr(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Error" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_sentence_and_two_examples(run: Run, command: str) -> None:
    text = run(command, "--help").stdout
    assert text.count("kvqtool " + command) >= 3  # usage and two examples
    assert "Examples:" in text


@pytest.mark.parametrize("arguments", [("--help",), ("memory-plan", "builtin", "-q")])
def test_help_and_planning_load_nothing_heavy(
    tmp_path: Path, environment: dict[str, str], arguments: tuple[str, ...]
) -> None:
    code = (
        "import sys; from kvqtool.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'cupy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_quiet(tmp_path: Path, environment: dict[str, str]) -> None:
    script = f"{sys.executable} -m kvqtool memory-plan builtin -q | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", str(failures.CLOSED_PIPE_EXIT))


def test_the_module_runs_as_a_program(shell: Callable[..., Any]) -> None:
    done = shell("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kvqtool {__version__}\n", "")


def test_colour_codes_never_reach_a_pipe(tmp_path: Path, environment: dict[str, str]) -> None:
    forced: dict[str, Any] = {**environment, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "kvqtool", "memory-plan", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, env=forced, cwd=tmp_path)
    assert done.returncode == 2
    assert "\x1b" not in done.stderr + done.stdout
