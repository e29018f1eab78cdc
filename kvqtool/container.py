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
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvqtool.errors import BundleError
from kvqtool.files import atomic_output


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
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
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
                found = header.get("format", "no kvqtool format")
                raise BundleError(
                    f"{path} is not a {kind} file (found: {found}); name another file"
                )
            if header.get("version") != str(version):
                raise BundleError(
                    f"{what} {path} has format version {header.get('version')}, "
                    f"this kvqtool reads version {version}; "
                    "make it again, or use the kvqtool that wrote it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError, UnicodeDecodeError, ValueError) as error:
        raise BundleError(f"{what} {path} is damaged ({_short(error)}); make it again") from error
    if header.get("sha256") != _digest(header.get("metadata", ""), tensors):
        raise BundleError(f"{what} {path} is damaged (its checksum does not match); make it again")
    return json.loads(header["metadata"]), tensors


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
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
