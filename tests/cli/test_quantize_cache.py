"""quantize-cache: a document's cache on disk, its path on stdout."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
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


@pytest.mark.parametrize("spec", ["fp", "int4-g64", "int3-pertoken-1%-sink2", "nf4-pertoken-r5"])
def test_the_plan_is_the_allocated_size(run: Run, tmp_path: Path, spec: str) -> None:
    arguments = ("--spec", spec, "--text", "-", "-o", tmp_path / "doc", "--json", "-q")
    done = run("quantize-cache", "builtin", *arguments, stdin=TEXT * 4)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)["result"]
    same = ("--spec", spec, "--context", report["tokens"], "--dtype", "float32")
    (row,) = json.loads(run("memory-plan", "builtin", *same, "--json").stdout)["result"]["rows"]
    for key in ("cache_bytes", "cache_bytes_fp16", "paper_bytes", "effective_bits"):
        assert row[key] == report[key], key
    assert row["cache_bytes"] == row["cache_bytes_bound"]


def test_the_plan_of_calibrated_keys_is_bounded(run: Run, bundle: Path, tmp_path: Path) -> None:
    arguments = ("--bundle", bundle, "--text", "-", "-o", tmp_path / "doc", "--json", "-q")
    report = json.loads(run("quantize-cache", "builtin", *arguments, stdin=TEXT).stdout)["result"]
    same = ("--spec", report["spec"], "--context", report["tokens"], "--dtype", "float32")
    (row,) = json.loads(run("memory-plan", "builtin", *same, "--json").stdout)["result"]["rows"]
    assert report["cache_bytes"] <= row["cache_bytes_bound"]
    assert report["cache_bytes"] == pytest.approx(row["cache_bytes"], rel=0.2)


def test_given_states_are_packed_and_wrong_ones_refused(run: Run, tmp_path: Path) -> None:
    states, output = tmp_path / "states.safetensors", tmp_path / "out.safetensors"
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.{layer}.{side}" for layer in range(4) for side in ("key", "value")]
    kv = {name: torch.randn(1, 2, 10, 64, generator=generator) for name in names}
    arguments = ("--spec", "int8-g64", "--kv-states", states, "-o", output, "-q")
    save_file(kv, states)
    done = run("quantize-cache", "builtin", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["result"]["tokens"] == 10
    output.unlink()
    save_file({name: kv[name] for name in names[1:]}, states)
    done = run("quantize-cache", "builtin", *arguments)
    assert done.exit_code == 2
    assert "layers.0.key" in done.stderr
    assert not output.exists()


def test_the_document_is_named_exactly_once(run: Run, tmp_path: Path) -> None:
    states = ("--kv-states", tmp_path / "kv")
    for arguments in ((), ("--text", "-", *states), (*states, "--prefill-chunk", 8)):
        done = run("quantize-cache", "builtin", *arguments, "-o", tmp_path / "doc")
        assert done.exit_code == 2
        assert "--text FILE" in done.stderr
        assert done.stderr.count("\n") == 1
