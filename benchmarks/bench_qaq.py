r"""QAQ at equal true bytes: bits per token alone and over KVQuant's codebooks, beside fixed bits.

    python benchmarks/bench_qaq.py builtin --seq-len 512 --windows 4 --output qaq.json
    python benchmarks/bench_qaq.py data/smollm2 --calibration wiki.train.part.tokens \
        --dataset wiki.test.raw --dataset novel.txt --choices choices.jsonl --windows 40 \
        --jobs 12 --output qaq.json

A family of schemes has two tolerances. For each target their scale is sought until effective bits,
all buffers counted, are the target's on windows of the calibration text; their ratio is the one of
least divergence there, chosen at the first target. Evaluation text is not looked at before the
table. --jobs processes share the work, each with a copy of the model; what is found is written as
it comes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench_quality import commit, machine
from qaq_options import ALLOCATED, FAMILIES, FIXED, STEPWISE, options_of
from qaq_table import Table
from qaq_tuning import Tuner, around, note, protocol_of, tune

from kvqtool.bundle import load_bundle, save_bundle
from kvqtool.calibrate import calibrate
from kvqtool.choices import choose
from kvqtool.data import Windows, calibration_windows, evaluation_windows, load_text
from kvqtool.files import check_output
from kvqtool.models import LoadedModel, load_model
from kvqtool.perplexity import evaluate
from kvqtool.spec import parse_spec


@dataclass(frozen=True)
class Setting:
    """What every process has to know; hashable, so that a process loads each thing once."""

    model: str
    device: str
    dtype: str
    calibration: str | None
    samples: int
    seq_len: int
    seed: int
    tuning_windows: int
    windows: int | None
    choices: str | None
    targets: tuple[float, ...]
    ratios: tuple[tuple[str, float, float], ...]
    climb: tuple[str, ...]
    known: tuple[str, ...]
    folder: str


@cache
def loaded_of(setting: Setting) -> LoadedModel:
    """Return this process's copy of the model."""
    torch.set_num_threads(1)
    loaded = load_model(setting.model, device=setting.device, dtype=setting.dtype)
    loaded.read_path = "materialise"  # as bits by token are read, so that all schemes are
    return loaded


@cache
def learned_of(setting: Setting) -> Windows:
    """Return the calibration windows."""
    loaded = loaded_of(setting)
    return calibration_windows(
        load_text(setting.calibration, part="calibration"),
        loaded.tokenizer,
        samples=setting.samples,
        seq_len=min(setting.seq_len, loaded.identity.max_context),
        seed=setting.seed,
    )


def make(setting: Setting, name: str, texts: tuple[str, ...]) -> list[str]:
    """Calibrate a family, tune it where its bits follow from tolerances, and return the files of
    its bundles.
    """
    started = time.perf_counter()
    loaded, learned = loaded_of(setting), learned_of(setting)
    specs = [parse_spec(text) for text in texts]
    bundles = calibrate(loaded, learned, specs, seed=setting.seed)
    calibrated = time.perf_counter()
    if name in FAMILIES and name not in setting.known:
        some = slice(0, setting.tuning_windows)
        part = replace(learned, ids=learned.ids[some], scored_from=learned.scored_from[some])
        bundles = tune(_tuner(setting, name, part), name, bundles[0], list(setting.targets))
    paths = []
    for number, bundle in enumerate(bundles):
        path = Path(setting.folder) / f"{name.replace(' ', '-')}-{number}.safetensors"
        save_bundle(bundle, path, force=True)
        paths.append(str(path))
    tuned = time.perf_counter() - calibrated
    note(f"made {name}: calibrated in {calibrated - started:.0f} s, tuned in {tuned:.0f} s")
    return paths


def _tuner(setting: Setting, name: str, part: Windows) -> Tuner:
    """Return what finds a family's tolerances."""
    loaded = loaded_of(setting)
    for family, ratio, start in setting.ratios:
        if family == name:
            ratios = around(ratio) if name in setting.climb else (ratio,)
            return Tuner(loaded, part, ratios, start)
    return Tuner(loaded, part)


