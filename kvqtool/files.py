"""Write a file whole or not at all: a temporary neighbour, renamed when it is complete."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvqtool.errors import InputError, RunError

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(path: str | Path, force: bool = False) -> None:
    """Refuse an output that could not be written, before the work that would fill it.

    Args:
        path: the file to be written.
        force: whether an existing file may be replaced.

    Raises:
        InputError: when the folder is missing or read-only, the path is a folder or a device, or
            the file exists.
    """
    target = Path(path)
    folder = target.parent
    try:
        if target.is_dir():
            raise InputError(f"output {target} is a folder; name a file in it")
        if target.exists() and not target.is_file():
            raise InputError(f"output {target} is not a regular file; name one")
        if target.exists() and not force:
            raise InputError(f"output {target} exists; replace it with --force or name another")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"output folder {folder} is a file; choose another path")
        if not folder.is_dir():
            raise InputError(f"output folder {folder} is missing; create it: mkdir -p {folder}")
    except OSError as error:
        raise _unusable(target, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"output folder {folder} is not writable; choose another one")


@contextmanager
def atomic_output(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it on success, remove it on any exception.

    Args:
        path: the file that appears, complete, when the block ends.
        force: whether an existing file may be replaced.

    Raises:
        InputError: when `path` cannot be written.
        RunError: when the disk is full.

    Example:
        with atomic_output("cache.safetensors") as part:
            part.write_bytes(data)
    """
    target = Path(path)
    check_output(target, force)
    part = _reserve(target)
    mode = stat.S_IMODE(part.stat().st_mode)
    try:
        yield part
        part.chmod(mode)  # safetensors puts its own file here, readable by its owner alone
        _flush_to_disk(part)
        check_output(target, force)
        part.replace(target)
    except Exception as error:
        if is_disk_full(error):
            raise _no_room(target) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an exception says that a disk or quota is full, in safetensors' words too."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return True
    return type(error).__name__ == "SafetensorError" and os.strerror(errno.ENOSPC) in str(error)


def _reserve(target: Path) -> Path:
    """Create an empty neighbour, with the permissions a plain new file would get."""
    part = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        if is_disk_full(error):
            raise _no_room(target) from error
        raise _unusable(target, error) from error
    return part


def _no_room(target: Path) -> RunError:
    return RunError(f"no room left on the disk for {target}; free space or choose another folder")


def _unusable(target: Path, error: OSError) -> InputError:
    return InputError(f"output {target} cannot be written: {error.strerror}; choose another path")


def _flush_to_disk(part: Path) -> None:
    with part.open("rb+") as file:
        os.fsync(file.fileno())
