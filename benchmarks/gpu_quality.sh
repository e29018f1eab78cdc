#!/usr/bin/env bash
# Quality on SmolLM2 on one GPU. Processes share the GPU, each has its own limit, and none stops the others. Records go
# to $OUT (default gpu-out), 8 files without PARTS. PARTS:
#     search    budgets of bits found by measuring
#     passkey   numbers hidden in long prompts
#     frontier  everything in the tool at its true bytes
#     evaluate  what the budgets' bundles cost on a test text and two novels; waits for all before it
#     texts     the presets on more text, longer windows and two novels
#     limits    limits on loss, kept on other text
#
#     OUT=gpu-out bash benchmarks/gpu_quality.sh MODEL TEXTS [COMMIT]
#
# TEXTS holds wiki.train.part.tokens, wiki.test.raw and two novels. For a trial on a CPU, which shows that the
# script works and nothing else: SAMPLES=2 SEQ=256 WINDOWS=2 LONG=512 LENGTHS=256 TRIALS=1 SHARES=1 SET=demo.
cd "$(dirname "$0")/.." || exit 1
MODEL=${1:?name the model\'s folder} TEXTS=${2:?name the folder of texts} COMMIT=${3:-unknown}
export PYTHONPATH=$PWD PYTHONWARNINGS=ignore OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
OUT=${OUT:-gpu-out} PYTHON=${PYTHON:-python3} PARTS=${PARTS:-search passkey frontier evaluate}
SAMPLES=${SAMPLES:-16} SEQ=${SEQ:-2048} WINDOWS=${WINDOWS:-24} LONG=${LONG:-8192} LONG_WINDOWS=${LONG_WINDOWS:-10}
MANY_WINDOWS=${MANY_WINDOWS:-40}
LENGTHS=${LENGTHS:-2048,4096,8192} TRIALS=${TRIALS:-6} SHARES=${SHARES:-5}
WORK=$(mktemp -d)
mkdir -p "$OUT"
TRAIN=$TEXTS/wiki.train.part.tokens TEST=$TEXTS/wiki.test.raw

# timed SECONDS NAME COMMAND...: run in the background; stdout, stderr and seconds go to $WORK/NAME.*
timed() {
    local limit=$1 name=$2
    shift 2
    (
        started=$(date +%s.%N)
        timeout "$limit" "$@" > "$WORK/$name.json" 2> "$WORK/$name.err" || echo "$name: exit code $?"
        echo "$(date +%s.%N) $started" | awk '{ printf "%.1f\n", $1 - $2 }' > "$WORK/$name.seconds"
        echo "$name: $(cat "$WORK/$name.seconds") s"
    ) &
}

# target BITS CONTEXT NAME: a bundle that spends so many bits
target() {
    timed 420 "$3" "$PYTHON" -m kvqtool calibrate "$MODEL" --target-bits "$1" --at-context "$2" --dtype float32 \
        --dataset "$TRAIN" --samples "$SAMPLES" --seq-len "$SEQ" --json -q -o "$WORK/$3.safetensors"
}

# judge NAME TEXT LENGTH WINDOWS BUNDLE...: what bundles cost on a text
judge() {
    local name=$1 text=$2 length=$3 windows=$4 bundles=()
    shift 4
    for bundle; do bundles+=(--bundle "$WORK/$bundle.safetensors"); done
    timed 150 "$name" "$PYTHON" benchmarks/bench_quality.py "$MODEL" --calibration "$TRAIN" --dataset "$TEXTS/$text" \
        --seq-len "$length" --windows "$windows" --commit "$COMMIT" --output "$OUT/$name.json" --force "${bundles[@]}"
}

# claims NAME TEXT LENGTH WINDOWS: what the presets, calibrated here, cost on a text
claims() {
    timed 300 "$1" "$PYTHON" benchmarks/bench_quality.py "$MODEL" --calibration "$TRAIN" --samples "$SAMPLES" \
        --calibration-seq-len "$SEQ" --dataset "$TEXTS/$2" --seq-len "$3" --windows "$4" --set "${SET:-claims}" \
        --commit "$COMMIT" --output "$OUT/$1.json" --force
}

shares=() hunts=()
for part in $PARTS; do
    case $part in
    search)
        target 3.0 "$SEQ" target-3.0
        target 2.75 "$SEQ" target-2.75
        target 2.6 "$SEQ" target-2.6
        target 2.75 "$LONG" target-2.75-long
        ;;
    passkey)
        for spec in nuq3-1% nuq2-1% kvq3 kvq2; do
            hunts+=("$WORK/passkey-${spec%%%}.json")
            timed 420 "passkey-${spec%%%}" "$PYTHON" -m kvqtool ppl "$MODEL" --spec "$spec" --dtype float32 \
                --calibration-dataset "$TRAIN" --calibration-samples "$SAMPLES" --calibration-seq-len "$SEQ" \
                --task passkey --dataset "$TEST" --lengths "$LENGTHS" --trials "$TRIALS" --json -q
        done
        ;;
    frontier)
        for ((share = 0; share < SHARES; share++)); do
            shares+=("$WORK/part-$share.json")
            timed 420 "frontier-$share" "$PYTHON" benchmarks/bench_quality.py "$MODEL" --calibration "$TRAIN" \
                --samples "$SAMPLES" --calibration-seq-len "$SEQ" --dataset "$TEST" --seq-len "$SEQ" \
                --windows "$WINDOWS" --set "${SET:-frontier}" --share "$share/$SHARES" --commit "$COMMIT" \
                --output "$WORK/part-$share.json"
        done
        ;;
    texts)
        claims quality-smollm2-presets-40x2048-h200 wiki.test.raw "$SEQ" "$MANY_WINDOWS"
        claims quality-smollm2-presets-8192-h200 wiki.test.raw "$LONG" "$LONG_WINDOWS"
        claims quality-smollm2-presets-awakening-h200 chopin_awakening.txt "$SEQ" "$WINDOWS"
        claims quality-smollm2-presets-moonfleet-h200 falkner_moonfleet.txt "$SEQ" "$WINDOWS"
        ;;
    limits)
        timed 500 budget-smollm2-h200 "$PYTHON" benchmarks/bench_budget.py "$MODEL" --calibration "$TRAIN" \
            --samples "$SAMPLES" --seq-len "$SEQ" --windows "${LIMIT_WINDOWS:-12}" --commit "$COMMIT" --force \
            --max-kld 0.02 --max-kld 0.05 --max-kld 0.1 --max-ppl-ratio 1.03 --target-bits 2.75 --dataset "$TEST" \
            --dataset "$TEXTS/chopin_awakening.txt" --dataset "$TEXTS/falkner_moonfleet.txt" \
            --output "$OUT/budget-smollm2-h200.json"
        ;;
    evaluate)
        wait
        judge quality-smollm2-budget-2048-h200 wiki.test.raw "$SEQ" "$WINDOWS" target-3.0 target-2.75 target-2.6
        judge quality-smollm2-budget-awakening-h200 chopin_awakening.txt "$SEQ" "$WINDOWS" \
            target-3.0 target-2.75 target-2.6
        judge quality-smollm2-budget-moonfleet-h200 falkner_moonfleet.txt "$SEQ" "$WINDOWS" \
            target-3.0 target-2.75 target-2.6
        judge quality-smollm2-budget-8192-h200 wiki.test.raw "$LONG" "$LONG_WINDOWS" target-2.75-long
        ;;
    esac
