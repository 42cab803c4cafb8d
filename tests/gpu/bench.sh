#!/usr/bin/env bash
# `make gpu-bench`: what the low-rank path costs on this GPU (benchmarks/overhead.py), in nine minutes, without a network.
#
#   make gpu-bench PYTHON=python3            on the interpreter that has torch
#   GPU_CHECK_DEVICE=cpu tests/gpu/bench.sh  a rehearsal without a GPU; further words go to benchmarks/overhead.py
#
# The table is printed; JSON, table and log of the build go to $OUT, or to build/gpu-bench where it is not set.
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
timeout -k 5 $((seconds - SECONDS)) "$python" benchmarks/overhead.py --device "$device" --out "$out" "$@" 2>&1 |
    tee "$out/overhead.txt"
code=${PIPESTATUS[0]}
((code == 0)) || echo "benchmarks/overhead.py ends with code $code after $SECONDS s (124: ran past its time)" >&2
exit "$code"
