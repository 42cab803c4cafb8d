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

# phase NAME WHAT COMMAND...: says what comes, runs the command, and records its milliseconds for the table.
phase() {
    local name=$1 what=$2 start spent
    start=$(now_ms)
    shift 2
    echo "== $name: $what"
    "$@"
    spent=$(($(now_ms) - start))
    echo "== $name: done in $(((spent + 500) / 1000)) s"
    printf '%s\t%d\n' "$name" "$spent" >>"$out/phases.tsv"
}

# The phases that use plain transformers, with all cores: they have the machine to themselves.
plain() { env -u OMP_NUM_THREADS "$python" -m "launch.quickstart.$1" "${@:2}"; }

# Two ranks of one thread share the verbs, which is faster than two threads on each verb.
score() {
    torchrun --nproc-per-node 2 -m launch.quickstart.evaluate score \
        --model "$out/$1" --data "$out/data/eval.jsonl" --out "$out/$1.json"
}

mkdir -p "$out"
# A killed run resumes from its last checkpoint; a run that reached its table is removed and made again.
[[ ! -f $out/report.json ]] || rm -rf "$out"/run
rm -rf "$out"/merged "$out"/*.json
started=$(now_ms)
printf 'install\t%d\n' $((started - ${MAKE_STARTED_MS:-$started})) >"$out/phases.tsv"

echo "The quickstart takes 4 to 6 minutes on 2 quiet cores, of which training takes 3; times below are for such a machine."
phase prepare "a real model and real data, downloaded once" plain prepare --out "$out"
phase "evaluate base" "200 verbs that training never sees, before training; about 40 s" score base
phase train "60 steps on 3 ranks, each with a third of the model; about 3 minutes, the first 20 s without a line" \
    deepspeed --num_gpus 3 launch/train.py configs/quickstart.yaml
phase merge "the adapter is added to the base's weights; about 5 s" \
    lowrank-dist merge --base "$out/base" --adapter "$out/run/adapter" --out "$out/merged"
phase "evaluate merged" "the same 200 verbs; about 30 s" score merged
phase prove "plain PEFT and plain transformers must compute the same; about 20 s" \
    plain evaluate prove --base "$out/base" --adapter "$out/run/adapter" --merged "$out/merged" \
    --probe "$out/run/probe.safetensors" --base-score "$out/base.json" --merged-score "$out/merged.json" \
    --out "$out/proof.json"
"$python" -m launch.quickstart.report --out "$out"
