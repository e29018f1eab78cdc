"""Write docs/models.md from what tests/families.py and tests/wide_families.py find; `--check` fails
where that page is stale.

    python tests/models_page.py
    python tests/models_page.py --family "gpt_neox"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

import transformers
from families import FAMILIES, check
from wide_families import SPEC, read

_ROOT: Final = Path(__file__).parents[1]
PAGE: Final = _ROOT / "docs" / "models.md"
# Whether this is the transformers of constraints.txt, with which the page is written.
IS_PINNED: Final = (
    f"transformers=={transformers.__version__}\n" in (_ROOT / "constraints.txt").read_text()
)
# Greatest differences that are called none: logits; divergences at 8 bits and between read paths.
_EXACT, _CLOSE, _ALIKE = "1e-4", "0.01", "1e-5"
_INTRO: Final = f"""\
# Models

Written by `python tests/models_page.py` from tiny random models of each family. kvqtool
has no table of families: a probe runs the model, finds which layers keep a cache and
how each rotates its keys, and verifies that by computing. What it cannot undo is
quantized as it comes, and named; what it cannot store keeps the stock cache, and is
named. Logits and tokens are compared with quantization off against the stock cache, in
float32; the fifth column is the divergence at 8 bits with one sink token.

The last two columns are of the same models with heads of 64 channels, the least the kernels
know, and `{SPEC}`. `read on a GPU` is what `--read-path auto` takes there to decode:
the fused kernel, straight from pages, or torch, which decodes the layer for the model's own
attention, and why. The divergence is that of the kernels' torch references from the torch path.
tests/gpu runs these models through the kernels themselves, in float16 and bfloat16.

| family | layers | logits within | greedy tokens | KLD at int8-sink1 | read on a GPU | KLD of it |
|---|---|---|---|---|---|---|
"""


def page() -> str:
    """Return docs/models.md."""
    return _INTRO + "".join(checked(family) + read_by(family) for family in FAMILIES)


def checked(family: str) -> str:
    """Return the first cells of a family's row, or all where it is refused."""
    verdict = check(family)
    if verdict.refusal:
        return f"| {family} | refused: {verdict.refusal} | | | | | |\n"
    assert verdict.logits_error is not None and verdict.kld is not None
    layers = "; ".join(dict.fromkeys(verdict.layers))
    same = "equal" if verdict.tokens_are_equal else "differ"
    figures = [_below(verdict.logits_error, _EXACT), same, _below(verdict.kld, _CLOSE)]
    return f"| {family} | {layers} | {' | '.join(figures)} | "


def read_by(family: str) -> str:
    """Return the others."""
    reading = read(family)
    if reading is None:
        return ""
    paths = "; ".join(dict.fromkeys(path for path in reading.paths if path != "stock"))
    return f"{paths} | {_below(reading.kld, _ALIKE) if reading.is_fused else ''} |\n"


def written_rows() -> dict[str, str]:
    """Return the rows of docs/models.md as they stand there, by family."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(_INTRO), "the text above the table is stale"
    rows = text[len(_INTRO) :].splitlines(keepends=True)
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def _below(found: float, bound: str) -> str:
    return f"below {bound}" if found < float(bound) else f"{found:.1e}"


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is stale")
    parser.add_argument("--family", help="check one family and print what is found")
    options = parser.parse_args()
    if options.family:
        print(check(options.family), read(options.family), sep="\n")
        return
    written = page()
    if not options.check:
        PAGE.write_text(written, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != written:
        sys.exit(f"error: {PAGE} is stale; write it again: python tests/models_page.py")


if __name__ == "__main__":
    main()
