"""Files of tensors that say what they are: safetensors with a kind, a version, JSON metadata and a
checksum.

Bundles and saved caches are both such files. safetensors metadata is a flat map of strings, so the
JSON object travels as one string; `sha256` covers it and every tensor, which safetensors itself
does not check.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvqtool.errors import BundleError, brief
from kvqtool.files import atomic_output

_MOST_LEVELS: Final = 16  # of nested JSON; kvqtool's own has four
_MOST_AXES: Final = 8
_LONGEST_AXIS: Final = 1 << 48


def save_container(
    path: str | Path,
    kind: str,
    version: int,
    content: tuple[dict[str, Any], dict[str, Tensor]],
    *,
    force: bool = False,
) -> None:
    """Write a file of a kind; whole or not at all.

    Args:
        path: the file.
        kind: what it is, such as `kvqtool-bundle`.
        version: of the kind's format.
        content: JSON-able metadata, and tensors by name.
        force: whether an existing file may be replaced.
    """
    metadata, tensors = content
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
    header = {
        "format": kind,
        "version": str(version),
        "metadata": text,
        "sha256": _digest(text, tensors),
    }
    with atomic_output(path, force=force) as part:
        part.write_bytes(_with_sorted_header(save(tensors, metadata=header)))


def load_container(
    path: str | Path, kind: str, version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file of a kind: its metadata, and its tensors on the CPU.

    Raises:
        BundleError: when it is missing, of another kind or version, or damaged.
    """
    what = kind.removeprefix("kvqtool-")
    if not Path(path).is_file():
        raise BundleError(f"{what} {path} does not exist; check the path, or make it first")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != kind:
                found = brief(header.get("format", "no kvqtool format"))
                raise BundleError(
                    f"{path} is not a {kind} file (found: {found}); name another file"
                )
            if header.get("version") != str(version):
                raise BundleError(
                    f"{what} {path} has format version {brief(header.get('version'))}, "
                    f"this kvqtool reads version {version}; "
                    "make it again, or use the kvqtool that wrote it"
                )
            tensors = {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118  # not a dict
        text = header.get("metadata", "")
        if header.get("sha256") != _digest(text, tensors):
            raise ValueError("its checksum does not match")
        return _parse(text), tensors
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        # AttributeError: a dtype that this torch does not have.
        raise BundleError(f"{what} {path} is damaged ({_short(error)}); make it again") from error


def _tensor(file: Any, name: str) -> Tensor:
    """Return a tensor of an open file; ValueError for a shape that torch cannot hold, as an empty
    tensor's can be.
    """
    shape = file.get_slice(name).get_shape()
    if len(shape) > _MOST_AXES or any(size > _LONGEST_AXIS for size in shape):
        raise ValueError(f"the shape of {name}")
    return file.get_tensor(name)  # type: ignore[no-any-return]  # safetensors types nothing


def _parse(text: str) -> dict[str, Any]:
    """Return the JSON object a file carries; ValueError for what kvqtool would not write."""
    try:
        found = json.loads(text, parse_constant=_refuse, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("its metadata is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("its metadata is no JSON object")
    level: list[Any] = [found]
    for _ in range(_MOST_LEVELS):
        nested = [part for part in level if isinstance(part, dict | list)]
        level = [
            inner
            for part in nested
            for inner in (part.values() if isinstance(part, dict) else part)
        ]
    if level:
        raise ValueError("its metadata is nested too deeply")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"its metadata holds {constant}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its metadata repeats a key")
    return found


def _with_sorted_header(data: bytes) -> bytes:
    """Return a safetensors file with its header's keys in order; the library shuffles metadata from
    run to run.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _short(error: BaseException) -> str:
    return brief(str(error).splitlines()[0] if str(error) else type(error).__name__)
