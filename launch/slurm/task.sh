#!/bin/bash
# One rank of a job, started by srun: task.sh MARK COMMAND... Tells the command which rank it is. Where the command ends
# with 85 (told to stop, and saved) the file MARK is made and this ends with 0: under --kill-on-bad-exit the first
# rank's 85 would have the slower ranks killed while they end, and srun would report the kill (seen with 0.1 s between
# them).
set -euo pipefail
# shellcheck source=launch/slurm/relay.sh
source "${0%/*}/relay.sh"
mark=$1
shift
# Where the ranks meet. Below what Linux hands out for outgoing connections; jobs that share a node differ in their
# numbers, and so do the steps of a job (as in backend/launchers.py).
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 6007 * SLURM_STEP_ID) % 20000))
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
relay "$@"
if [ "$CODE" = 85 ]; then
    touch "$mark"
    CODE=0
fi
exit "$CODE"
