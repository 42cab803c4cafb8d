# What check.sh and bench.sh share; sourced at the root of the repository.
# shellcheck shell=bash disable=SC2034

readonly python=${PYTHON:-python3}
readonly device=${GPU_CHECK_DEVICE:-cuda}
readonly site=build/gpu-site

export PYTHONPATH="$PWD:$PWD/$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export LOWRANK_DIST_TEST_DEVICE=$device HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# All ranks are on this machine, whose own name may mean nothing where there is no network.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}

# Packages that the interpreter lacks come from .whl/ (README.md).
readonly wheels=(.whl/*.whl)
readonly install_wheels=("$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade
    --target "$site" "${wheels[@]}")
wheels_wanted() { [[ -e ${wheels[0]} ]] && ! "$python" -m tests.gpu.environment --missing; }

# Both libraries; without the one for this device nothing that follows would mean anything.
# shellcheck disable=SC2016
readonly build_extension=(bash -c '"$0" setup.py build_ext --inplace && "$0" -c "
import sys
from lowrank_dist.ops.extension import demand, describe
demand(sys.argv[1])
print(describe(sys.argv[1]))
" "$1"' "$python" "$device")
