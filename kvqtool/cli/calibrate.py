"""`kvqtool calibrate`: fit codebooks and write a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvqtool.cli import options as opt
from kvqtool.cli.inputs import (
    Calibration,
    ModelChoice,
    learn_bundle,
    make_bundle,
    refuse_shared_stdin,
)
from kvqtool.cli.output import Output, Table
from kvqtool.cli.plot_bundle import Picture
from kvqtool.cli.reports import note_layers
from kvqtool.errors import InputError
from kvqtool.files import check_output
from kvqtool.ranks import Ranks
from kvqtool.spec import DEFAULT_SPEC, KvSpec, parse_spec

if TYPE_CHECKING:
    from kvqtool.bundle import Bundle
    from kvqtool.fit import Fitter
    from kvqtool.models import LoadedModel
    from kvqtool.partial import Partial

NAME: Final = "calibrate"
EPILOG: Final = """\b
Examples:
  kvqtool calibrate builtin --samples 4 --seq-len 512 -o kvq3.safetensors
  kvqtool calibrate builtin --target-bits 2.75 --samples 2 --seq-len 256 -o small.safetensors
"""
# Windows of the calibration text that candidates are measured on, drawn by a seed of their own.
_HELD_OUT, _HELD_OUT_SEED = 4, 1_000_003


def run(
    model: opt.Model,
    *,
    spec: opt.Spec = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            "--target-bits",
            min=0.1,
            max=16.0,
            help="Spend so many bits a number, layer by layer, where the loss feels it.",
        ),
    ] = None,
    max_kld: Annotated[
        float | None,
        typer.Option(
            "--max-kld", min=0.0, help="Use the fewest bits that keep this KL divergence."
        ),
    ] = None,
    max_ppl_ratio: Annotated[
        float | None,
        typer.Option(
            "--max-ppl-ratio", min=1.0, help="Use the fewest bits that keep this perplexity ratio."
        ),
    ] = None,
    at_context: Annotated[
        int, typer.Option("--at-context", min=1, help="Tokens that a budget's bits are counted at.")
    ] = 8192,
    dataset: opt.Dataset = None,
    text_column: opt.TextColumn = "text",
    samples: opt.Samples = opt.SAMPLES,
    seq_len: opt.SeqLen = opt.SEQ_LEN,
    output: opt.RequiredOutput,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw codebooks, sensitivity and the frontier; needs pip install 'kvqtool[plot]'.",
        ),
    ] = None,
    force: opt.Force = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the statistics that a stopped run left beside the output."
        ),
    ] = False,
    device: opt.Device = "auto",
    device_map: opt.DeviceMap = None,
    dtype: opt.Dtype = "auto",
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Fit a spec's codebooks to a model on some text and write them to a bundle.

    kvq4, kvq3 and kvq2 are the best recipes measured at each width: KVQuant with a codebook per key
    channel and compensated rounding, the bytes of 4, 3 or 2 bits and 1 % outliers spent layer by
    layer. --target-bits, --max-kld and --max-ppl-ratio spend a budget of yours, by measuring.
    """
    scheme = parse_spec(spec or DEFAULT_SPEC)
    limits = {"--target-bits": target_bits, "--max-kld": max_kld, "--max-ppl-ratio": max_ppl_ratio}
    _refuse_several(limits)
    refuse_shared_stdin(dataset)
    check_output(output, force)
    picture = None if plot is None else Picture(plot, scheme, force)
    out = Output(NAME, json=json, quiet=quiet)
    choice = ModelChoice(model, device, dtype, revision, trust_remote_code, device_map)
    loaded = choice.load_shared(out)
    from kvqtool.bundle import save_bundle
    from kvqtool.usage import describe_layers

    calibration = Calibration(dataset, samples, seq_len, seed, text_column)
    partial = _partial(output, resume, loaded.ranks, out)
    fitter = None
    if any(limit is not None for limit in limits.values()):
        limit = target_bits, max_kld, max_ppl_ratio, at_context
        bundle, fitter = _spend(loaded, scheme, limit, (calibration, partial), out)
    elif scheme.needs_calibration:
        bundle, fitter = learn_bundle(loaded, scheme, calibration, out, partial)
    else:
        bundle = make_bundle(loaded, scheme, calibration, out)
    with loaded.ranks.together():
        if loaded.ranks.is_first:
            save_bundle(bundle, output, force=force)
            if picture and fitter:
                picture.draw(bundle, fitter)
    partial.remove()
    if not loaded.ranks.is_first:
        return
    layers = describe_layers(loaded.seam, bundle)
    result = {
        "path": str(output),
        "bundle_bytes": bundle.bundle_bytes,
        "file_bytes": output.stat().st_size,
        "provenance": bundle.provenance,
        "layers": layers,
    }
    note_layers(layers, out)
    if plot is not None:
        out.note(f"drew {plot}")
    path_line = Table((), [(str(output),)])
    out.result(spec=bundle.spec.name, model=model, result=result, table=path_line)


def _refuse_several(limits: Mapping[str, float | None]) -> None:
    """Refuse limits that compete, by option."""
    given = [name for name, limit in limits.items() if limit is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} each set the budget; keep one")


def _spend(
    loaded: LoadedModel,
    scheme: KvSpec,
    limit: tuple[float | None, float | None, float | None, int],
    how: tuple[Calibration, Partial],
    out: Output,
) -> tuple[Bundle, Fitter]:
    """Calibrate a bundle that keeps a budget; also return what it was fitted with."""
    from kvqtool.budget import Budget
    from kvqtool.search import observe_for, search

    calibration, partial = how
    windows, seed = calibration.windows(loaded, out), calibration.seed
    held_out = replace(calibration, samples=_HELD_OUT, seed=seed + _HELD_OUT_SEED)
    texts = windows, held_out.windows(loaded, out)
    goal = scheme, Budget(*limit)
    out.note(f"spending a budget on {scheme.name}, measured on {_HELD_OUT} more windows")
    with out.progress() as progress:
        fitter = observe_for(loaded, windows, scheme, seed=seed, progress=progress, partial=partial)
        known = fitter, partial
        return search(loaded, texts, goal, known, seed=seed, progress=progress), fitter


def _partial(output: Path, resume: bool, ranks: Ranks, out: Output) -> Partial:
    """Return where statistics are kept, and say what becomes of those that are there."""
    from kvqtool.partial import Partial, partial_path, process_counts

    path = partial_path(output, ranks)
    others = process_counts(output) - {ranks.world_size}
    if resume and others and not path.exists():
        raise InputError(
            f"the run that stopped had {min(others)} processes, this one has {ranks.world_size}; "
            "start as many, or start over without --resume"
        )
    if path.exists() and not resume:
        out.note(f"{path} is left by a stopped run and is replaced; --resume would go on from it")
    elif path.exists():
        out.note(f"going on from {path}")
    elif resume:
        out.note(f"nothing to go on from: {path} does not exist")
    return Partial(path, resume)
