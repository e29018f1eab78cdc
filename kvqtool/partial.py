"""The statistics of an unfinished calibration, in a file beside its output, so that a run that was
stopped can go on where it was.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from kvqtool.container import load_container, save_container
from kvqtool.errors import BundleError
from kvqtool.ranges import Collector, Devices
from kvqtool.ranks import Ranks

KIND: Final = "kvqtool-partial"
VERSION: Final = 1
_TRIALS: Final = ".trials.safetensors"
_AFTER_OUTPUT: Final = re.compile(r"\.partial(?:-\d+-of-(\d+))?\.safetensors")


@dataclass(frozen=True)
class Partial:
    """Where a calibration keeps its statistics until it is done.

    Args:
        path: the file; `remove` it once the bundle is safe.
        resume: whether to go on from the file, if it is there.
        every_windows: windows after which it is written again.
        every_seconds: or seconds, whichever comes first.
        at_end: whether it is written when a pass is done, too: what follows takes long.
    """

    path: Path
    resume: bool = False
    every_windows: int = 32
    every_seconds: float = 60.0
    at_end: bool = False

    @property
    def trials_path(self) -> Path:
        """Where a search keeps what it has measured."""
        return self.path.with_name(self.path.name.removesuffix(".safetensors") + _TRIALS)

    def remove(self) -> None:
        """Remove the files: what they were kept for is done."""
        self.path.unlink(missing_ok=True)
        self.trials_path.unlink(missing_ok=True)


def partial_path(output: Path, ranks: Ranks) -> Path:
    """Return the file beside an output where this process keeps its statistics."""
    which = "" if ranks.is_alone else f"-{ranks.rank}-of-{ranks.world_size}"
    return output.with_name(f"{output.name}.partial{which}.safetensors")


def process_counts(output: Path) -> set[int]:
    """Return how many processes the runs had that left statistics beside an output."""
    after = (f.name.removeprefix(output.name) for f in output.absolute().parent.iterdir())
    return {int(match[1] or 1) for match in map(_AFTER_OUTPUT.fullmatch, after) if match}


class Journal:
    """Counts the windows of every pass, and keeps its statistics in the file from time to time.

    Attributes:
        collectors: the passes' collectors by name.
        done: windows that each of them has seen.
    """

    def __init__(
        self,
        partial: Partial | None,
        run: Mapping[str, Any],
        collectors: Mapping[str, Collector],
    ) -> None:
        """Start with nothing done.

        Args:
            partial: where to keep statistics; None to keep none.
            run: all that they depend on, as JSON-able values.
            collectors: the passes' collectors by name.
        """
        self.done = dict.fromkeys(collectors, 0)
        self._partial = partial
        self._run = dict(run)
        self.collectors = collectors
        self._unsaved, self._saved_at = 0, time.monotonic()

    def resume(self, devices: Devices) -> None:
        """Take up what the file holds, if that is wanted and there is one.

        Args:
            devices: of every layer's statistics.

        Raises:
            BundleError: when the file is damaged or of another run.
        """
        if self._partial is None or not self._partial.resume or not self._partial.path.exists():
            return
        path = self._partial.path
        metadata, tensors = load_container(path, KIND, VERSION)
        check_run(path, metadata["run"], self._run)
        self.done = metadata["done"]
        for name, collector in self.collectors.items():
            states: dict[str, dict[str, Tensor]] = {}
            for full, tensor in tensors.items():
                owner, sketch, part = full.split("/")
                if owner == name:
                    states.setdefault(sketch, {})[part] = tensor
            collector.restore(states, devices)

    def step(self, name: str) -> None:
        """Count a window that a collector has seen, and write the file if it is time."""
        self.done[name] += 1
        self._unsaved += 1
        partial = self._partial
        if partial is not None and (
            self._unsaved >= partial.every_windows
            or time.monotonic() - self._saved_at >= partial.every_seconds
        ):
            self._save(partial.path)

    def finish(self) -> None:
        """Write the file at the end of a pass, where that is wanted and it is not up to date."""
        if self._partial is not None and self._partial.at_end and self._unsaved:
            self._save(self._partial.path)

    def _save(self, path: Path) -> None:
        tensors = {
            f"{name}/{sketch}/{part}": tensor
            for name, collector in self.collectors.items()
            for sketch, held in collector.sketches.items()
            for part, tensor in held.state().items()
        }
        metadata = {"run": self._run, "done": self.done}
        save_container(path, KIND, VERSION, (metadata, tensors), force=True)
        self._unsaved, self._saved_at = 0, time.monotonic()


def check_run(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse what another run has left.

    Args:
        path: the file it was left in.
        there: what that run's work depended on.
        here: what this run's does.

    Raises:
        BundleError: naming the first difference, both values, and the remedy.
    """
    for key in sorted(here.keys() | there.keys()):
        if there.get(key) != here.get(key):
            raise BundleError(
                f"{path} is of another calibration ({key}: {_short(there.get(key))} there, "
                f"{_short(here.get(key))} here); repeat that one, or start over without --resume"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
