"""The header of a safetensors file: eight bytes of length, then JSON; the tensors are not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from kvqtool.errors import InputError

_LONGEST: Final = 100_000_000


def read_header(file: Path) -> dict[str, Any]:
    """Return a file's header: tensors by name, and `__metadata__`.

    Raises:
        InputError: when it is not a safetensors file.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_LONGEST, file.stat().st_size):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        return header
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> InputError:
    """Return the refusal of a file that cannot be what its name says."""
    return InputError(f"{file} is not a safetensors file ({error}); download it again")
