"""What a command says and where: the result on stdout in one of three forms, all else on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

from kvqtool import __version__
from kvqtool.files import atomic_output
from kvqtool.progress import Progress, silent


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Args:
        columns: names, the TSV's header; none for bare lines such as a path.
        rows: values in the order of the columns.
        on_terminal: the columns that a terminal has room for; all of them if empty.
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    on_terminal: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """One command's voice.

    Args:
        command: its name, as in the JSON object.
        json: print one JSON object instead of a table.
        quiet: say nothing on stderr but errors.
        path: a file that gets the result too, in the form that a pipe gets.
        force: whether that file may be replaced.
    """

    command: str
    json: bool = False
    quiet: bool = False
    path: Path | None = None
    force: bool = False

    def note(self, text: str) -> None:
        """Say something in passing, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def note_table(self, table: Table) -> None:
        """Say rows in passing, on stderr: a table on a terminal, TSV off it."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            _draw(table, on_stderr=True)
        else:
            self.note(to_tsv(table).rstrip("\n"))

    def result(self, *, spec: str | None, model: str | None, result: Any, table: Table) -> None:
        """Print the result: JSON if asked, a table on a terminal, TSV in a pipe.

        Args:
            spec: the spec string the result belongs to; None when it holds several.
            model: the model as the user named it; None where there is none.
            result: a dataclass or mapping of plain values: `result` in the JSON object.
            table: the same for people and TSV; one without columns prints its cells alone.
        """
        shared = {"command": self.command, "version": __version__, "spec": spec, "model": model}
        text = to_json(shared | {"result": result}) if self.json else to_tsv(table)
        if self.path is not None:
            with atomic_output(self.path, force=self.force) as part:
                part.write_text(text, encoding="utf-8")
        if not self.json and table.columns and sys.stdout.isatty():
            _draw(table)
        else:
            sys.stdout.write(text)
            sys.stdout.flush()

    def text(self, piece: str) -> None:
        """Stream a piece of generated text to stdout; with `--json` it waits for the object."""
        if not self.json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def end_text(self, *, spec: str, model: str, result: Any) -> None:
        """End a streamed text with a newline, or print the JSON object that was asked for."""
        if self.json:
            self.result(spec=spec, model=model, result=result, table=Table((), []))
        else:
            self.text("\n")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Yield a listener: bars on a terminal, lines at start and end off it, none with `-q`."""
        if self.quiet:
            yield silent
        elif sys.stderr.isatty():
            with _bars() as listener:
                yield listener
        else:
            yield _lines(self)


def say_error(text: str) -> None:
    """Print the one line of an error, whatever line breaks its parts brought along."""
    is_coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    word = "\x1b[31merror:\x1b[0m" if is_coloured else "error:"
    print(word, " ".join(text.split()), file=sys.stderr, flush=True)


def to_json(value: Mapping[str, Any]) -> str:
    """Return one JSON object and a newline; non-finite numbers become null."""
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False) + "\n"


def to_tsv(table: Table) -> str:
    """Return a header and rows at full precision; None is an empty cell, a tab a space."""
    rows = [table.columns, *table.rows] if table.columns else table.rows
    return "".join("\t".join(map(_cell, row)) + "\n" for row in rows)


def values_table(result: Any) -> Table:
    """Return a result's values as rows of name and value; nested ones as `protocol.seq_len`."""
    return Table(("name", "value"), list(_leaves(asdict(result))))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        elif not isinstance(value, (list, tuple)):
            yield prefix + name, value


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(str(value).splitlines()).replace("\t", " ")


def _draw(table: Table, *, on_stderr: bool = False) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    drawn = RichTable(
        box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False
    )
    shown = [table.columns.index(name) for name in table.on_terminal or table.columns]
    for column in shown:
        values = [row[column] for row in table.rows]
        justify: Literal["left", "right"] = "left"
        if all(isinstance(value, (int, float)) for value in values):
            justify = "right"
        drawn.add_column(table.columns[column].replace("_", "\n"), justify=justify)
    for row in table.rows:
        drawn.add_row(*(_short(row[column]) for column in shown))
    console = Console(stderr=on_stderr)
    # Too narrow a terminal wraps lines itself; Rich would break or cut numbers.
    console.width = max(console.width, Console(width=10_000).measure(drawn).maximum)
    console.print(drawn)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _cell(value)


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def listen(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total, visible=done < total)

        yield listen


def _lines(out: Output) -> Progress:
    started: dict[str, float] = {}

    def listen(phase: str, done: int, total: int) -> None:
        if phase not in started:
            started[phase] = time.monotonic()
            out.note(f"{phase}: started, {total} steps")
        if done == total:
            out.note(f"{phase}: done in {time.monotonic() - started.pop(phase):.1f} s")

    return listen
