"""Read the texts of a table: a column of a JSON or parquet file, or of a hub data set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from kvqtool.errors import InputError

PARAGRAPH: Final = "\n\n"  # between the rows of a table, as papers join WikiText
TABLE_SUFFIXES: Final = (".json", ".jsonl", ".parquet")


def read_utf8(data: bytes, name: str) -> str:
    """Decode bytes that ought to be UTF-8; newlines stay as they are.

    Raises:
        InputError: naming the first byte that is not.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data set {name!r} is not UTF-8 at byte {error.start}; convert it first"
        ) from error


def read_table(path: Path, name: str, column: str) -> str:
    """Return a file's column of texts, joined by empty lines.

    Args:
        path: a `.parquet` file, or a `.json` or `.jsonl` one with an object a line or one array.
        name: the file as the user named it.
        column: the column that holds the texts.

    Raises:
        InputError: when the file is damaged, the column is absent, or a row is not a text.
        OSError: when the file cannot be read.
    """
    rows = _parquet_rows if path.suffix == ".parquet" else _json_rows
    return _join(rows(path, name, column), name, column)


def read_hub(path: str, config: str | None, split: str, column: str) -> str:
    """Return a hub data set's texts, joined by empty lines.

    The only place that imports `datasets`, and with model loading the only one to use the network.

    Raises:
        InputError: when the data set cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"hub data set {path!r} needs datasets; install it: pip install datasets"
        ) from error
    had_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"hub data set {path!r} split {split!r} cannot be loaded: {reason}; "
            "check name, config, split and network, or name a local file"
        ) from error
    finally:
        if had_bars:
            datasets.enable_progress_bars()
    _check_column(path, column, table.column_names)
    return _join(table[column][:], path, column)


def _json_rows(path: Path, name: str, column: str) -> list[Any]:
    content = read_utf8(path.read_bytes(), name)
    if content.lstrip().startswith("["):
        documents = [(1, content)]
    else:
        lines = enumerate(content.split("\n"), start=1)
        documents = [(number, line) for number, line in lines if line.strip()]
    rows: list[Any] = []
    for number, document in documents:
        try:
            parsed = json.loads(document)
        except json.JSONDecodeError as error:
            line = number + error.lineno - 1
            raise InputError(
                f"data set {name!r} is not JSON at line {line}: {error.msg}; repair that line"
            ) from error
        rows += parsed if isinstance(parsed, list) else [parsed]
    for row in rows:
        _check_column(name, column, row if isinstance(row, dict) else ())
    return [row[column] for row in rows]


def _parquet_rows(path: Path, name: str, column: str) -> Sequence[Any]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"data set {name!r} needs pyarrow; install it: pip install pyarrow"
        ) from error
    try:
        columns = parquet.read_schema(path).names
        rows: Sequence[Any] = (
            parquet.read_table(path, columns=[column])[column].to_pylist()
            if column in columns
            else ()
        )
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise InputError(
            f"data set {name!r} is not a readable parquet file; write it again"
        ) from error
    _check_column(name, column, columns)
    return rows


def _check_column(name: str, column: str, columns: Iterable[str]) -> None:
    found = tuple(columns)
    if column not in found:
        listed = ", ".join(found) or "none"
        raise InputError(
            f"data set {name!r} has no column {column!r}, its columns: {listed}; "
            "name one with --text-column"
        )


def _join(rows: Sequence[Any], name: str, column: str) -> str:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, str):
            raise InputError(
                f"data set {name!r}: row {number} of column {column!r} is "
                f"{type(row).__name__}, not text; name another with --text-column"
            )
    return PARAGRAPH.join(rows)
