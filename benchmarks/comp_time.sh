#!/usr/bin/env bash
# What compensated rounding costs in time on a CPU: calibration and scoring with it and without, in turn. Seconds are
# the process's own, which other work on the machine hardly changes. Records go to $OUT (default gpu-out), seconds and
# their ratios to stdout.
#
#     OUT=gpu-out bash benchmarks/comp_time.sh NAME WINDOWS SEQ_LEN [COMMIT] -- MODEL [OPTIONS OF bench_quality.py]
cd "$(dirname "$0")/.." || exit 1
NAME=${1:?name the records} WINDOWS=${2:?how many windows} SEQ=${3:?tokens of a window} COMMIT=unknown
shift 3
[ "$1" != -- ] && COMMIT=$1 && shift
shift
export PYTHONPATH=$PWD PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
OUT=${OUT:-gpu-out} PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
for pair in without:nuq3-1%-sink1-pc with:nuq3-1%-sink1-pc-comp/nuq3-1%-sink1-comp; do
    timeout 900 "$PYTHON" benchmarks/bench_quality.py "$@" --spec "${pair#*:}" --device cpu --samples "$WINDOWS" \
        --calibration-seq-len "$SEQ" --seq-len "$SEQ" --windows "$WINDOWS" --commit "$COMMIT" --force \
        --output "$OUT/comp-time-$NAME-${pair%%:*}-cpu.json" > /dev/null 2>&1 || echo "${pair%%:*}: exit code $?"
done
"$PYTHON" - "$OUT/comp-time-$NAME" <<'PYTHON_END'
import json
import sys

runs = [json.load(open(f"{sys.argv[1]}-{each}-cpu.json")) for each in ("without", "with")]
for what, key in (
    ("calibrate", "calibrate_cpu_seconds"),
    ("score, baseline included", "evaluate_cpu_seconds"),
):
    plain, compensated = (run[key] for run in runs)
    print(f"{what}: {plain:.1f} s without, {compensated:.1f} s with, {compensated / plain:.2f}x")
PYTHON_END
