"""Kill every writing command at random moments: the output stays the old file or becomes the new.

    python tests/crash.py --kills 200

Most kills hit forked children of this process, which has torch and the built-in model loaded
already; half of those are aimed at the moment the output is being written. The rest hit whole
command-line processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from kvqtool.bundle import load_bundle
from kvqtool.cachefile import load_cache
from kvqtool.cli import app

ROOT: Final = Path(__file__).parents[1]
# Aimed kills wait for the temporary neighbour, and then this long at most.
WRITING_SECONDS: Final = 0.004
SMALL: Final = ("--dataset", "document.txt", "--seq-len", "32")


@dataclass(frozen=True)
class Writer:
    """A command that writes a file: how to make the old file and the new one, and read either."""

    name: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    spec_of: Callable[[Path], str]


def _spec_of_json(path: Path) -> str:
    return str(json.loads(path.read_text())["spec"])


# Each reader takes whole files only; the spec it returns tells old from new.
WRITERS: Final = (
    Writer(
        "calibrate",
        ("calibrate", "builtin", "--spec", "nuq2", "--samples", "1", *SMALL),
        ("calibrate", "builtin", "--spec", "nuq3", "--samples", "1", *SMALL),
        lambda path: str(load_bundle(path).spec),
    ),
    Writer(
        "quantize-cache",
        ("quantize-cache", "builtin", "--spec", "int4-g64", "--text", "document.txt"),
        ("quantize-cache", "builtin", "--spec", "int8-g64", "--text", "document.txt"),
        lambda path: str(load_cache(path).bundle.spec),
    ),
    Writer(
        "ppl",
        ("ppl", "builtin", "--spec", "int4-g64", "--windows", "1", "--json", *SMALL),
        ("ppl", "builtin", "--spec", "int8-g64", "--windows", "1", "--json", *SMALL),
        _spec_of_json,
    ),
    Writer(
        "memory-plan",
        ("memory-plan", "builtin", "--spec", "int4-g64", "--json"),
        ("memory-plan", "builtin", "--spec", "int8-g64", "--json"),
        _spec_of_json,
    ),
)


def load_once() -> None:
    """Let every forked child find the built-in model loaded and probed."""
    from kvqtool import models

    loaded = models.load_model("builtin", device="cpu")
    assert loaded.seam.packed
    models.load_model = lambda *_, **__: loaded  # type: ignore[assignment]


def forked(command: tuple[str, ...], output: Path) -> int:
    """Start a command in a fork of this process and return its id."""
    child = os.fork()
    if child:
        return child
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    try:
        app([*command, "-o", str(output), "--force", "-q"])
    except SystemExit as done:
        os._exit(done.code if isinstance(done.code, int) else 1)
    finally:
        os._exit(70)


def started(command: tuple[str, ...], output: Path) -> int:
    """Start a command as a process of its own and return its id."""
    line = [sys.executable, "-m", "kvqtool", *command, "-o", str(output), "--force", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ).pid


def parts(folder: Path) -> set[str]:
    """Return the temporary files in a folder."""
    return {path.name for path in folder.iterdir() if path.name.endswith(".part")}


def kill(child: int, folder: Path, rng: random.Random, limit: float, *, aimed: bool) -> bool:
    """Kill a child at a random moment; True if it had ended by itself before."""
    before, end = parts(folder), time.monotonic() + limit * 2
    if aimed:
        while not parts(folder) - before and time.monotonic() < end:
            if os.waitpid(child, os.WNOHANG)[0]:
                return True
        time.sleep(rng.uniform(0, WRITING_SECONDS))
    else:
        time.sleep(rng.uniform(0, limit))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.WIFEXITED(status)


class Trial:
    """One command's kills, in a folder of its own."""

    def __init__(self, writer: Writer, folder: Path, rng: random.Random) -> None:
        """Make the old file, and a whole new one to measure the time it takes."""
        self.writer, self.folder, self.rng = writer, folder, rng
        self.output, self.kept = folder / "output", folder / "old"
        self.counts: Counter[str] = Counter()
        self.seconds: dict[Any, float] = {}
        self._finish(forked, writer.old)
        shutil.copyfile(self.output, self.kept)
        self.old_spec = writer.spec_of(self.output)
        self._finish(forked, writer.new)
        self.new_spec = writer.spec_of(self.output)
        assert self.old_spec != self.new_spec

    def _finish(self, start: Callable[..., int], command: tuple[str, ...]) -> None:
        began = time.monotonic()
        status = os.waitpid(start(command, self.output), 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0, f"{command} does not even run"
        self.seconds[start] = time.monotonic() - began

    def strike_until(self, kills: int, start: Callable[..., int]) -> None:
        """Strike until so many commands were really killed, and had not ended by themselves."""
        number, wanted = 0, self.counts["killed"] + kills
        while self.counts["killed"] < wanted:
            assert number < 9 + 4 * kills, "commands end before they are killed"
            self.strike(start, number)
            number += 1

    def strike(self, start: Callable[..., int], number: int) -> None:
        """Start the command over the old file (or over none), kill it, and look at the output."""
        has_old = number % 4 != 3
        self.output.unlink(missing_ok=True)
        if has_old:
            shutil.copyfile(self.kept, self.output)
        if start not in self.seconds:
            self._finish(start, self.writer.new)
            return self.strike(start, number)
        child = start(self.writer.new, self.output)
        limit, aimed = self.seconds[start], start is forked and number % 2 == 0
        ended = kill(child, self.folder, self.rng, limit, aimed=aimed)
        self.counts["ended before the kill" if ended else "killed"] += 1
        if not self.output.exists():
            assert not has_old, "the old file is gone"
            self.counts["no file, as before"] += 1
            return None
        if has_old and self.output.read_bytes() == self.kept.read_bytes():
            self.counts["old file"] += 1
            return None
        assert self.writer.spec_of(self.output) == self.new_spec, "neither the old file nor the new"
        self.counts["new file"] += 1
        return None

    def close(self) -> None:
        """Run once more to the end: it must work beside the leftovers and leave none of its own."""
        before = parts(self.folder)
        self._finish(forked, self.writer.new)
        assert self.writer.spec_of(self.output) == self.new_spec
        assert parts(self.folder) == before, "a successful run left a temporary file"
        self.counts["leftover .part"] = len(before)


def run(kills: int, processes: int, seed: int) -> dict[str, Counter[str]]:
    """Kill each writing command in turn, `kills` times in all, `processes` of them as processes.

    Returns:
        What was counted, by command.
    """
    torch.set_num_threads(1)
    load_once()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        Path("document.txt").write_text("A list is a mutable sequence. A tuple is not.\n" * 8)
        trials = []
        for writer in WRITERS:
            (Path(name) / writer.name).mkdir()
            folder = Path(name) / writer.name
            trials.append(Trial(writer, folder, random.Random(seed)))
        for index, trial in enumerate(trials):
            whole = len(range(index, processes, len(trials)))
            trial.strike_until(len(range(index, kills, len(trials))) - whole, forked)
            trial.strike_until(whole, started)
        for trial in trials:
            trial.close()
        os.chdir(ROOT)
    return {trial.writer.name: trial.counts for trial in trials}


def main() -> None:
    """Run from the command line; a traceback and exit code 1 where a file was torn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=20, help="of them, whole processes")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    counts = run(given.kills, given.processes, given.seed)
    for name, counted in counts.items():
        print(f"{name}: " + ", ".join(f"{times} {what}" for what, times in sorted(counted.items())))
    print(f"{given.kills} kills, no torn file, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
