"""A calibration as a picture: codebooks over what they quantize, sensitivity, the frontier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvqtool.cli.picture import new_figure, save_figure
from kvqtool.errors import InputError
from kvqtool.spec import SIDES, KvSpec

if TYPE_CHECKING:
    from kvqtool.bundle import Bundle
    from kvqtool.findings import Findings
    from kvqtool.fit import Fitter

_SIZE: Final = (11.0, 8.0)  # inches
_COLOURS: Final = {"key": "tab:blue", "value": "tab:orange"}
_MARKERS: Final = {"uniform": "s", "scheme": "D", "allocated": "o"}


class Picture:
    """A picture that is asked for now and drawn when there is something to show."""

    def __init__(self, path: Path, scheme: KvSpec, force: bool) -> None:
        """Refuse what could not be drawn, before the work.

        Raises:
            InputError: when matplotlib is missing, the file cannot be written, or the scheme fits
                no codebooks or several.
        """
        if not (scheme.key.fits_levels and scheme.value.fits_levels):
            raise InputError(
                f"{scheme.name} has no fitted codebooks to draw; use a nuq spec, or drop --plot"
            )
        if scheme.adaptive:
            raise InputError(
                f"{scheme.name} has codebooks of several widths, which a picture cannot show; "
                "use a spec of fixed bits, or drop --plot"
            )
        self._path, self._force = path, force
        self._figure = new_figure(path, _SIZE, force=force)

    def draw(self, bundle: Bundle, fitter: Fitter) -> None:
        """Draw what a calibration has found."""
        from kvqtool.findings import findings_of

        findings = findings_of(bundle, fitter)
        self._figure.suptitle(findings.scheme)
        grid = self._figure.subplots(2, 2)
        for axes, side in zip(grid[0], SIDES, strict=True):
            _draw_codebooks(axes, findings, side)
        _draw_sensitivity(grid[1][0], findings)
        _draw_frontier(grid[1][1], findings)
        save_figure(self._figure, self._path, force=self._force)


def _draw_codebooks(axes: Any, findings: Findings, side: str) -> None:
    """Draw a row a layer: the density of normalised values, and the levels over it."""
    shares = [findings.density[layer, side] for layer in findings.layers]
    count = len(findings.layers)
    extent = (-1.0, 1.0, count - 0.5, -0.5)
    shades = {"cmap": "Greys", "vmax": 2.0, "interpolation": "nearest"}  # levels stand out
    axes.imshow(shares, extent=extent, aspect="auto", **shades)
    for number, layer in enumerate(findings.layers):
        levels = findings.levels[layer, side]
        own = len(levels) <= 1 << findings.bits[layer, side]  # one codebook for all channels
        axes.plot(
            levels,
            [number] * len(levels),
            "|",
            color=_COLOURS[side],
            alpha=1.0 if own else 0.1,
            rasterized=True,
        )
    axes.set(
        title=f"{side} levels over the density of normalised values",
        xlabel="position in the range",
        ylabel="layer",
    )
    axes.set_yticks(*_ticks(findings))


def _draw_sensitivity(axes: Any, findings: Findings) -> None:
    """Draw what every layer's keys and values are predicted to cost at one width, and the widths
    they got.
    """
    if not findings.losses:
        _say_nothing(axes, "sensitivity", "calibrated without gradients")
        return
    places = range(len(findings.layers))
    widths = axes.twinx()
    for side in SIDES:
        losses = [findings.losses[layer, side] for layer in findings.layers]
        bits = [findings.bits[layer, side] for layer in findings.layers]
        axes.plot(places, losses, "o-", color=_COLOURS[side], label=f"{side}s")
        widths.plot(places, bits, drawstyle="steps-mid", color=_COLOURS[side], linestyle=":")
    axes.set(
        title="sensitivity: predicted loss, all layers at the scheme's width",
        xlabel="layer",
        ylabel="nats a position",
        yscale="log",
    )
    widths.set(ylabel="bits stored (dotted)", ylim=(0, 9))
    axes.set_xticks(*_ticks(findings))
    axes.legend()


def _draw_frontier(axes: Any, findings: Findings) -> None:
    """Draw bits against measured loss: every trial by its kind, and the chosen one."""
    if not findings.frontier:
        _say_nothing(axes, "frontier", "no budget was asked for, nothing was measured")
        return
    for kind, marker in _MARKERS.items():
        rows = [row for row in findings.frontier if row["kind"] == kind]
        points = [row["bits"] for row in rows], [row["kld_mean"] for row in rows]
        axes.plot(*points, marker, label=kind, alpha=0.7)
    (chosen,) = (row for row in findings.frontier if row["is_chosen"])
    best = f"chosen: {chosen['bits']:.3f} bits, {chosen['kld_mean']:.4f} nats"
    axes.plot(chosen["bits"], chosen["kld_mean"], "k*", markersize=14, label=best)
    axes.set(
        title="frontier on held-out windows",
        xlabel="bits a number, everything included",
        ylabel="KL divergence, nats",
        yscale="log",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def _say_nothing(axes: Any, title: str, why: str) -> None:
    axes.set_axis_off()
    axes.set_title(title)
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)


def _ticks(findings: Findings) -> tuple[list[int], list[str]]:
    """Return places and labels for at most a dozen layers."""
    step = -(-len(findings.layers) // 12)
    places = list(range(0, len(findings.layers), step))
    return places, [str(findings.layers[place]) for place in places]
