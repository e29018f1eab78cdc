"""The words of a scheme's short string: one side cut into them, and what both sides agree on."""

from __future__ import annotations

import re
from typing import Final

from kvqtool.adaptive import WORDS
from kvqtool.errors import SpecError

_HEAD: Final = re.compile(r"(nuq|int|nf|kivi|had|tq|qaq)([0-9]{1,9})|fp|qaq")
_NUMBERED: Final = re.compile(r"(sink|cap|r|g|w)([0-9]{1,9})|([kv])([0-9]{1,9}(?:\.[0-9]{1,99})?)")
_PERCENT: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,99})?)%")
FLAGS: Final = (
    *("qnorm", "postrope", "pertoken", "fisher", "nofisher", "pc", "comp", "vrot"),
    *("nuq", "token", "head", "released", "shadow"),
)


def side_words(side: str, text: str) -> dict[str, str]:
    """Split one side into its words: {'method': 'nuq', 'bits': '3', 'percent': '1', 'sink': '1',
    'pc': ''}.
    """
    head, *rest = side.split("-")
    match = _HEAD.fullmatch(head)
    if match is None:
        raise SpecError(
            f"spec {text!r}: {head!r} is not a method with bits; start with nuq3, int4, nf4 or fp"
        )
    words = {"method": match[1] or head, "bits": match[2] or ("" if head == "qaq" else "16")}
    for word in rest:
        percent, numbered = _PERCENT.fullmatch(word), _NUMBERED.fullmatch(word)
        if percent:
            name, value = "percent", percent[1]
        elif numbered:
            name, value = numbered[1] or numbered[3], numbered[2] or numbered[4]
        elif word in FLAGS:
            name, value = word, ""
        else:
            known = "1% g64 cap4 sink1 r128 k0.01 v0.05 w5 " + " ".join(FLAGS)
            raise SpecError(f"spec {text!r}: {word!r} is not a modifier; known: {known}")
        if name in words:
            raise SpecError(f"spec {text!r}: {name} is given twice; keep one")
        words[name] = value
    if "fisher" in words and "nofisher" in words:
        raise SpecError(f"spec {text!r}: fisher and nofisher exclude each other; keep one")
    for name in ("nuq", *WORDS) if words["bits"] else ("r", "g"):
        if name in words:
            raise SpecError(
                f"spec {text!r}: {name} does not go with {head}; bits are by token with qaq, whose "
                "window is -wN, and fixed with a number; drop one"
            )
    if "nuq" in words:
        words["method"] = "nuq"
    return words


def agree(name: str, sides: list[dict[str, str]], text: str) -> str | None:
    """Return what sides say of something that holds for the whole cache; None if neither does."""
    found = {words[name] for words in sides if name in words}
    if len(found) > 1:
        raise SpecError(
            f"spec {text!r}: {name} differs between keys and values; it holds for the whole cache"
        )
    return found.pop() if found else None
