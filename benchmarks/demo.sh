#!/usr/bin/env bash
# The whole tool on the built-in model, in about two minutes on two cores: quality against bytes, then a document's
# cache saved, continued and planned. No GPU, no network, nothing left behind. `make demo` runs it;
#
#     PYTHON=/path/to/python benchmarks/demo.sh
#
# runs it with a Python of your own. Scratch files live in a temporary folder that is removed at the end.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
cd "$work"

say() { printf '\n== %s\n\n' "$*"; }

exec 3>&1 # commands are shown even where their own output is put away
kvqtool() {
  local word shown=''
  for word in "$@"; do
    [[ $word == *" "* ]] && word="\"$word\""
    shown+=" $word"
  done
  printf '$ kvqtool%s\n' "$shown" >&3
  "$python" -m kvqtool "$@"
}

say "1/5  Nine ways to store the cache of a 5M-parameter model that ships with kvqtool"
printf '%s\n' \
  "Calibrated on one half of Python's own documentation, scored on the other half, 12 windows of 1024 tokens." \
  "fp is the control: the exact cache, in the float32 this run uses on a CPU. Bits and bytes are measured on the" \
  "tensors allocated, ratio and divergence against the model's own cache." ""
table=(builtin --set demo --seq-len 1024 --windows 12)
printf '$ python benchmarks/bench_quality.py %s\n' "${table[*]}"
"$python" "$root/benchmarks/bench_quality.py" "${table[@]}" 2>progress.log || { cat progress.log >&2; exit 1; }

say "2/5  Calibrate one scheme, the default: kvq3, the bytes of 3-bit codes and 1 % outliers spent layer by layer"
kvqtool calibrate builtin --samples 4 --seq-len 1024 --output kvq3.safetensors

say "3/5  Read a document once and save its compressed cache"
"$python" -c 'from pydoc_data.topics import topics; print(topics["typesseq-mutable"])' >document.txt
printf 'document.txt: the documentation of mutable sequences, %s bytes\n' "$(wc -c <document.txt)"
kvqtool quantize-cache builtin --bundle kvq3.safetensors --text document.txt --output document.kv.safetensors

say "4/5  Go on from the saved cache, without reading the document again"
kvqtool generate builtin --cache document.kv.safetensors --prompt " A list is" --max-new-tokens 40

say "5/5  Plan: 128 sequences of 4096 tokens in 3 GiB, the run's highest point included; which schemes fit?"
kvqtool memory-plan builtin --context 4096 --batch 128 --prefill-chunk 128 --gpu-memory 3GiB \
  --output plan.tsv >/dev/null
cut -f1,11,15,20,23,25 plan.tsv | expand -t 20

say "Done. The temporary folder $work is removed."
