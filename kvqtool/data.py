"""Text as windows of tokens: what calibration reads and what evaluation scores."""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from kvqtool.errors import InputError
from kvqtool.tables import PARAGRAPH, TABLE_SUFFIXES, read_hub, read_table, read_utf8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN: Final = "builtin"
PARTS: Final = ("calibration", "evaluation")
DEFAULT_SPLIT: Final = {"calibration": "train", "evaluation": "test"}
NO_BOS: Final = "tokenizer adds none"
ONE_BOS: Final = "tokenizer adds one at the start of the text"
_HUB_NAME: Final = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w\[\]:%-]+))?")


@dataclass(frozen=True)
class Text:
    """A whole text and where it came from.

    Args:
        text: the text, newlines as they were.
        name: `builtin:calibration`, `builtin:evaluation`, a file's path, `-`, or a hub name.
        sha256: of the text in UTF-8.
        python: version of the Python whose documentation the built-in text is; None for any other.
    """

    text: str
    name: str
    sha256: str
    python: str | None = None


@dataclass(frozen=True)
class Windows:
    """Equally long pieces of a tokenised text.

    Args:
        ids: (windows, seq_len) int64 on the CPU.
        scored_from: (windows,) int64: the first position whose token counts as a target. 1 where
            windows do not overlap, for a window's first token has nothing before it.
        source: the text.
        bos: how the text was opened, in words.
        stride: tokens from one window's start to the next's; of random windows, their length.
    """

    ids: torch.Tensor
    scored_from: torch.Tensor
    source: Text
    bos: str
    stride: int


def load_text(name: str | None, *, part: str, text_column: str = "text") -> Text:
    """Read a text.

    Args:
        name: None for the built-in text; a file (`.json`, `.jsonl` and `.parquet` have a column of
            texts, any other is read whole); `-` for standard input; or a hub data set, as
            `owner/name[:config][@split]`.
        part: `calibration` or `evaluation`: the half of the built-in text, and the split of a hub
            data set (`train` or `test`) whose name gives none.
        text_column: the column that holds the texts of a table.

    Raises:
        InputError: when there is no such text, it cannot be read, or it is empty.
    """
    if part not in PARTS:
        raise InputError(f"part {part!r} is unknown; use {' or '.join(PARTS)}")
    if name is None or name == BUILTIN:
        return _builtin_text(part)
    if name in (f"{BUILTIN}:{known}" for known in PARTS):
        return _builtin_text(name.partition(":")[2])
    if name == "-":
        return _text(read_utf8(sys.stdin.buffer.read(), name), name)
    if Path(name).expanduser().exists():
        return _text(_read_file(name, text_column), name)
    return _text(_read_hub(name, DEFAULT_SPLIT[part], text_column), name)


def calibration_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, samples: int, seq_len: int, seed: int
) -> Windows:
    """Cut windows at random places; the same seed gives the same places.

    Args:
        text: what to cut from; tokenised once, as a whole.
        tokenizer: the model's.
        samples: number of windows.
        seq_len: tokens in a window.
        seed: of the generator that draws the places.

    Raises:
        InputError: when the text is shorter than a window, or nothing is asked for.
    """
    ids, bos = _tokenize(text, tokenizer, seq_len)
    if samples < 1:
        raise InputError(f"{samples} samples cannot calibrate anything; use --samples 1 or more")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - seq_len + 1, (samples,), generator=generator)
    rows = ids.unfold(0, seq_len, 1)[starts]
    return Windows(rows, torch.ones(samples, dtype=torch.int64), text, bos, seq_len)


def evaluation_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    windows: int | None = None,
    stride: int | None = None,
) -> Windows:
    """Cut windows one after another from the start; a tail shorter than a window is dropped.

    Args:
        text: what to cut from; tokenised once, as a whole.
        tokenizer: the model's.
        seq_len: tokens in a window.
        windows: how many; None for all.
        stride: tokens from one start to the next; None for `seq_len`, the most there can be. With
            fewer, windows overlap and each scores only what the one before it did not.

    Example: 10 tokens, seq_len 4, stride 2 -> starts 0, 2, 4, 6, scored from 1, 2, 2, 2.

    Raises:
        InputError: when the text does not hold the windows asked for.
    """
    ids, bos = _tokenize(text, tokenizer, seq_len)
    step = seq_len if stride is None else stride
    if not 1 <= step <= seq_len:
        raise InputError(
            f"stride {step} is not in 1..{seq_len}, the window; use --stride {seq_len}"
        )
    rows = ids.unfold(0, seq_len, step)
    wanted = len(rows) if windows is None else windows
    if not 1 <= wanted <= len(rows):
        raise InputError(
            f"{wanted} windows asked for, {text.name} has {len(rows)} of {seq_len} tokens at "
            f"stride {step}; use --windows 1 to {len(rows)}, shorter windows, or a longer text"
        )
    scored_from = torch.full((wanted,), max(1, seq_len - step), dtype=torch.int64)
    scored_from[0] = 1
    return Windows(rows[:wanted].clone(), scored_from, text, bos, step)


def _builtin_text(part: str) -> Text:
    """Return one half of the documentation every CPython carries, split by topic-name hash."""
    from pydoc_data.topics import topics

    remainder = PARTS.index(part)
    names = [n for n in sorted(topics) if hashlib.sha256(n.encode()).digest()[0] % 2 == remainder]
    joined = PARAGRAPH.join(topics[name] for name in names)
    return _text(joined, f"{BUILTIN}:{part}", python=platform.python_version())


def _read_file(name: str, column: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"data set {name!r} is a folder; name a file in it")
    try:
        if path.suffix in TABLE_SUFFIXES:
            return read_table(path, name, column)
        return read_utf8(path.read_bytes(), name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"data set {name!r} cannot be read: {reason}; check the file") from error


def _read_hub(name: str, split: str, column: str) -> str:
    match = _HUB_NAME.fullmatch(name)
    is_path = name.startswith((".", "/", "~")) or Path(name).suffix in (".txt", *TABLE_SUFFIXES)
    if match is None or is_path:
        raise InputError(
            f"data set {name!r}: no such file; name a file, -, or a hub data set as owner/name"
        )
    return read_hub(match[1], match[2], match[3] or split, column)


def _text(text: str, name: str, *, python: str | None = None) -> Text:
    if not text.strip():
        raise InputError(f"data set {name!r} holds no text; name another")
    try:
        return Text(text, name, hashlib.sha256(text.encode()).hexdigest(), python)
    except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair
        raise InputError(
            f"data set {name!r} is not valid Unicode at character {error.start}; repair it"
        ) from error


def _tokenize(
    text: Text, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> tuple[torch.Tensor, str]:
    """Tokenise a text that must hold a window; also say how the tokenizer opens a text."""
    if seq_len < 2:
        raise InputError(f"a window of {seq_len} tokens predicts nothing; use --seq-len 2 or more")
    ids = tokenizer(text.text, verbose=False)["input_ids"]
    if len(ids) < seq_len:
        raise InputError(
            f"{text.name} has {len(ids)} tokens, a window needs {seq_len}; "
            f"use --seq-len {len(ids)} or less, or a longer text"
        )
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    opened = tokenizer("a")["input_ids"][:1] != bare[:1]
    return torch.tensor(ids, dtype=torch.int64), ONE_BOS if opened else NO_BOS
