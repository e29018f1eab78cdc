"""Every option that commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from kvqtool.spec import DEFAULT_SPEC

DtypeName = Literal["auto", "float16", "bfloat16", "float32"]
DeviceMapName = Literal["auto"]
PrefillName = Literal["exact", "decode-exact"]
ReadPathName = Literal["auto", "fused", "materialise"]
SAMPLES: Final = 16
SEQ_LEN: Final = 2048

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="builtin, a model folder, or a Hugging Face id.",
    ),
]

# What to compress with.
Bundle = Annotated[
    Path | None,
    typer.Option("--bundle", metavar="FILE", help="Bundle written by kvqtool calibrate."),
]
Spec = Annotated[
    str | None,
    typer.Option(
        "--spec",
        metavar="SPEC",
        show_default=DEFAULT_SPEC,
        help="Scheme: nuq3-1%-sink1, int4-g64, fp, ...; calibrated in memory if it has to be.",
    ),
]
CalibrationDataset = Annotated[
    str | None,
    typer.Option(
        "--calibration-dataset",
        metavar="TEXT",
        show_default="builtin text",
        help="What --spec is calibrated on: a file, - or a hub data set.",
    ),
]
CalibrationSamples = Annotated[
    int,
    typer.Option("--calibration-samples", min=1, help="Windows that --spec is calibrated on."),
]
CalibrationSeqLen = Annotated[
    int,
    typer.Option(
        "--calibration-seq-len",
        min=2,
        help="Tokens in such a window; capped to the model's context.",
    ),
]

# What to read.
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="TEXT",
        show_default="builtin text",
        help="Text, .jsonl or .parquet file; - for stdin; or hub name owner/name[:config][@split].",
    ),
]
TextColumn = Annotated[
    str, typer.Option("--text-column", help="Column of a .jsonl, .parquet or hub data set.")
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Windows to calibrate on.")]
SeqLen = Annotated[
    int,
    typer.Option("--seq-len", min=2, help="Tokens in a window; capped to the model's context."),
]
ReadPath = Annotated[
    ReadPathName,
    typer.Option(
        "--read-path",
        help="auto: the fused CUDA kernel in every layer it knows, torch in the others; "
        "fused: the kernel, or an error; materialise: torch.",
    ),
]
Prefill = Annotated[
    PrefillName,
    typer.Option(
        "--prefill",
        help="exact: the prompt attends to exact states, then they are packed; "
        "decode-exact: to what decoding would have stored.",
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk",
        min=1,
        show_default="whole",
        help="Tokens of a prompt that one call reads; later calls attend to what is stored.",
    ),
]

# Where it goes.
RequiredOutput = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.", show_default=False)
]
CopyOutput = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Also write the result to a file: TSV, or JSON with --json.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; its keys: docs/json.md.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# What it runs on.
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
DeviceMap = Annotated[
    DeviceMapName | None,
    typer.Option(
        "--device-map",
        show_default="none",
        help="auto: spread the layers over all GPUs; needs accelerate.",
    ),
]
Dtype = Annotated[
    DtypeName,
    typer.Option("--dtype", help="auto: float32 on a CPU, the checkpoint's own on a GPU."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything that is drawn at random.")]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="NAME", help="Hub branch, tag or commit of the model."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's own Python code run.")
]
