#!/bin/bash
# One rank of a job, started by srun: task.sh MARK COMMAND... Sets the command's rank in the environment. If the command
# exits with 85 (told to stop, has saved), this creates the file MARK and exits with 0. Otherwise --kill-on-bad-exit
# would kill slower ranks while they end, and srun would report the kill (seen with 0.1 s between them).
set -euo pipefail
# shellcheck source=launch/slurm/relay.sh
source "${0%/*}/relay.sh"
mark=$1
shift
# The port where the ranks meet, below the range that Linux uses for outgoing connections. It depends on job and step,
# so that jobs sharing a node and steps of a job get different ports (as in backend/launchers.py).
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 6007 * SLURM_STEP_ID) % 20000))
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
relay "$@"
if [ "$CODE" = 85 ]; then
    touch "$mark"
    CODE=0
fi
exit "$CODE"
