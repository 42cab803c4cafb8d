#!/usr/bin/env bash
# `make gpu-bench`: what adapter layers and low-rank updates add to a forward pass on this GPU (benchmarks/latency.py),
# training steps of each method (benchmarks/training.py), and what the low-rank path costs a layer in training
# (benchmarks/overhead.py), in nine minutes, without a network.
#
#   make gpu-bench PYTHON=python3            on the interpreter that has torch
#   GPU_CHECK_DEVICE=cpu tests/gpu/bench.sh  a rehearsal without a GPU; further words go to benchmarks/overhead.py
#
# Tables are printed; JSON, tables, picture and log of the build go to $OUT, or to build/gpu-bench where it is not set.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source tests/gpu/common.sh
readonly seconds=${GPU_CHECK_SECONDS:-525}
readonly out=${OUT:-build/gpu-bench}

mkdir -p "$out"
if wheels_wanted; then
    timeout 60 "${install_wheels[@]}" || exit 1
fi
if ! timeout -k 5 180 "${build_extension[@]}" >"$out/build.txt" 2>&1; then
    tail -n 40 "$out/build.txt" | cut -c -400
    echo "the extension was not built; whole log: $out/build.txt" >&2
    exit 1
fi
tail -n 1 "$out/build.txt"

# measure NAME LIMIT WORDS...: one benchmark, in at most LIMIT seconds.
measure() {
    local name=$1 limit=$2 code
    shift 2
    timeout -k 5 "$limit" "$python" "benchmarks/$name.py" --device "$device" --out "$out" "$@" 2>&1 |
        tee "$out/$name.txt"
    code=${PIPESTATUS[0]}
    ((code == 0)) || echo "benchmarks/$name.py ends with code $code after $SECONDS s (124: ran past its time)" >&2
    return "$code"
}

failed=0
if [[ $device == cuda ]]; then
    measure latency 210 || failed=$?
    measure training 120 || failed=$?
else
    measure latency 210 --settings 1x128:2 --tp 1 || true # two trials of a rehearsal: its verdict means nothing
    measure training 120 --methods lora full --layers 1 --length 64 --steps 3 || failed=$?
fi
measure overhead $((seconds - SECONDS)) "$@" || failed=$?
exit "$failed"
