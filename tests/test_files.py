"""Outputs appear whole or not at all."""

import errno
import os
import stat
from pathlib import Path

import pytest

from kvqtool.errors import InputError, RunError
from kvqtool.files import atomic_output, check_output, is_disk_full


def test_the_file_appears_complete_and_alone(tmp_path: Path) -> None:
    with atomic_output(tmp_path / "out.bin") as part:
        assert part.parent == tmp_path
        part.write_bytes(b"abc")
        assert not (tmp_path / "out.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"]
    assert (tmp_path / "out.bin").read_bytes() == b"abc"


def test_permissions_are_those_of_a_plain_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic_output(tmp_path / "out") as part:
        part.unlink()
        part.touch(mode=0o600)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


@pytest.mark.parametrize("failure", [ValueError("boom"), KeyboardInterrupt(), SystemExit(3)])
def test_any_exception_leaves_nothing_and_passes_through(
    tmp_path: Path, failure: BaseException
) -> None:
    with pytest.raises(type(failure)), atomic_output(tmp_path / "out") as part:
        part.write_bytes(b"half")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(ValueError, match="boom"), atomic_output(target, force=True) as part:
        part.write_text("new")
        raise ValueError("boom")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_force_replaces_and_its_absence_refuses(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(InputError, match="--force"), atomic_output(target):
        raise AssertionError("the block must not run")
    with atomic_output(target, force=True) as part:
        part.write_text("new")
    assert target.read_text() == "new"


def test_a_file_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(InputError, match="exists"), atomic_output(target) as part:
        part.write_text("mine")
        target.write_text("theirs")
    assert target.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_unusable_targets_are_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a folder; name a file"):
        check_output(tmp_path)
    with pytest.raises(InputError, match="mkdir -p"):
        check_output(tmp_path / "missing" / "out")
    with pytest.raises(InputError, match="is a file; choose"):
        check_output(tmp_path / "file" / "out")
    with pytest.raises(InputError, match="not a regular file"):
        check_output("/dev/null", force=True)
    with pytest.raises(InputError, match="cannot be"), atomic_output(tmp_path / ("n" * 300)):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="not writable"):
        check_output(tmp_path / "out")


def test_a_full_disk_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no room left"), atomic_output(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_real_full_device_is_recognised() -> None:
    with (
        pytest.raises(OSError, match="No space") as caught,
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")
    assert is_disk_full(caught.value)
    assert not is_disk_full(OSError(errno.EACCES, "denied"))
