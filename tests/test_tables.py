"""Columns of texts: JSON, parquet and hub data sets."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kvqtool.data import load_text
from kvqtool.errors import InputError


def read(path: Path, column: str = "text") -> str:
    return load_text(str(path), part="calibration", text_column=column).text


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pa = pytest.importorskip("pyarrow", reason="pyarrow comes with datasets")
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_lines_are_joined_by_empty_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text('{"text": "one\\ntwo"}\n\n{"text": "\\u2028three", "n": 1}\n', encoding="utf-8")
    assert read(path) == "one\ntwo\n\n\u2028three"


def test_a_json_array_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"body": "a"}, {"body": "b"}], indent=1))
    assert read(path, "body") == "a\n\nb"


def test_parquet_column_is_joined_by_empty_lines(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", text=["a", "b"], n=[1, 2])
    assert read(path) == "a\n\nb"


def test_a_missing_column_is_named_with_those_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"title": "a", "body": "b"}')
    message = r"no column 'text', its columns: title, body; name one with --text-column"
    with pytest.raises(InputError, match=message):
        read(path)
    with pytest.raises(InputError, match=message):
        read(write_parquet(tmp_path / "rows.parquet", title=["a"], body=["b"]))


@pytest.mark.parametrize("value", [None, 3, ["a"]])
def test_a_row_that_is_no_text_is_named(tmp_path: Path, value: object) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": value}))
    with pytest.raises(InputError, match=rf"row 2 of column 'text' is {type(value).__name__}"):
        read(path)


@pytest.mark.parametrize(
    ("content", "line"), [('{"text": "a"}\n{"text": ', 2), ('[\n{"text": "a"},\n}', 3)]
)
def test_broken_json_is_named_by_line(tmp_path: Path, content: str, line: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"not JSON at line {line}: .*; repair"):
        read(path)


def test_json_that_is_no_object_has_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('"text"')
    with pytest.raises(InputError, match=r"its columns: none"):
        read(path)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ab\\ud800"}')
    with pytest.raises(InputError, match=r"not valid Unicode at character 2"):
        read(path)


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow comes with datasets")
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(InputError, match=r"not a readable parquet file; write it again"):
        read(path)


@pytest.mark.parametrize(
    ("module", "name", "remedy"),
    [
        ("pyarrow", "{folder}/rows.parquet", "pip install pyarrow"),
        ("datasets", "me/set", "pip install datasets"),
    ],
)
def test_an_absent_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, remedy: str
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=remedy):
        load_text(name.format(folder=tmp_path), part="calibration")


class FakeDatasets(types.ModuleType):
    """Stand in for `datasets`: one data set of two rows, or a failure."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("datasets")
        self.failure = failure
        self.asked: tuple[object, ...] = ()
        self.bars = True

    def is_progress_bar_enabled(self) -> bool:
        return self.bars

    def disable_progress_bars(self) -> None:
        self.bars = False

    def enable_progress_bars(self) -> None:
        self.bars = True

    def load_dataset(self, path: str, config: str | None, *, split: str) -> "FakeTable":
        assert not self.bars
        self.asked = (path, config, split)
        if self.failure is not None:
            raise self.failure
        return FakeTable()


class FakeTable:
    column_names = ("text", "title")

    def __getitem__(self, column: str) -> list[str]:
        return {"text": ["a", "b"], "title": ["c", "d"]}[column]


def test_a_hub_data_set_is_joined_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDatasets()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    text = load_text("me/set:raw@validation", part="evaluation", text_column="title")
    assert text.text == "c\n\nd"
    assert fake.asked == ("me/set", "raw", "validation")
    assert fake.bars


@pytest.mark.parametrize("kind", [ConnectionError, FileNotFoundError, ValueError, ImportError])
def test_a_hub_failure_is_one_line_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    fake = FakeDatasets(kind("Couldn't reach it.\nMany more lines"))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(InputError, match=r"split 'test' cannot be loaded: Couldn't reach") as info:
        load_text("me/set", part="evaluation")
    assert "\n" not in str(info.value)
    assert "name a local file" in str(info.value)
    assert fake.bars


def test_the_hub_is_refused_at_once_offline() -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    with pytest.raises(InputError, match=r"'nobody/nothing' split 'test' cannot be loaded"):
        load_text("nobody/nothing", part="evaluation")
