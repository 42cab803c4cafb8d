#!/bin/bash
# Runs one rank of a job: srun starts task.sh MARK COMMAND..., which exports the rank's numbers and runs COMMAND. Where
# COMMAND exits with 85 (it was told to stop and has saved), this creates the file MARK and exits with 0. With any other
# code, --kill-on-bad-exit would kill the ranks that are still ending, and srun would report the kill instead of 85.
set -euo pipefail
# shellcheck source=launch/slurm/relay.sh
source "${0%/*}/relay.sh"
mark=$1
shift
# The port where the ranks meet, below the range that Linux uses for outgoing connections. Jobs that share a node and
# steps of one job get different ports (as in backend/launchers.py).
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 6007 * SLURM_STEP_ID) % 20000))
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
relay "$@"
if [ "$CODE" = 85 ]; then
    touch "$mark"
    CODE=0
fi
exit "$CODE"
