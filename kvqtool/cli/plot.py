"""Memory against context as a picture, with the line of the GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvqtool.cli.picture import new_figure, save_figure
from kvqtool.load import Workload
from kvqtool.memory import capacity
from kvqtool.plan import MemoryPlan, make_load
from kvqtool.scheme import Scheme
from kvqtool.shape import ModelShape

_GIB = 2**30
_POINTS = 60


def draw_plan(
    path: Path,
    rows: Sequence[MemoryPlan],
    asked: tuple[ModelShape, Sequence[Scheme], Workload],
    *,
    force: bool,
) -> None:
    """Draw what every scheme takes up to the longest context asked for.

    Args:
        path: the picture; its ending says the format.
        rows: the plans.
        asked: model, schemes and workload they were made of.
        force: whether an existing file may be replaced.

    Raises:
        InputError: when matplotlib is missing or cannot write such a file.
    """
    figure = new_figure(path, (8, 5), force=force)
    axes: Any = figure.add_subplot()
    shape, schemes, work = asked
    longest = max(row.context for row in rows)
    for scheme in schemes:
        load = make_load(shape, scheme, work)
        lengths = _lengths(longest)
        totals = [
            max(load.total(stage, length, work.batch) for stage in range(work.pp)) / _GIB
            for length in lengths
        ]
        axes.plot(lengths, totals, label=scheme.name)
    memory = rows[0].gpu_memory_bytes
    if memory is not None:
        label = f"{rows[0].gpu or 'memory'}: {memory / _GIB:,.1f} GiB"
        axes.axhline(memory / _GIB, color="black", linestyle="--", label=label)
    axes.set(
        title=f"{shape.name}, batch {work.batch}, {work.gpus} GPU",
        xlabel="tokens of each sequence",
        ylabel="GiB on the fullest GPU, margins included",
        ylim=(0, None),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path, force=force)


def _lengths(longest: int) -> list[int]:
    """Return lengths up to the longest, evenly spaced on whole pages."""
    step = max(longest / _POINTS, 1)
    found = [min(capacity(math.ceil(step * i)), longest) for i in range(1, _POINTS + 1)]
    return list(dict.fromkeys(found))
