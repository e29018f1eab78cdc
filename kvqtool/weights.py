"""The bytes of a model's weights: from the headers of its safetensors files, or from its config.

Headers are exact, quantized checkpoints included; the files' data is never read. The estimate
counts the matrices that transformers would make of the config, and norms.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvqtool.config import ModelConfig
from kvqtool.errors import InputError
from kvqtool.headers import damaged, read_header
from kvqtool.memory import ITEM_BYTES

_FLOATS: Final = ("F64", "F32", "F16", "BF16")
_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
# What a head can use again: not positions, norms, or the embeddings that single layers have.
_TOKENS: Final = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|word_embeddings)\.")
# Layers that predict several tokens at once: transformers leaves them in the file.
_NOT_LOADED: Final = re.compile(r"(?:^|\.)mtp[._]")
_EMBEDDING: Final = re.compile(r"(?:^|\.)(?:embed_\w+|wte|wpe|word_embeddings\w*)\.")
_ELSEWHERE: Final = re.compile(r"(?:^|\.)(?:vision|visual|audio|multi_modal|mm_|embed_vision)")


@dataclass(frozen=True)
class Part:
    """Weights that lie together.

    Args:
        matrices: floating-point numbers that tensor parallelism divides.
        vectors: floating-point numbers that every rank has.
        stored: bytes in other dtypes, which loading does not convert.
    """

    matrices: int = 0
    vectors: int = 0
    stored: int = 0

    def nbytes(self, dtype: str, ranks: int = 1) -> int:
        """Return the bytes on each of `ranks` that share the matrices."""
        numbers = -(-self.matrices // ranks) + self.vectors
        return numbers * ITEM_BYTES[dtype] + -(-self.stored // ranks)

    def __add__(self, other: Part) -> Part:
        """Return both parts together."""
        return Part(
            self.matrices + other.matrices,
            self.vectors + other.vectors,
            self.stored + other.stored,
        )


@dataclass(frozen=True)
class Weights:
    """A model's weights by where pipeline parallelism puts them.

    Args:
        source: `headers`, `estimate`, `stated`, or `none` where the user leaves them out.
        embedding: what comes before the layers, parts for images and sound included.
        layers: each layer.
        head: what comes after them.
        tied: the embedding's matrix, where the head uses it again.
    """

    source: str
    embedding: Part
    layers: tuple[Part, ...]
    head: Part
    tied: Part = Part()

    @property
    def numbers(self) -> int:
        """Floating-point numbers, all parts together."""
        parts = (self.embedding, *self.layers, self.head)
        return sum(part.matrices + part.vectors for part in parts)

    def nbytes(self, dtype: str) -> int:
        """Return the bytes of the whole model in one place."""
        return sum(part.nbytes(dtype) for part in (self.embedding, *self.layers, self.head))


@dataclass
class _Sums:
    """Parts while they are being added up."""

    layers: list[Part]
    embedding: Part = field(default_factory=Part)
    head: Part = field(default_factory=Part)
    tokens: Part = field(default_factory=Part)

    def add(self, name: str, part: Part) -> None:
        """Put a tensor where it belongs; layers past the model's own are not loaded."""
        if _NOT_LOADED.search(name):
            return
        layer = None if _ELSEWHERE.search(name) else _LAYER.search(name)
        if layer is not None:
            index = int(layer[1])
            if index < len(self.layers):
                self.layers[index] += part
        elif _EMBEDDING.search(name) or _ELSEWHERE.search(name):
            self.embedding += part
            if _TOKENS.search(name) and not _ELSEWHERE.search(name):
                self.tokens += part
        else:
            self.head += part


def measured_weights(
    config: ModelConfig, depth: int, headers: Iterable[tuple[Path, dict[str, Any]]]
) -> Weights:
    """Return the weights that safetensors headers list.

    A quantized checkpoint counts as it is stored; of others, floating-point numbers take the dtype
    they are loaded in.

    Args:
        config: the model's.
        depth: its layers.
        headers: each file and its header.

    Raises:
        InputError: when a header is damaged.
    """
    is_quantized = bool(config.stated.get("quantization_config"))
    sums, has_head = _Sums([Part()] * depth), False
    for file, header in headers:
        for name, tensor in header.items():
            if name != "__metadata__":
                has_head |= "lm_head" in name
                sums.add(name, _tensor_part(file, tensor, is_quantized))
    is_tied = bool(config.get("tie_word_embeddings")) and not has_head
    tied = sums.tokens if is_tied else Part()
    return Weights("headers", sums.embedding, tuple(sums.layers), sums.head, tied)


def weight_headers(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the headers of a folder's weight files; none where one of them is missing.

    Raises:
        InputError: when a file is damaged.
    """
    files = _weight_files(folder)
    if not all(file.is_file() for file in files):
        return []
    return [(file, read_header(file)) for file in files]


def _tensor_part(file: Path, tensor: Any, is_quantized: bool) -> Part:
    try:
        shape, dtype = tensor["shape"], tensor["dtype"]
        start, end = tensor["data_offsets"]
        count = math.prod(shape)
        if dtype not in _FLOATS or is_quantized:
            return Part(stored=end - start)
        return Part(matrices=count) if len(shape) > 1 else Part(vectors=count)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(file, error) from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is no weight index ({error!r}); download it again") from error
    return [folder / str(name) for name in names]
