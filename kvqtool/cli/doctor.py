"""`kvqtool doctor`: whether the CUDA kernels run here, and which layers of a model they read."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from kvqtool.cli import options as opt
from kvqtool.cli.inputs import Calibration, ModelChoice, Scheme
from kvqtool.cli.output import Output, Table, values_table
from kvqtool.errors import InputError

NAME: Final = "doctor"
EPILOG: Final = """\b
Examples:
  kvqtool doctor
  kvqtool doctor builtin --spec nuq4-1%-sink1 --json
"""


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Also look at the layers of builtin, a model folder, or a Hugging Face id.",
            show_default=False,
        ),
    ] = None,
    bundle: opt.Bundle = None,
    spec: opt.Spec = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Say whether the CUDA kernels run on this machine, and which layers of a model they read."""
    if model is None and (bundle or spec):
        raise InputError("--spec and --bundle are about a model's layers; name the model too")
    scheme = Scheme.choose(bundle, spec, Calibration(None, 1, 2, 0))
    out = Output(NAME, json=json, quiet=quiet)
    from kvqtool.doctor import examine
    from kvqtool.models import resolve_device

    if model is None:
        report = examine(resolve_device(device))
    else:
        loaded = ModelChoice(model, device, dtype, revision, trust_remote_code).load(out)
        report = examine(loaded.device, loaded, scheme.read(loaded) or scheme.spec)
    table = values_table(report)
    if report.layers:
        out.note(f"{'kernels run' if report.is_ready else 'no kernels'}: {report.kernels}")
        table = Table(tuple(report.layers[0]), [tuple(row.values()) for row in report.layers])
    name = scheme.spec.name if model is not None and bundle is None else None
    out.result(spec=name, model=model, result=report, table=table)
