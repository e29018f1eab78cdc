"""`kvqtool calibrate`: fit codebooks and write a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvqtool.cli import options as opt
from kvqtool.cli.inputs import Calibration, ModelChoice, make_bundle, refuse_shared_stdin
from kvqtool.cli.output import Output, Table
from kvqtool.cli.reports import note_layers
from kvqtool.errors import InputError
from kvqtool.files import check_output
from kvqtool.ranks import Ranks
from kvqtool.spec import DEFAULT_SPEC, parse_spec

if TYPE_CHECKING:
    from kvqtool.partial import Partial

NAME: Final = "calibrate"
EPILOG: Final = """\b
Examples:
  kvqtool calibrate builtin --samples 4 --seq-len 512 -o nuq3.safetensors
  kvqtool calibrate builtin --spec int4-1% --samples 2 --seq-len 256 -o int4.safetensors
"""


def run(
    model: opt.Model,
    *,
    spec: opt.Spec = None,
    dataset: opt.Dataset = None,
    text_column: opt.TextColumn = "text",
    samples: opt.Samples = opt.SAMPLES,
    seq_len: opt.SeqLen = opt.SEQ_LEN,
    output: opt.RequiredOutput,
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
    """Fit a spec's codebooks to a model on some text and write them to a bundle."""
    scheme = parse_spec(spec or DEFAULT_SPEC)
    refuse_shared_stdin(dataset)
    check_output(output, force)
    out = Output(NAME, json=json, quiet=quiet)
    choice = ModelChoice(model, device, dtype, revision, trust_remote_code, device_map)
    loaded = choice.load_shared(out)
    from kvqtool.bundle import save_bundle
    from kvqtool.usage import describe_layers

    calibration = Calibration(dataset, samples, seq_len, seed, text_column)
    partial = _partial(output, resume, loaded.ranks, out)
    bundle = make_bundle(loaded, scheme, calibration, out, partial)
    with loaded.ranks.together():
        if loaded.ranks.is_first:
            save_bundle(bundle, output, force=force)
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
    path_line = Table((), [(str(output),)])
    out.result(spec=bundle.name, model=model, result=result, table=path_line)


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
