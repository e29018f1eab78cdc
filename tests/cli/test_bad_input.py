"""Bad input: one line on stderr, the right exit code, no traceback, no partial file."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

Run = Callable[..., Result]
SMALL = ("--seq-len", 64, "--windows", 1)


def assert_refused(done: Result, says: str, code: int = 2) -> None:
    """Check that a quiet command said one error line and nothing else."""
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr


def rewrite(bundle: Path, target: Path, **fields: str) -> Path:
    """Copy a bundle with some of its metadata replaced."""
    data = bundle.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= fields
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return target


def flipped(bundle: Path, target: Path, at: int) -> Path:
    """Copy a bundle with one bit turned."""
    data = bytearray(bundle.read_bytes())
    data[at] ^= 1
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "no/such/model"])
def test_a_missing_model(run: Run, tmp_path: Path, name: str) -> None:
    done = run("calibrate", name, "-o", tmp_path / "b", "-q")
    assert_refused(done, "does not exist")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_bundle(run: Run) -> None:
    done = run("ppl", "builtin", "--bundle", "nowhere.safetensors", "-q")
    assert_refused(done, "kvqtool calibrate")


def test_a_bundle_of_another_model(run: Run, tmp_path: Path, bundle: Path) -> None:
    said = json.loads(metadata_of(bundle)["metadata"])
    said["model"] |= {"name": "other", "architecture": "OtherForCausalLM"}
    from kvqtool.bundle import load_bundle, save_bundle

    mine = load_bundle(bundle)
    other = tmp_path / "other.safetensors"
    save_bundle(replace(mine, model=said["model"]), other)
    done = run("ppl", "builtin", "--bundle", other, *SMALL, "-q")
    assert_refused(done, "OtherForCausalLM")
    assert "LlamaForCausalLM" in done.stderr


def metadata_of(bundle: Path) -> dict[str, Any]:
    """Return the raw metadata of a bundle."""
    data = bundle.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    said: dict[str, Any] = json.loads(data[8 : 8 + length])["__metadata__"]
    return said


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_bundle(run: Run, tmp_path: Path, bundle: Path, keep: int) -> None:
    short = tmp_path / "short.safetensors"
    short.write_bytes(bundle.read_bytes()[:keep])
    assert_refused(run("ppl", "builtin", "--bundle", short, *SMALL, "-q"), "damaged")


@pytest.mark.parametrize("where", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_bit_flipped_bundle(run: Run, tmp_path: Path, bundle: Path, where: float) -> None:
    at = int(where * bundle.stat().st_size)
    broken = flipped(bundle, tmp_path / "flipped.safetensors", at)
    done = run("ppl", "builtin", "--bundle", broken, *SMALL, "-q")
    assert_refused(done, str(broken))


@pytest.mark.parametrize("version", ["99", "0", "two"])
def test_an_unknown_or_future_bundle_version(
    run: Run, tmp_path: Path, bundle: Path, version: str
) -> None:
    newer = rewrite(bundle, tmp_path / "newer.safetensors", version=version)
    done = run("ppl", "builtin", "--bundle", newer, *SMALL, "-q")
    assert_refused(done, f"version {version}")
    assert "reads version 1" in done.stderr


def test_another_kind_of_file(run: Run, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    assert_refused(run("ppl", "builtin", "--bundle", other, *SMALL, "-q"), "not a kvqtool-bundle")
    done = run("generate", "builtin", "--cache", other, "-q")
    assert_refused(done, str(other))


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_empty_text(run: Run, tmp_path: Path, text: str) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(text)
    output = tmp_path / "out"
    assert_refused(run("calibrate", "builtin", "--dataset", empty, "-o", output, "-q"), "no text")
    done = run("quantize-cache", "builtin", "--spec", "fp", "--text", empty, "-o", output, "-q")
    assert_refused(done, "no text")
    assert_refused(run("ppl", "builtin", "--spec", "fp", "--dataset", empty, "-q"), "no text")
    assert not output.exists()


def test_a_text_shorter_than_a_window(run: Run, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    arguments = ("--dataset", short, "--seq-len", 64, "-q")
    done = run("calibrate", "builtin", *arguments, "-o", tmp_path / "b")
    assert_refused(done, "a window needs 64")
    assert "--seq-len" in done.stderr
    assert_refused(run("ppl", "builtin", "--spec", "fp", *arguments), "a window needs 64")


def test_states_that_are_not_finite(run: Run, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from kvqtool.models import builtin_folder

    broken = tmp_path / "broken"
    shutil.copytree(builtin_folder(), broken)
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.self_attn.v_proj.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "b.safetensors"
    small = ("--samples", 1, "--seq-len", 64)
    assert_refused(run("calibrate", broken, *small, "-o", output, "-q"), "", code=3)
    done = run("ppl", broken, "--spec", "int4-g64", *SMALL, "-q")
    assert_refused(done, "", code=3)
    assert not output.exists()


def test_an_existing_output_is_kept_without_force(run: Run, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    for command in (
        ("calibrate", "builtin", "-o", kept),
        ("quantize-cache", "builtin", "--spec", "fp", "--text", "-", "-o", kept),
        ("ppl", "builtin", "--spec", "fp", "-o", kept),
        ("memory-plan", "builtin", "-o", kept),
    ):
        assert_refused(run(*command, "-q"), "--force")
    assert kept.read_text() == "mine"
    small = ("--samples", 1, "--seq-len", 32)
    done = run("calibrate", "builtin", "--spec", "int4", *small, "-o", kept, "--force", "-q")
    assert done.exit_code == 0
    assert kept.read_bytes() != b"mine"


def test_an_unwritable_output(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target, says in (
        (tmp_path / "missing" / "b", "mkdir -p"),
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "b", "is a file"),
        ("/dev/null", "not a regular file"),
    ):
        assert_refused(run("calibrate", "builtin", "-o", target, "-q", "--force"), says)


def test_outputs_are_checked_before_anything_heavy_loads(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from kvqtool.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "calibrate", "builtin", "-o", "missing/b"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout == "2 False\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu"])
def test_a_device_that_is_not_there(run: Run, tmp_path: Path, device: str) -> None:
    done = run("calibrate", "builtin", "--device", device, "-o", tmp_path / "b", "-q")
    assert_refused(done, f"device '{device}'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--spec", "nuq3", "--bundle", "b"), "drop --spec"),
        (("--calibration-dataset", "x", "--bundle", "b"), "drop --calibration-dataset"),
        (("--spec", "nuq7"), "unknown method nuq7"),
        (("--spec", "nuq3-5"), "'5' is not a modifier"),
        (("--spec", "fp", "--dataset", "nowhere.txt"), "no such file"),
    ],
)
def test_options_that_cannot_be(run: Run, arguments: tuple[str, ...], says: str) -> None:
    assert_refused(run("ppl", "builtin", *arguments, "-q"), says)
