"""Draw the speed-up of fused attention over the best fp16 against context.

python benchmarks/plot_attention.py benchmarks/results/attention-h200.json docs/kernels.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot

SPECS = ("nuq4", "nuq4-1%", "nuq3-1%", "nuq2-1%")
Shape = tuple[int, int, int]  # heads, KV heads, batch


def main() -> None:
    """Draw a panel for each shape that was measured at several contexts."""
    # Text as text, and the same file from the same rows.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kvqtool"})
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    record = json.loads(options.rows.read_text(encoding="utf-8"))
    shapes = several_contexts(record["rows"])
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(11, 3.6), sharey=True, squeeze=False)
    for panel, shape in zip(panels[0], shapes, strict=True):
        draw(panel, record["rows"], shape)
    panels[0, 0].set_ylabel("times the best fp16 attention")
    panels[0, 0].legend()
    figure.suptitle(f"{record['card']}, commit {record['commit']}, {record['date']}")
    figure.tight_layout()
    figure.savefig(options.output, metadata={"Date": None})


def several_contexts(rows: list[dict[str, Any]]) -> list[Shape]:
    """Return the shapes that were measured at more than one context."""
    contexts: dict[Shape, set[int]] = {}
    for row in rows:
        shape = row["num_heads"], row["num_kv_heads"], row["batch"]
        contexts.setdefault(shape, set()).add(row["context_tokens"])
    return [shape for shape, found in contexts.items() if len(found) > 1]


def draw(panel: Any, rows: list[dict[str, Any]], shape: Shape) -> None:
    """Draw one shape's speed-ups, fp16 as a line at 1."""
    num_heads, num_kv_heads, batch = shape
    for spec in SPECS:
        points = {
            row["context_tokens"]: row["speedup_vs_best_fp16"]
            for row in rows
            if row["spec"] == spec
            and (row["num_heads"], row["num_kv_heads"], row["batch"]) == shape
        }
        points = dict(sorted(points.items()))
        panel.plot(list(points), list(points.values()), marker="o", label=spec)
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("context, tokens")
    panel.set_title(f"{num_heads} query heads, {num_kv_heads} KV heads, batch {batch}", fontsize=10)


if __name__ == "__main__":
    main()