done
wait

join() { "$PYTHON" benchmarks/join_results.py "$@" --commit "$COMMIT"; }
[ ${#shares[@]} -gt 0 ] && join quality --set "${SET:-frontier}" --output "$OUT/quality-smollm2-frontier-2048-h200.json" \
    "${shares[@]}"
ls "$WORK"/target-*.json > /dev/null 2>&1 && join runs --output "$OUT/search-smollm2-h200.json" "$WORK"/target-*.json
[ ${#hunts[@]} -gt 0 ] && join runs --output "$OUT/passkey-smollm2-h200.json" "${hunts[@]}"
for table in "$WORK"/frontier-*.json "$WORK"/quality-*.json "$WORK"/budget-*.json; do
    [ -f "$table" ] && echo "== $(basename "$table" .json)" && cat "$table"
done
for log in "$WORK"/*.err; do
    echo "== $(basename "$log")" && tail -n 30 "$log"
done > "$OUT/quality-log.txt"
[ -f "$OUT/passkey-smollm2-h200.json" ] && "$PYTHON" -c '
import json, sys
for name, run in json.load(open(sys.argv[1]))["runs"].items():
    print(name, [(row["tokens"], row["found"], row["found_baseline"]) for row in run["result"]["lengths"]])
' "$OUT/passkey-smollm2-h200.json"
rm -rf "$WORK"
