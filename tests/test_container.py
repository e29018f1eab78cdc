"""Files that say what they are: whole, or refused in one line."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvqtool.container import load_container, save_container
from kvqtool.errors import BundleError, InputError

KIND = "kvqtool-thing"
TENSORS = {
    "b": torch.tensor([1.5, -2.0]).half(),
    "a": torch.tensor([[1, 2, 3]], dtype=torch.int32),
    "empty": torch.empty(0, 4),
}
METADATA: dict[str, Any] = {"name": "thing", "parts": [1, 2], "unit": "µ"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a small file of the kind."""
    save_container(tmp_path / "thing", KIND, 3, (METADATA, TENSORS))
    return tmp_path / "thing"


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items()
    )


def test_what_is_written_is_read(path: Path) -> None:
    metadata, tensors = load_container(path, KIND, 3)
    assert metadata == METADATA
    assert same(tensors, TENSORS)


def test_any_safetensors_reader_reads_it(path: Path) -> None:
    assert same(load_file(path), TENSORS)


def test_equal_content_makes_equal_bytes(path: Path, tmp_path: Path) -> None:
    backwards = dict(reversed(TENSORS.items())), dict(reversed(METADATA.items()))
    save_container(tmp_path / "again", KIND, 3, (backwards[1], backwards[0]))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_strided_tensors_are_written_as_they_read(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    save_container(tmp_path / "t", KIND, 3, ({}, {"t": tensor}))
    assert torch.equal(load_container(tmp_path / "t", KIND, 3)[1]["t"], tensor)


def test_every_flipped_bit_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    accepted = []
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            metadata, tensors = load_container(path, KIND, 3)
        except BundleError:
            continue
        # Nothing else may escape, and what is read in spite of a flip must be what was written.
        if metadata != METADATA or not same(tensors, TENSORS):
            accepted.append(divmod(bit, 8))
    assert accepted == []


def test_every_truncation_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError, match=r"thing .* is damaged .*make it again"):
            load_container(path, KIND, 3)


def test_bytes_behind_the_end_are_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="damaged"):
        load_container(path, KIND, 3)


def test_a_future_version_is_refused_with_both_numbers(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"format version 3, this kvqtool reads version 2; make"):
        load_container(path, KIND, 2)


def test_another_kind_is_refused_by_name(path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a kvqtool-other file \(found: kvqtool-thing\)"):
        load_container(path, "kvqtool-other", 3)


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(BundleError, match="no kvqtool format"):
        load_container(tmp_path / "model.safetensors", KIND, 3)


@pytest.mark.parametrize("content", (b"", b"hello", b"\xff" * 64, struct.pack("<Q", 2**62) + b"{}"))
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(BundleError, match="damaged"):
        load_container(tmp_path / "x", KIND, 3)


@pytest.mark.parametrize("missing", ("sha256", "metadata", "version"))
def test_a_header_that_lacks_a_field_is_refused(path: Path, missing: str) -> None:
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    del header["__metadata__"][missing]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    with pytest.raises(BundleError):
        load_container(path, KIND, 3)


@pytest.mark.parametrize("name", ("nothing", "."))
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="does not exist; check the path"):
        load_container(tmp_path / name, KIND, 3)


def test_an_existing_file_stays(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError):
        save_container(path, KIND, 3, ({}, {}))
    assert path.read_bytes() == before


def test_force_replaces_it(path: Path) -> None:
    save_container(path, KIND, 3, ({"new": 1}, {}), force=True)
    assert load_container(path, KIND, 3) == ({"new": 1}, {})
