"""quantize-cache: a document's cache on disk, its path on stdout."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]
TEXT = "A list is a mutable sequence. A tuple is an immutable sequence. " * 4


def test_stdout_is_the_path_and_stderr_tells_before_and_after(
    run: Run, bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "doc.safetensors"
    arguments = ("--bundle", bundle, "--text", "-", "-o", path)
    done = run("quantize-cache", "builtin", *arguments, stdin=TEXT)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{path}\n"
    assert "bytes in fp16" in done.stderr
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("prefill", ["exact", "decode-exact"])
def test_json_reports_the_cache(run: Run, tmp_path: Path, prefill: str) -> None:
    document, path = tmp_path / "doc.txt", tmp_path / "doc.safetensors"
    document.write_text(TEXT)
    arguments = ("--spec", "int4-g64", "--text", document, "--prefill", prefill, "-o", path)
    done = run("quantize-cache", "builtin", *arguments, "--json", "-q")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)["result"]
    assert result["path"] == str(path)
    assert result["file_bytes"] == path.stat().st_size
    assert result["prefill"] == prefill
    assert result["compression"] == result["cache_bytes_fp16"] / result["cache_bytes"]


def test_the_document_is_named_exactly_once(run: Run, tmp_path: Path) -> None:
    for arguments in ((), ("--text", "-", "--kv-states", tmp_path / "kv")):
        done = run("quantize-cache", "builtin", *arguments, "-o", tmp_path / "doc")
        assert done.exit_code == 2
        assert "--text FILE" in done.stderr
        assert done.stderr.count("\n") == 1
