#!/usr/bin/env bash
# `make gpu-check`: what can be proven only on a GPU, in nine minutes, from this tree alone and without a network.
#
#   make gpu-check PYTHON=python3            on the interpreter that has torch
#   GPU_CHECK_DEVICE=cpu tests/gpu/check.sh  a rehearsal of every step without a GPU
#
# Every step runs, whatever the one before it did; the table at the end says what passed. Packages that the interpreter
# lacks are taken from wheels in .whl/ (README.md beside this file). Logs lie in build/gpu-check; the table and one archive
# of all logs go to $OUT too, where it is set.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source tests/gpu/common.sh
readonly seconds=${GPU_CHECK_SECONDS:-525} # of all steps; what has not begun by then is reported, not run
readonly out=build/gpu-check
# Workers of a test step. Each has ranks of its own, which share the GPU by turns: more are slower.
readonly jobs=${GPU_CHECK_JOBS:-$(($(nproc) / 8))}
workers=()

rm -rf "$out"
mkdir -p "$out"
names=() results=()
failed=0

# step LIMIT NAME COMMAND...: runs the command for at most LIMIT seconds; its output goes to a log.
step() {
    local limit=$1 name=$2 log="$out/${2//[^a-zA-Z0-9]/-}.log" start=$SECONDS code result
    shift 2
    ((limit > seconds - SECONDS)) && limit=$((seconds - SECONDS))
    if ((limit < 5)); then
        names+=("$name") results+=("NO TIME LEFT") failed=1
        echo "== $name: no time left"
        return
    fi
    echo "== $name (at most $limit s)"
    # An interrupt first: pytest then still says what has failed.
    timeout -s INT -k 10 "$limit" "$@" >"$log" 2>&1
    code=$?
    case $code in
        0) result=ok ;;
        124 | 137) result="FAILED: ran past $limit s" ;;
        *) result="FAILED: code $code" ;;
    esac
    if ((code)); then
        failed=1
        tail -n 40 "$log" | cut -c -400
        echo "-- whole log: $log"
    else
        grep -E '^(ok |FAIL)|passed|^(torch|GPU|nvcc|compiled)' "$log" | tail -n 12
    fi
    names+=("$name") results+=("$result, $((SECONDS - start)) s")
}

tests() {
    local limit=$1 name=$2
    shift 2
    step "$limit" "$name" "$python" -m pytest -q -rs -p no:cacheprovider "${workers[@]}" "$@"
}

# short_run NAME LAUNCHER RANKS DTYPE COLLECTIVE
short_run() {
    step 90 "$1" "$python" -m tests.gpu.short_run --launcher "$2" --ranks "$3" --dtype "$4" --collective "$5" \
        --device "$device" --out "$out/run-${1//[^a-zA-Z0-9]/-}"
}

if wheels_wanted; then
    step 60 "carried wheels" "${install_wheels[@]}"
fi
if ((jobs > 1)) && "$python" -c 'import xdist' 2>/dev/null; then
    workers=(-n "$jobs" --dist worksteal)
fi
((${#workers[@]})) || echo "tests run one at a time: no pytest-xdist, or too few cores for $jobs workers"
step 60 "environment" "$python" -m tests.gpu.environment --device "$device"
step 180 "build the extension" "${build_extension[@]}"
tests 90 "collectives, products, masks" tests/gpu/test_device.py
tests 150 "operators" tests/unit/test_ops_*.py tests/unit/test_linear_autograd.py \
    tests/unit/test_extension.py
tests 90 "low-rank linears, float64" tests/dist/test_linears.py

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0)
nccl=nccl
[[ $device == cuda ]] || { nccl=gloo gpus=0; }
short_run "train, N = 1, $nccl, deepspeed" deepspeed 1 fp32 "$nccl"
if ((gpus > 1)); then
    short_run "train, TP 2, nccl, deepspeed" deepspeed 2 fp32 nccl
    short_run "train, TP 2, nccl, bf16" deepspeed 2 bf16 nccl
fi
# Two ranks on one GPU, however many there are.
visible=${CUDA_VISIBLE_DEVICES:-0}
for dtype in fp32 bf16; do
    CUDA_VISIBLE_DEVICES=${visible%%,*} short_run "train, TP 2, gloo, $dtype, torchrun" torchrun 2 "$dtype" gloo
done

tests 120 "logits against transformers" tests/dist/test_logits.py
tests 150 "twins" tests/dist/test_twins.py
tests 150 "methods' twins" tests/dist/test_methods.py
tests 120 "batches" tests/dist/test_batches.py
tests 120 "generation" tests/dist/test_generate_ranks.py
tests 90 "PEFT's loss curve" tests/integration/test_peft_curve.py

{
    printf '\n%s, %d GPUs, %d s\n' "$device" "$gpus" "$SECONDS"
    for i in "${!names[@]}"; do
        printf '%-40s %s\n' "${names[i]}" "${results[i]}"
    done
} | tee "$out/table.txt"
if [[ -n ${OUT:-} ]]; then
    mkdir -p "$OUT"
    cp "$out/table.txt" "$OUT/gpu-check.txt"
    tar -czf "$OUT/gpu-check-logs.tar.gz" -C "$out" --exclude 'run-*' .
fi
exit "$failed"
