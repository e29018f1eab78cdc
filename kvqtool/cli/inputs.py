"""What commands need before their work: a model, and the bundle that compresses its cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvqtool.cli.output import Output
from kvqtool.errors import InputError
from kvqtool.ranks import ALONE, Ranks, join_ranks, read_ranks
from kvqtool.spec import DEFAULT_SPEC, KvSpec, parse_spec

if TYPE_CHECKING:
    from kvqtool.bundle import Bundle
    from kvqtool.data import Windows
    from kvqtool.fit import Fitter
    from kvqtool.models import LoadedModel
    from kvqtool.partial import Partial


@dataclass(frozen=True)
class ModelChoice:
    """The options that name a model and what it runs on."""

    name: str
    device: str
    dtype: str
    revision: str | None
    trust_remote_code: bool
    device_map: str | None = None
    read_path: str = "auto"

    def load(self, out: Output) -> LoadedModel:
        """Load the model for a command that runs in one process, and say what it runs on."""
        if not read_ranks().is_alone:
            raise InputError(f"{out.command} runs in one process; start it without torchrun")
        return self._load(self.device, ALONE, out)

    def load_shared(self, out: Output) -> LoadedModel:
        """Load this process's copy of the model, and meet the other processes if there are any."""
        from kvqtool.models import rank_device

        ranks = read_ranks()
        if self.device_map is not None and not ranks.is_alone:
            raise InputError(
                f"--device-map {self.device_map} gives one process all GPUs; "
                "drop it or start without torchrun"
            )
        device = rank_device(self.device, ranks)
        join_ranks(ranks, on_gpu=device.startswith("cuda"))
        return self._load(device, ranks, out)

    def _load(self, device: str, ranks: Ranks, out: Output) -> LoadedModel:
        from kvqtool.models import load_model

        loaded = load_model(
            self.name,
            device=device,
            dtype=self.dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            device_map=self.device_map,
        )
        loaded.ranks = ranks
        loaded.read_path = self.read_path
        places = loaded.device if ranks.is_alone else f"{ranks.world_size} x {loaded.device.type}"
        out.note(f"model {self.name} on {places}, {str(loaded.dtype).removeprefix('torch.')}")
        return loaded


@dataclass(frozen=True)
class Calibration:
    """What a spec is calibrated on."""

    dataset: str | None
    samples: int
    seq_len: int
    seed: int
    text_column: str = "text"

    def windows(self, loaded: LoadedModel, out: Output) -> Windows:
        """Draw the windows."""
        from kvqtool.data import calibration_windows, load_text

        text = load_text(self.dataset, part="calibration", text_column=self.text_column)
        seq_len = window_length(self.seq_len, loaded, out)
        return calibration_windows(
            text, loaded.tokenizer, samples=self.samples, seq_len=seq_len, seed=self.seed
        )


@dataclass(frozen=True)
class Scheme:
    """`--bundle FILE`, or `--spec SPEC` with its calibration text; checked before loading."""

    bundle: Path | None
    spec: KvSpec
    calibration: Calibration

    @classmethod
    def choose(cls, bundle: Path | None, spec: str | None, calibration: Calibration) -> Scheme:
        """Check the options against each other; neither means the default spec."""
        if bundle is not None:
            if spec is not None or calibration.dataset is not None:
                extra = "--spec" if spec is not None else "--calibration-dataset"
                raise InputError(
                    f"--bundle {bundle} is calibrated already; drop it or drop {extra}"
                )
            if not bundle.is_file():
                made_by = "write one with: kvqtool calibrate MODEL -o FILE"
                raise InputError(f"bundle {bundle} does not exist; {made_by}")
        return cls(bundle, parse_spec(spec or DEFAULT_SPEC), calibration)

    def prepare(self, loaded: LoadedModel, out: Output) -> Bundle:
        """Return the bundle: loaded and checked against the model, or made in memory."""
        bundle = self.read(loaded)
        return bundle or make_bundle(loaded, self.spec, self.calibration, out)

    def read(self, loaded: LoadedModel) -> Bundle | None:
        """Return the bundle of `--bundle`, checked against the model; None without one."""
        if self.bundle is None:
            return None
        from kvqtool.bundle import load_bundle

        bundle = load_bundle(self.bundle)
        bundle.check_model(loaded.identity.as_json())
        return bundle


def make_bundle(
    loaded: LoadedModel,
    spec: KvSpec,
    calibration: Calibration,
    out: Output,
    partial: Partial | None = None,
) -> Bundle:
    """Calibrate a spec on its text, or return a plain bundle for a spec that needs none."""
    if spec.needs_calibration:
        return learn_bundle(loaded, spec, calibration, out, partial)[0]
    from kvqtool.bundle import uncalibrated_bundle

    packed = [layer.index for layer in loaded.seam.packed]
    return uncalibrated_bundle(spec, loaded.identity.as_json(), packed)


def learn_bundle(
    loaded: LoadedModel,
    spec: KvSpec,
    calibration: Calibration,
    out: Output,
    partial: Partial | None = None,
) -> tuple[Bundle, Fitter]:
    """Calibrate a spec on its text; also return what it was fitted with."""
    from kvqtool.calibrate import fit, observe

    windows, seed = calibration.windows(loaded, out), calibration.seed
    count, seq_len = windows.ids.shape
    out.note(f"calibrating {spec.name} on {count} windows of {seq_len} from {windows.source.name}")
    with out.progress() as progress:
        fitter = observe(loaded, windows, [spec], seed=seed, progress=progress, partial=partial)
        (bundle,) = fit(loaded, windows, [spec], fitter, seed=seed, progress=progress)
    return bundle, fitter


def refuse_shared_stdin(*datasets: str | None) -> None:
    """Refuse standard input as a text where several processes would read it."""
    if "-" in datasets and not read_ranks().is_alone:
        raise InputError("standard input reaches one process only; name a file as the data set")


def window_length(seq_len: int, loaded: LoadedModel, out: Output) -> int:
    """Return `seq_len`, or the model's context where that is shorter, and say so."""
    limit = loaded.identity.max_context
    if seq_len > limit:
        out.note(f"windows are {limit} tokens, not {seq_len}: the model's context")
    return min(seq_len, limit)
