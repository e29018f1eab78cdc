"""Statistics put aside at any window of either pass are taken up to the same bundle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvqtool.bundle import save_bundle
from kvqtool.calibrate import calibrate
from kvqtool.data import NO_BOS, Text, Windows
from kvqtool.errors import BundleError
from kvqtool.identity import identify
from kvqtool.models import LoadedModel
from kvqtool.partial import Partial, partial_path, process_counts
from kvqtool.ranks import ALONE, Ranks
from kvqtool.spec import parse_spec

WINDOWS = 3
SPECS = ("nuq3-1%-sink1", "nuq2-pc/int4-g16", "nuq2-1%-postrope")
PASSES = ("sketching key ranges", "measuring sensitivity")


class StoppedError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def loaded(tiny_llama: Callable[..., Any], builtin: LoadedModel) -> LoadedModel:
    model = tiny_llama()
    identity = identify(model, builtin.tokenizer, name="tiny")
    return LoadedModel(identity, model, builtin.tokenizer, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def windows() -> Windows:
    ids = torch.randint(0, 256, (WINDOWS, 24), generator=torch.Generator().manual_seed(0))
    return Windows(ids, torch.ones(WINDOWS, dtype=torch.int64), Text("", "t", "0"), NO_BOS, 24)


def run(
    loaded: LoadedModel, windows: Windows, partial: Partial, stop: tuple[str, int] | None = None
) -> list[tuple[str, int]]:
    """Calibrate, or be stopped before a window; return the windows that were run."""
    seen: list[tuple[str, int]] = []

    def listen(phase: str, done: int, total: int) -> None:
        if (phase, done) == stop:
            raise StoppedError
        if phase in PASSES and done < total:
            seen.append((phase, done))

    bundles = calibrate(
        loaded, windows, [parse_spec(spec) for spec in SPECS], progress=listen, partial=partial
    )
    for number, bundle in enumerate(bundles):
        save_bundle(bundle, partial.path.with_name(f"{number}.bundle"), force=True)
    return seen


def bundles_in(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.bundle"))]


@pytest.mark.parametrize("phase", PASSES)
@pytest.mark.parametrize("window", (1, WINDOWS))
def test_a_run_goes_on_where_it_was_to_the_same_bundle(
    loaded: LoadedModel, windows: Windows, tmp_path: Path, phase: str, window: int
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    every = run(loaded, windows, Partial(whole / "p"))
    assert not (whole / "p").exists()  # 32 windows or a minute apart, by default
    with pytest.raises(StoppedError):
        run(loaded, windows, Partial(stopped / "p", every_windows=1), (phase, window))
    rest = run(loaded, windows, Partial(stopped / "p", resume=True))
    assert rest == every[every.index((phase, window - 1)) + 1 :]
    assert len(bundles_in(stopped)) == len(SPECS)
    assert bundles_in(stopped) == bundles_in(whole)


def test_time_too_makes_it_write(loaded: LoadedModel, windows: Windows, tmp_path: Path) -> None:
    partial = Partial(tmp_path / "p", every_seconds=0.0)
    with pytest.raises(StoppedError):
        run(loaded, windows, partial, (PASSES[0], 1))
    assert partial.path.exists()
    partial.remove()
    partial.remove()
    assert not partial.path.exists()


def test_other_windows_of_the_same_text_are_refused(
    loaded: LoadedModel, windows: Windows, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        run(loaded, windows, Partial(tmp_path / "p", every_windows=1), (PASSES[0], 1))
    other = Windows(windows.ids.flip(0), windows.scored_from, windows.source, NO_BOS, 24)
    with pytest.raises(BundleError, match=r"p is of another calibration \(windows_sha256: "):
        run(loaded, other, Partial(tmp_path / "p", resume=True))


def test_every_process_has_its_own_file(tmp_path: Path) -> None:
    output = tmp_path / "b.safetensors"
    assert partial_path(output, ALONE).name == "b.safetensors.partial.safetensors"
    assert partial_path(output, Ranks(2, 8)).name == "b.safetensors.partial-2-of-8.safetensors"
    assert process_counts(output) == set()
    for ranks in (ALONE, Ranks(1, 2), Ranks(2, 8), Ranks(3, 8)):
        partial_path(output, ranks).touch()
    partial_path(tmp_path / "a.safetensors", Ranks(0, 5)).touch()
    assert process_counts(output) == {1, 2, 8}
