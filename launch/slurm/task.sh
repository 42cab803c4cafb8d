#!/bin/bash
# Runs one rank of a job: srun starts task.sh MARK COMMAND..., which exports the rank's numbers and runs COMMAND. Where
# COMMAND exits with 85 (it was told to stop and has saved), this creates the file MARK and exits with 0. With any other
# code, --kill-on-bad-exit would kill the ranks that are still ending, and srun would report the kill instead of 85.
#
# It reads the variables of the step alone: Slurm sets them in each task, whatever options the job was submitted with.
# The run would derive the same numbers (backend/launchers.py), but hooks of containers may have set others.
set -euo pipefail
# shellcheck source=launch/slurm/relay.sh
source "${0%/*}/relay.sh"
mark=$1
shift

# first_host LIST: print the first name of a list of nodes, as in a[07-09,12],b1 → a07. There is no default address: with
# a loopback address each node would train a model of its own.
first_host() {
    local name='[^][,]' numbers='\[[0-9][^][]*\]' first
    if ! [[ $1 =~ ^($name($name|$numbers)*)(,.*)?$ ]]; then
        echo "error: SLURM_STEP_NODELIST: '$1' cannot be parsed" >&2
        return 1
    fi
    first=${BASH_REMATCH[1]}
    while [[ $first =~ ^([^[]*)\[([0-9]+)[^]]*\](.*)$ ]]; do
        first=${BASH_REMATCH[1]}${BASH_REMATCH[2]}${BASH_REMATCH[3]}
    done
    echo "$first"
}

# tasks_of_node NUMBER COUNTS: print the tasks of a node, as in 3 2(x3),1 → 1.
tasks_of_node() {
    local node=$1 part parts
    IFS=, read -ra parts <<< "$2"
    for part in "${parts[@]}"; do
        [[ $part =~ ^([0-9]+)(\(x([0-9]+)\))?$ ]] || break
        if ((node < ${BASH_REMATCH[3]:-1})); then
            echo "${BASH_REMATCH[1]}"
            return
        fi
        node=$((node - ${BASH_REMATCH[3]:-1}))
    done
    echo "error: SLURM_STEP_TASKS_PER_NODE: '$2' has no tasks for node $1 (SLURM_NODEID)" >&2
    return 1
}

# The port where the ranks meet, below the range that Linux uses for outgoing connections. Jobs that share a node and
# steps of one job get different ports (as in backend/launchers.py).
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 6007 * SLURM_STEP_ID) % 20000))
MASTER_ADDR=$(first_host "$SLURM_STEP_NODELIST")
LOCAL_WORLD_SIZE=$(tasks_of_node "$SLURM_NODEID" "$SLURM_STEP_TASKS_PER_NODE")
export MASTER_ADDR LOCAL_WORLD_SIZE
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
relay "$@"
if [ "$CODE" = 85 ]; then
    touch "$mark"
    CODE=0
fi
exit "$CODE"
