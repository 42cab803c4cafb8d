#!/usr/bin/env bash
# `make cuda-build-check`: builds both libraries with setup.py against a CUDA build of torch, on a machine without a GPU.
#
# Wants nvcc, a C++ compiler and a package index for one download of 530 MB, kept in build/cuda-torch. What was built,
# the build's log and ptxas' report lie in build/cuda-build-check. No kernel is loaded or run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly python=${PYTHON:-python3} out=build/cuda-build-check
rm -rf "$out"
mkdir -p "$out"

torch=$("$python" -m tests.cuda_build.cuda_torch)
export PYTHONPATH="$torch:$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Some machines' compilers do this unasked, and setup.py must not let them.
export CXX="${CXX:-c++} -static-libstdc++"
# The architectures are those that ship; nvcc itself appends what the report needs to setup.py's flags.
unset TORCH_CUDA_ARCH_LIST
if ! NVCC_APPEND_FLAGS="-Xptxas=-v" MAX_JOBS=${JOBS:-2} "$python" setup.py build_ext \
    --build-lib "$out/lib" --build-temp "$out/temp" >"$out/build.log" 2>&1; then
    grep -nE 'error|undefined' "$out/build.log" | head -n 20 || true
    tail -n 5 "$out/build.log"
    echo "the build failed; whole log: $out/build.log" >&2
    exit 1
fi
"$python" -m tests.cuda_build.ptxas "$out/build.log" "$out"
"$python" -m pytest -q -p no:cacheprovider tests/cuda_build
printf 'built against %s in %d s: ' "$(basename "$torch")" "$SECONDS"
du -h "$out"/lib/lowrank_dist/ops/*.so | awk '{printf "%s %s  ", $2, $1} END {print ""}'
