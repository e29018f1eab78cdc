"""What a search has measured, in a file beside its output, so that a search that was stopped does
not measure it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from kvqtool.container import load_container, save_container
from kvqtool.partial import Partial, check_run
from kvqtool.ranks import Ranks
from kvqtool.spec import KvSpec

KIND: Final = "kvqtool-trials"
VERSION: Final = 1


@dataclass(frozen=True)
class Measured:
    """What one scheme cost on the held-out windows.

    Args:
        kld_mean: nats.
        ppl_ratio: perplexity over the exact one.
        ppl_ratio_stderr: of it, paired over windows; None of a single window.
        cache_bytes: of one window.
    """

    kld_mean: float
    ppl_ratio: float
    ppl_ratio_stderr: float | None
    cache_bytes: int


class TrialJournal:
    """Measurements by scheme, written down as they are made."""

    def __init__(self, partial: Partial | None, run: Mapping[str, Any], ranks: Ranks) -> None:
        """Take up what the file holds, if that is wanted and there is one.

        Args:
            partial: where statistics are kept, and measurements beside them; None to keep none.
            run: all that measurements depend on, as JSON-able values.
            ranks: the processes, which measure together and so go on from the same measurements.

        Raises:
            BundleError: when the file is damaged or of another run.
        """
        self._path = partial.trials_path if partial else None
        self._run = dict(run)
        rows: list[dict[str, Any]] = []
        with ranks.together():
            if self._path and partial and partial.resume and self._path.exists():
                metadata, _ = load_container(self._path, KIND, VERSION)
                check_run(self._path, metadata["run"], self._run)
                rows = metadata["trials"]
        # A process that was ended before its neighbour has written one trial less.
        common = int(ranks.reduce(torch.tensor(len(rows)), "MIN"))
        self._rows = rows[:common]

    def find(self, specs: Mapping[int, KvSpec]) -> Measured | None:
        """Return what a scheme a layer has cost; None while it was not measured."""
        wanted = _written(specs)
        found = (row["measured"] for row in self._rows if row["specs"] == wanted)
        return next((Measured(**values) for values in found), None)

    def add(self, specs: Mapping[int, KvSpec], measured: Measured) -> None:
        """Write down what a scheme cost."""
        self._rows.append({"specs": _written(specs), "measured": asdict(measured)})
        if self._path:
            metadata = {"run": self._run, "trials": self._rows}
            save_container(self._path, KIND, VERSION, (metadata, {}), force=True)


def _written(specs: Mapping[int, KvSpec]) -> dict[str, str]:
    return {str(layer): str(spec) for layer, spec in specs.items()}
