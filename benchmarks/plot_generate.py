"""Draw tokens a second and peak memory of generation against context.

python benchmarks/plot_generate.py benchmarks/results/generate-h200.json docs/generation.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot

NAMES = {
    "dynamic": "DynamicCache, sdpa, fp16 keys and values",
    "static": "StaticCache, compiled",
    "eager": "kvqtool, step by step",
    "graph": "kvqtool, from a graph",
}


def main() -> None:
    """Draw one panel for speed and one for memory."""
    # Text as text, and the same file from the same rows.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kvqtool"})
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    record = json.loads(options.rows.read_text(encoding="utf-8"))
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    draw(speed, record["rows"], "tokens_per_second", 1)
    speed.set_ylabel("tokens a second, batch 1")
    draw(memory, record["rows"], "prompt_peak_bytes", 2**30)
    memory.set_ylabel("peak of reading the prompt, GiB")
    speed.legend()
    title = f"{record['shape']}, {record['spec']}, {record['machine']}"
    figure.suptitle(f"{title}, commit {record['commit']}, {record['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(options.output, metadata={"Date": None})


def draw(panel: Any, rows: list[dict[str, Any]], key: str, unit: float) -> None:
    """Draw one figure of every way against context."""
    for way, name in NAMES.items():
        points = {r["context_tokens"]: r[key] / unit for r in rows if r["way"] == way and key in r}
        if points:
            points = dict(sorted(points.items()))
            panel.plot(list(points), list(points.values()), marker="o", label=name)
    panel.set_xscale("log", base=2)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("context, tokens")


if __name__ == "__main__":
    main()
