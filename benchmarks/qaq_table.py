"""The table of bench_qaq.py: rows as they come, a file that holds them, and a printout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvqtool.files import atomic_output

_COLUMNS = ("scheme", "text", "bits", "ratio", "kld", "same top", "choices", "spec")


@dataclass
class Table:
    """Rows as they come, and the file that holds them.

    Args:
        head: what the record says beside its rows.
        path: the file, or None.
        rows: a row per bundle and text.
        answers: by bundle file.
    """

    head: dict[str, Any]
    path: Path | None
    rows: list[dict[str, Any]]
    answers: dict[str, dict[str, Any]]

    def write(self) -> None:
        """Write what there is."""
        if self.path is None:
            return
        with atomic_output(self.path, force=True) as part:
            whole = self.head | {"results": self.sorted()}
            part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    def sorted(self) -> list[dict[str, Any]]:
        """Return the rows, text by text and by falling bits, with their answers."""
        rows = sorted(self.rows, key=lambda row: (row["text"], -row["effective_bits"]))
        return [
            {k: v for k, v in row.items() if k != "file"}
            | {"choices": self.answers.get(row["file"])}
            for row in rows
        ]

    def show(self) -> None:
        """Print the rows."""
        print("\t".join(_COLUMNS))
        for row in self.sorted():
            change, said = "-", row["choices"]
            if said is not None:
                low, high = said["accuracy_change_low"], said["accuracy_change_high"]
                change = f"{said['accuracy']:.3f} ({low:+.3f} to {high:+.3f})"
            figures = f"{row['effective_bits']:.3f}\t{row['ppl_ratio']:.4f}\t{row['kld_mean']:.4f}"
            figures += f"\t{row['same_top1']:.4f}\t{change}"
            print(f"{row['family']}\t{Path(row['text']).name}\t{figures}\t{row['spec']}")
