#!/bin/bash
# One rank of a job, started by srun: task.sh MARK COMMAND... Tells the command which rank it is. Where the command ends
# with 85 (told to stop, and saved) the file MARK is made and this ends with 0: under --kill-on-bad-exit the first
# rank's 85 would have the slower ranks killed while they end, and srun would report the kill (seen with 0.1 s between
# them).
set -euo pipefail
mark=$1
shift
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
# The command decides what a signal means: Slurm sends it to both, and this has to outlive the command. USR1 and USR2
# stay ignored until the command listens, so that a signal during its start does not end the job.
trap '' USR1 USR2
trap : TERM
code=0
"$@" || code=$?
if [ "$code" = 85 ]; then
    touch "$mark"
    code=0
fi
exit "$code"
