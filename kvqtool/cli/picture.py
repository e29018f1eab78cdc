"""Pictures by matplotlib, which is asked for before the work whose result they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvqtool.errors import InputError
from kvqtool.files import atomic_output, check_output


def new_figure(path: Path, size: tuple[float, float], *, force: bool) -> Any:
    """Return an empty figure that can be saved.

    Args:
        path: the picture; its ending says the format.
        size: width and height in inches.
        force: whether an existing file may be replaced.

    Raises:
        InputError: when matplotlib is missing, cannot write such a file, or there is one.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "--plot needs matplotlib; install it: pip install 'kvqtool[plot]'"
        ) from None
    check_output(path, force)
    figure = Figure(figsize=size, layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if _kind(path) not in known:
        raise InputError(
            f"--plot {path}: {_kind(path)!r} is no picture; end it in one of: "
            + ", ".join(sorted(known))
        )
    return figure


def save_figure(figure: Any, path: Path, *, force: bool) -> None:
    """Write a figure; whole or not at all."""
    with atomic_output(path, force=force) as part:
        figure.savefig(part, format=_kind(path), dpi=150)


def _kind(path: Path) -> str:
    return path.suffix.removeprefix(".").lower() or "png"
