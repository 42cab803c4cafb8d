# What check.sh and bench.sh share; sourced at the root of the repository.
# shellcheck shell=bash

# Packages that the interpreter lacks are installed into build/gpu-site from wheels in .whl/ (README.md).
export PYTHONPATH="$PWD:$PWD/build/gpu-site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export LOWRANK_DIST_TEST_DEVICE=${GPU_CHECK_DEVICE:-cuda}
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# All ranks are on this machine, whose own name may mean nothing where there is no network.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
