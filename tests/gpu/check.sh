#!/usr/bin/env bash
# `make gpu-check`: what can be proven only on a GPU, in at most 330 s, from this tree alone and without a network.
#
#   make gpu-check PYTHON=python3            on the interpreter that has torch
#   GPU_CHECK_DEVICE=cpu tests/gpu/check.sh  a rehearsal of every stage without a GPU
#
# tests/gpu/check.py has the stages. Results lie in $OUT, or in build/gpu-check where that is not set (README.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tests/gpu/common.sh
exec "${PYTHON:-python3}" -m tests.gpu.check
