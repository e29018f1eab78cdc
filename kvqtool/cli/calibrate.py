"""`kvqtool calibrate`: fit codebooks and write a bundle."""

from __future__ import annotations

from typing import Final

from kvqtool.cli import options as opt
from kvqtool.cli.inputs import Calibration, ModelChoice, make_bundle
from kvqtool.cli.output import Output, Table
from kvqtool.files import check_output
from kvqtool.spec import DEFAULT_SPEC, parse_spec

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
    device: opt.Device = "auto",
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
    check_output(output, force)
    out = Output(NAME, json=json, quiet=quiet)
    loaded = ModelChoice(model, device, dtype, revision, trust_remote_code).load(out)
    from kvqtool.bundle import save_bundle

    calibration = Calibration(dataset, samples, seq_len, seed, text_column)
    bundle = make_bundle(loaded, scheme, calibration, out)
    save_bundle(bundle, output, force=force)
    result = {
        "path": str(output),
        "bundle_bytes": bundle.bundle_bytes,
        "file_bytes": output.stat().st_size,
        "provenance": bundle.provenance,
    }
    path_line = Table((), [(str(output),)])
    out.result(spec=str(scheme), model=model, result=result, table=path_line)
