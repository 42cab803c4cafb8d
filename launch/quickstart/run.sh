#!/usr/bin/env bash
# `make quickstart`, once everything is installed: a fine-tuned, merged and proven model, and one table of what happened.
# Everything it makes lies under build/quickstart; base/ and data/ are kept, and a run that was killed; the rest is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly out=build/quickstart
# The Makefile says which interpreter, has its bin folder on PATH, and notes when it started, which dates the install.
[[ -n ${PYTHON:-} ]] || export PATH="$PWD/.venv/bin:$PATH"
readonly python=${PYTHON:-python}

export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
export DS_ACCELERATOR=cpu  # as configs/quickstart.yaml: three ranks whatever GPUs there are
export OMP_NUM_THREADS=1   # of each rank in training

now_ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }

# phase NAME COMMAND...: runs the command and notes its milliseconds for the table.
phase() {
    local name=$1 start
    start=$(now_ms)
    shift
    echo "== $name"
    "$@"
    printf '%s\t%d\n' "$name" $(($(now_ms) - start)) >>"$out/phases.tsv"
}

# What is not training has the machine to itself, with all its cores.
plain() { env -u OMP_NUM_THREADS "$python" -m launch.quickstart."$@"; }

mkdir -p "$out"
# A run that was killed goes on from its last checkpoint; one that came to its table is made anew.
[[ ! -f $out/report.json ]] || rm -rf "$out"/run
rm -rf "$out"/merged "$out"/*.json
printf 'install\t%d\n' $(($(now_ms) - ${MAKE_STARTED_MS:-$(now_ms)})) >"$out/phases.tsv"

phase prepare plain prepare --out "$out"
phase "evaluate base" plain evaluate score --model "$out/base" --data "$out/data/eval.jsonl" --out "$out/base.json"
phase train deepspeed --num_gpus 3 launch/train.py configs/quickstart.yaml
phase merge lowrank-dist merge --base "$out/base" --adapter "$out/run/adapter" --out "$out/merged"
phase "evaluate merged" plain evaluate score --model "$out/merged" --data "$out/data/eval.jsonl" --out "$out/merged.json"
phase prove plain evaluate prove --base "$out/base" --adapter "$out/run/adapter" --merged "$out/merged" \
    --probe "$out/run/probe.safetensors" --out "$out/proof.json"
"$python" -m launch.quickstart.report --out "$out"
