#!/usr/bin/env bash
# Everything the CUDA kernels need from a GPU, in one command of about eight minutes; each part has its own limit and
# none stops the others. Records go to $OUT (default gpu-out), a summary to stdout.
#
#     OUT=gpu-out bash benchmarks/gpu_session.sh [COMMIT]
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=$PWD PYTHONWARNINGS=ignore KVQTOOL_REQUIRE_GPU=1
OUT=${OUT:-gpu-out} COMMIT=${1:-unknown} PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"

echo "== compile"
timeout 120 "$PYTHON" benchmarks/warm_kernels.py 2>&1 | tail -5
echo "== tests"
timeout 300 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark tests/gpu 2>&1 | tee "$OUT/tests.txt" | grep -E "^FAILED|passed|failed" | tail -20
echo "== attention"
timeout 60 "$PYTHON" benchmarks/bench_attention.py --quick --commit "$COMMIT" --output "$OUT/attention.json" 2>&1 | grep -E " us |rror"
echo "== which settings are faster"
timeout 90 "$PYTHON" benchmarks/choose_settings.py --compile | tail -3
timeout 90 "$PYTHON" benchmarks/choose_settings.py --commit "$COMMIT" --output "$OUT/settings.json" 2>/dev/null
echo "== where the time goes"
timeout 60 "$PYTHON" benchmarks/profile_attend.py --spec nuq4-1% --spec nuq2-1% --shapes 1,32,8,4096 --shapes 1,32,8,32768 \
    --shapes 4,32,8,131072 2>&1 | tee "$OUT/profile.txt"
echo "== products alone"
timeout 60 "$PYTHON" benchmarks/bench_matvec.py --commit "$COMMIT" > "$OUT/matvec.json"
echo "== without fusion"
timeout 40 "$PYTHON" benchmarks/bench_attention.py --quick --rounds 5 --dequantize --commit "$COMMIT" --spec nuq4-1% \
    --shapes 1,32,32,131072 --shapes 4,32,8,131072 --output "$OUT/dequantize.json" 2>&1 | grep -E "dequantize|rror"
echo "== pack and append"
timeout 60 "$PYTHON" benchmarks/bench_packing.py --commit "$COMMIT" > "$OUT/packing.json" && cat "$OUT/packing.json"
echo "== profiles"
for shape in "nuq4-1% 1,32,32,131072" "nuq2-1% 4,32,8,131072" "nuq4-1% 1,32,8,4096"; do
    read -r spec at <<< "$shape"
    file=$OUT/ncu-${spec%%-*}-${at//,/-}.txt
    timeout 30 ncu --clock-control none -k attend -s 2 -c 1 --section SpeedOfLight --section WarpStateStats \
        --section ComputeWorkloadAnalysis --section InstructionStats --section Occupancy \
        "$PYTHON" benchmarks/bench_attention.py --quick --once --spec "$spec" --shapes "$at" > "$file" 2>&1
    echo "$shape"
    grep -E "Duration|DRAM Throughput|L1/TEX Cache|Ipc Active|Issue Slots|Per Issued|Theoretical Active" "$file"
done
echo "== sanitizer"
for tool in memcheck racecheck; do
    timeout 60 compute-sanitizer --tool $tool "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark tests/gpu/test_packing.py 2>&1 | tail -4
done
