#!/usr/bin/env bash
# `make gpu-bench`: where the time goes on this GPU, in at most 330 s, from this tree alone and without a network.
#
#   make gpu-bench PYTHON=python3            on the interpreter that has torch
#   GPU_CHECK_DEVICE=cpu tests/gpu/bench.sh  a rehearsal of every stage without a GPU
#
# tests/gpu/bench.py has the stages. Results lie in $OUT, or in build/gpu-bench where that is not set (README.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tests/gpu/common.sh
exec "${PYTHON:-python3}" -m tests.gpu.bench
