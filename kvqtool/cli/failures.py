"""How a command ends when it does not end well: one line on stderr and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import typer
from typer.core import TyperCommand

from kvqtool.cli.output import say_error
from kvqtool.errors import KvqError
from kvqtool.files import is_disk_full
from kvqtool.ranks import leave_ranks, read_ranks

GATE_EXIT: Final = 1
RUN_EXIT: Final = 3
INTERRUPT_EXIT: Final = 128 + signal.SIGINT
_TERMINATED: Final = 128 + signal.SIGTERM
_FIRST_SPEAKS_SECONDS: Final = 2.0
CLOSED_PIPE_EXIT: Final = 128 + 13  # SIGPIPE, which Windows does not name


class Command(TyperCommand):
    """A command whose failures end in one line and the documented exit code."""

    def invoke(self, ctx: Any) -> Any:  # a typer.Context; typer types it by a private name
        """Run the body; the command line is parsed already, so what fails here is ours."""
        ranks = read_ranks()
        try:
            with ranks.together():
                value = super().invoke(ctx)
                sys.stdout.flush()
            leave_ranks(ranks)
            return value
        except typer.Exit:
            raise
        except BrokenPipeError:
            _drop_stdout()
            raise typer.Exit(CLOSED_PIPE_EXIT) from None
        except (Exception, KeyboardInterrupt) as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            raise typer.Exit(_report(error, str(ctx.params.get("model")))) from None


@contextmanager
def one_voice() -> Iterator[None]:
    """Let only the first of several processes speak, and be the first to end in a failure.

    torchrun ends all processes as soon as one fails, so the others wait until it has spoken. Each
    of several ends at once, with nothing left to tidy up: threads that torch had for talking to the
    others may not have ended, for which C++ would abort a process that has done all it should.
    """
    try:
        ranks = read_ranks()
    except KvqError as error:
        say_error(str(error))
        raise SystemExit(error.exit_code) from None
    if ranks.is_alone:
        yield
        return
    try:
        if ranks.is_first:
            yield
        else:
            with _silence():
                yield
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code if isinstance(stop.code, int) else bool(stop.code))


@contextmanager
def _silence() -> Iterator[None]:
    """Say nothing; wait before a failure ends the process."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        except SystemExit as stop:
            if stop.code and stop.code != _TERMINATED:
                time.sleep(_FIRST_SPEAKS_SECONDS)
            raise
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def stop_on_terminate() -> None:
    """Turn SIGTERM into an exception, so that half-written files are removed on the way out."""

    def _exit(number: int, frame: FrameType | None) -> None:
        raise SystemExit(_TERMINATED)

    signal.signal(signal.SIGTERM, _exit)


def _report(error: BaseException, model: str) -> int:
    """Print a failure in one line and return its exit code; specific kinds come first."""
    if isinstance(error, KvqError):
        say_error(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        say_error("interrupted; nothing was left half-written")
        return INTERRUPT_EXIT
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        reason = str(error).split("\n")[0] or "the machine's memory is used up"
        say_error(f"out of memory: {reason} Plan it with: kvqtool memory-plan {model}")
        return RUN_EXIT
    if is_disk_full(error):
        say_error(f"no room left on the disk: {error}; free space or choose another folder")
        return RUN_EXIT
    # A bug speaks on any process.
    traceback.print_exception(error, file=sys.stderr if read_ranks().is_first else sys.__stderr__)
    say_error("this is a bug in kvqtool; report it with the lines above")
    return RUN_EXIT


def _is_out_of_memory(error: BaseException) -> bool:
    """Recognise torch's exceptions without importing torch; on a CPU it is a plain RuntimeError."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _drop_stdout() -> None:
    """Let the interpreter flush into nothing: whoever read our output has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
