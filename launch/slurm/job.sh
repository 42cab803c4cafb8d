# shellcheck shell=bash
# Functions shared by the training scripts beside this file, which source it. Needs bash 4.4. It reads the variables of
# their EDIT and CONTAINER blocks, and uses these files of the run folder:
#
#   STOP        the kill switch, made and removed by you: while it exists no job of this folder starts or requeues
#   FAILED      the rank that failed first and why, written by the ranks; each start renames an old one to
#               FAILED.JOB.START
#   restarts    newest saved step at the last requeue, and the number of requeues without a newer one

readonly PREEMPTED=85          # exit code of a rank that was told to stop and has saved
readonly UNHEARD=$((128 + 10)) # exit code of a rank in a container that USR1 kills before the rank handles it
readonly BROKEN=255            # srun's code instead of that, now and then, when ranks on several nodes die of a signal

# shellcheck source=launch/slurm/relay.sh
source "$PROJECT/launch/slurm/relay.sh"
trap 'say "told to stop: USR1 to every rank"; told' USR1 USR2 TERM

say() { printf '[%(%F %T)T] %s\n' -1 "$*"; }

die() {
    say "error: $*" >&2
    exit 1
}

# announce VARIABLE...: print the job's settings, check the kill switch and rename an old FAILED. Call it first.
announce() {
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST"
    declare -p "$@" SRUN_OPTIONS INSIDE | sed 's/^declare -[^ ]* /    /'
    mkdir -p "$RUN"
    refuse_stopped
    [ ! -e "$RUN/FAILED" ] || mv "$RUN/FAILED" "$RUN/FAILED.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
}

# Print the configuration file as it is when the job starts.
show_config() {
    [ -f "$CONFIG" ] || die "CONFIG: $CONFIG is not a file (seen from $PWD): correct the EDIT block"
    say "$CONFIG:"
    sed 's/^/    /' "$CONFIG"
}

refuse_stopped() {
    [ ! -e "$RUN/STOP" ] || die "$RUN/STOP is there: remove it to let jobs of this folder run"
}

# Set where the ranks meet, their network card and their threads. There is no fallback address: nodes that each met on
# their own loopback would train several models instead of one.
rendezvous() {
    local hosts
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    [ "${#hosts[@]}" = "$SLURM_JOB_NUM_NODES" ] || die "scontrol names ${#hosts[@]} of $SLURM_JOB_NUM_NODES nodes"
    export MASTER_ADDR=${hosts[0]}
    if [ -n "$INTERFACE" ]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
    fi
    export TORCH_EXTENSIONS_DIR=$EXTENSIONS
    # Before Slurm 22.05 a step had the job's CPUs per task; since then it has one unless this is set.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
    say "meeting at $MASTER_ADDR, network card ${INTERFACE:-as the libraries choose}"
    say "$OMP_NUM_THREADS threads a rank"
}

# Run a command as one task per rank. Sets CODE to its exit code, PREEMPTED where the ranks have saved and stopped.
run_ranks() {
    local mark=$RUN/.preempted-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    # Signals are passed on by srun's own process: scancel with the job id of an array would reach its other tasks too.
    relay srun --kill-on-bad-exit=1 --wait=60 "${SRUN_OPTIONS[@]}" \
        bash "$PROJECT/launch/slurm/task.sh" "$mark" "${INSIDE[@]}" "$@"
    say "the step ended with code $CODE"
    if [ "$CODE" = 0 ] && [ -e "$mark" ]; then CODE=$PREEMPTED; fi
    if [ -n "$TOLD" ] && { [ "$CODE" = "$UNHEARD" ] || [ "$CODE" = "$BROKEN" ]; }; then CODE=$PREEMPTED; fi
    rm -f "$mark"
}

# End the job with the ranks' exit code, or requeue it where they were told to stop.
finish() {
    if [ -e "$RUN/FAILED" ]; then
        say "$RUN/FAILED:" >&2
        cat "$RUN/FAILED" >&2
        exit $((CODE == 0 ? 1 : CODE))
    fi
    [ "$CODE" = "$PREEMPTED" ] || exit "$CODE"
    refuse_stopped
    # ARRAY_TASK, since the job id of an array's last task is that of the whole array.
    local job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID} shown
    shown=" $(scontrol show job --oneliner "$job") "
    # A job that Slurm has ended was cancelled, or Slurm requeues it. If Slurm took this node for lost, a later start of
    # the job may be running already.
    if [[ $shown != *" JobState=RUNNING "* || $shown != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
        say "not requeued by itself: Slurm has ended this start of the job"
        exit "$PREEMPTED"
    fi
    count_restart
    scontrol requeue "$job" || die "job $job cannot be requeued: submit it again to go on"
    say "requeued as $job"
}

# Count a requeue. Die where the job was requeued MAX_RESTARTS times without saving a newer step.
count_restart() {
    local newest before=0 count=0
    newest=$(newest_step)
    if [ -e "$RUN/restarts" ]; then read -r before count < "$RUN/restarts"; fi
    if [ "$newest" -gt "$before" ]; then count=0; fi
    [ "$count" -lt "$MAX_RESTARTS" ] || die "requeued $count times without progress: still at step $newest"
    echo "$newest $((count + 1))" > "$RUN/restarts"
    say "at step $newest, restart $((count + 1)) of $MAX_RESTARTS without progress"
}

# Print N of the newest checkpoints/step-N, 0 without one.
newest_step() {
    local newest=0 folder number
    for folder in "$RUN"/checkpoints/step-*; do
        number=${folder##*/step-}
        if [[ $number =~ ^[0-9]+$ ]] && ((10#$number > newest)); then newest=$((10#$number)); fi
    done
    echo "$newest"
}
