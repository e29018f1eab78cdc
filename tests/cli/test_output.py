"""One result, three forms; stdout holds nothing else."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvqtool import __version__
from kvqtool.cli.output import Output, Table, say_error, to_json, to_tsv, values_table
from kvqtool.errors import InputError


@dataclass
class Sample:
    """A result like the workflows return."""

    ppl: float
    spec: str
    protocol: dict[str, object]
    layers: list[dict[str, int]]


SAMPLE = Sample(1 / 3, "fp", {"seq_len": 5, "kernel": "torch"}, [{"layer": 0}])
TABLE = Table(("spec", "ratio"), [("fp", 1 / 3), ("a\tb\nc", None)])


class Terminal:
    """A stream that says it is a terminal and remembers what it was told."""

    def __init__(self) -> None:
        self.said = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.said += text
        return len(text)

    def flush(self) -> None:
        pass


def test_tsv_has_a_header_full_precision_and_no_stray_tabs() -> None:
    assert to_tsv(TABLE) == f"spec\tratio\nfp\t{1 / 3!r}\na b c\t\n"
    assert to_tsv(Table((), [("out.safetensors",)])) == "out.safetensors\n"


def test_json_is_one_line_and_non_finite_numbers_are_null() -> None:
    text = to_json({"a": [math.nan, math.inf, -math.inf, 0.1], "b": {"path": Path("x")}})
    assert text.count("\n") == 1
    assert json.loads(text) == {"a": [None, None, None, 0.1], "b": {"path": "x"}}


def test_json_object_has_the_documented_top_level(capsys: pytest.CaptureFixture[str]) -> None:
    Output("ppl", json=True).result(spec="fp", model="m", result=SAMPLE, table=TABLE)
    said = json.loads(capsys.readouterr().out)
    assert list(said) == ["command", "version", "spec", "model", "result"]
    assert said["version"] == __version__
    assert said["result"] == {
        "ppl": 1 / 3,
        "spec": "fp",
        "protocol": {"seq_len": 5, "kernel": "torch"},
        "layers": [{"layer": 0}],
    }


def test_values_become_rows_and_lists_stay_in_json() -> None:
    assert list(values_table(SAMPLE).rows) == [
        ("ppl", 1 / 3),
        ("spec", "fp"),
        ("protocol.seq_len", 5),
        ("protocol.kernel", "torch"),
    ]


def test_the_copy_holds_what_a_pipe_gets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.tsv"
    Output("ppl", path=path).result(spec="fp", model="m", result=SAMPLE, table=TABLE)
    assert path.read_text() == capsys.readouterr().out == to_tsv(TABLE)
    with pytest.raises(InputError, match="--force"):
        Output("ppl", path=path).result(spec="fp", model="m", result=SAMPLE, table=TABLE)


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    table = Table(("spec", "cache_bytes"), [("fp", 1234567)], on_terminal=("cache_bytes",))
    Output("ppl").result(spec="fp", model="m", result=SAMPLE, table=table)
    assert "1,234,567" in screen.said
    assert "cache_bytes" not in screen.said
    assert "spec" not in screen.said
    assert "\t" not in screen.said


def test_rows_said_in_passing_go_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table(("layers", "kind"), [("0-3", "full"), ("4", "stock")])
    Output("ppl").note_table(table)
    Output("ppl", quiet=True).note_table(table)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", to_tsv(table))
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    Output("ppl").note_table(table)
    assert "stock" in screen.said
    assert "\t" not in screen.said


def test_progress_off_a_terminal_is_a_line_at_each_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Output("ppl").progress() as progress:
        for done in range(4):
            progress("scoring", done, 3)
    said = capsys.readouterr()
    assert said.out == ""
    first, last = said.err.splitlines()
    assert first == "scoring: started, 3 steps"
    assert last.startswith("scoring: done in ")


def test_quiet_silences_notes_and_progress_but_not_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Output("ppl", quiet=True)
    out.note("by the way")
    with out.progress() as progress:
        progress("scoring", 3, 3)
    say_error("two\nlines  here")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: two lines here\n")


@pytest.mark.parametrize(("no_color", "is_plain"), [("", False), ("1", True)])
def test_only_the_word_error_is_coloured(
    monkeypatch: pytest.MonkeyPatch, no_color: str, is_plain: bool
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("NO_COLOR", no_color)
    say_error("it is wrong")
    word = "error:" if is_plain else "\x1b[31merror:\x1b[0m"
    assert screen.said == f"{word} it is wrong\n"


def test_a_narrow_terminal_never_breaks_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "20")
    names = ("spec", *(f"cache_{i}_bytes" for i in range(9)))
    table = Table(names, [("nuq4-1%-sink1-r128", *(123456789012 + i for i in range(9)))])
    Output("ppl").result(spec="fp", model="m", result=SAMPLE, table=table)
    assert "nuq4-1%-sink1-r128" in screen.said
    for i in range(9):
        assert f"{123456789012 + i:,}" in screen.said


def test_bars_are_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Output("ppl").progress() as progress:
        progress("scoring", 0, 2)
        progress("scoring", 2, 2)
    assert "scoring" in screen.said
    assert "started" not in screen.said