def score(setting: Setting, paths: tuple[str, ...], dataset: str | None) -> list[dict[str, Any]]:
    """Evaluate bundles on one text; they share what the exact cache gives."""
    loaded = loaded_of(setting)
    text = load_text(dataset, part="evaluation")
    seq_len = learned_of(setting).ids.shape[1]
    windows = evaluation_windows(
        text, loaded.tokenizer, seq_len=seq_len, windows=setting.windows, stride=None
    )
    bundles = [load_bundle(Path(path)) for path in paths]
    results = evaluate(loaded, windows, bundles, protocol=protocol_of(bundles[0]))
    rows = [
        {"text": text.name, "file": p, **asdict(r)} for p, r in zip(paths, results, strict=True)
    ]
    for row in rows:
        note(f"scored {row['spec']} on {row['text']} in {row['seconds']:.0f} s")
        del row["layers"]
    return rows


def answer(setting: Setting, path: str) -> dict[str, Any]:
    """Ask a bundle's cache the questions."""
    started = time.perf_counter()
    assert setting.choices is not None
    found = asdict(choose(loaded_of(setting), setting.choices, load_bundle(Path(path))))
    del found["layers"]
    note(f"asked {found['spec']} in {time.perf_counter() - started:.0f} s")
    return found


def main() -> None:
    """Calibrate, tune, evaluate, print and save."""
    options = options_of(__doc__)
    if options.output:
        check_output(options.output, options.force)
    targets = tuple(float(each) for each in options.targets.split(","))
    groups = FIXED | {"allocated": tuple(ALLOCATED.format(target) for target in targets)}
    groups |= {name: (text,) for name, text in FAMILIES.items()}
    slow = ("allocated", *FAMILIES)  # to make; they go first where nothing else is asked for
    all_at_once = [name for name in groups if name not in STEPWISE]
    everything = [] if options.scheme else sorted(all_at_once, key=lambda name: name not in slow)
    names = options.family or everything
    head = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "commit": options.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "targets": targets,
    }
    table = Table(head, options.output, [], {})
    context = multiprocessing.get_context("spawn")
    keeping = nullcontext(options.bundles) if options.bundles else tempfile.TemporaryDirectory()
    with (
        keeping as folder,
        ThreadPoolExecutor(1)
        if options.jobs == 1
        else ProcessPoolExecutor(options.jobs, mp_context=context) as pool,
    ):
        setting = _setting(options, targets, folder)
        chosen = {name: groups[name] for name in names} | _known(options)
        _run(pool, setting, chosen, options.dataset, table, options.jobs)
    table.show()


def _run(
    pool: Executor,
    setting: Setting,
    groups: dict[str, tuple[str, ...]],
    datasets: list[str | None],
    table: Table,
    jobs: int,
) -> None:
    """Make every family and score its bundles, before the next is made where processes are few;
    questions come last.
    """
    ready: deque[tuple[Callable[[Any], None], tuple[Any, ...]]] = deque()
    running: dict[Future[Any], Callable[[Any], None]] = {}

    def made(name: str, paths: list[str]) -> None:
        groups = [(path,) for path in paths] if jobs > 1 or not paths else [tuple(paths)]
        for path in paths if setting.choices else []:
            ready.append((partial(answered, path), (answer, setting, path)))
        for group, dataset in product(groups, reversed(datasets or [None])):
            ready.appendleft((partial(scored, name), (score, setting, group, dataset)))

    def scored(name: str, rows: list[dict[str, Any]]) -> None:
        table.rows += [{"family": name, **row} for row in rows]

    def answered(path: str, found: dict[str, Any]) -> None:
        table.answers[path] = found

    for name, texts in groups.items():
        ready.append((partial(made, name), (make, setting, name, texts)))
    while ready or running:
        while ready and len(running) < jobs:
            take, task = ready.popleft()
            running[pool.submit(*task)] = take
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            running.pop(future)(future.result())
        table.write()


def _setting(options: argparse.Namespace, targets: tuple[float, ...], folder: str) -> Setting:
    shared = ("model", "device", "dtype", "calibration", "samples", "seq_len", "seed")
    more = ("tuning_windows", "windows", "choices")
    given = {name: getattr(options, name) for name in (*shared, *more)}
    known = (text.split("=") for text in options.ratio)
    ratios = tuple((name, float(ratio), float(start)) for name, ratio, start in known)
    few = {"climb": tuple(options.climb), "known": tuple(_known(options)), "folder": str(folder)}
    return Setting(**given, **few, targets=targets, ratios=ratios)


def _known(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, spec in (text.split("=") for text in options.scheme):
        found[name] = (*found.get(name, ()), spec)
    return found


if __name__ == "__main__":
    main()
