#!/usr/bin/env bash
# `make quickstart` after the install: fine-tunes, merges and verifies a model, and prints one table of the results.
# All output is under build/quickstart. base/, data/ and a killed run are kept; everything else is made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly out=build/quickstart
# The Makefile sets PYTHON, PATH and MAKE_STARTED_MS, from which the duration of the install is computed.
[[ -n ${PYTHON:-} ]] || export PATH="$PWD/.venv/bin:$PATH"
readonly python=${PYTHON:-python}

export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
export DS_ACCELERATOR=cpu  # as in configs/quickstart.yaml: three ranks, with or without GPUs
export OMP_NUM_THREADS=1   # of each rank in training

now_ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }

# phase NAME COMMAND...: runs the command and records its milliseconds for the table.
phase() {
    local name=$1 start
    start=$(now_ms)
    shift
    echo "== $name"
    "$@"
    printf '%s\t%d\n' "$name" $(($(now_ms) - start)) >>"$out/phases.tsv"
}

# Runs a phase other than training, with all cores: it has the machine to itself.
plain() { env -u OMP_NUM_THREADS "$python" -m "launch.quickstart.$1" "${@:2}"; }

mkdir -p "$out"
# A killed run resumes from its last checkpoint; a run that reached its table is removed and made again.
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
