# shellcheck shell=bash
# Functions shared by the training scripts beside this file, which source it. Needs bash 4.4. It reads the variables of
# their EDIT and CONTAINER blocks, and uses these files of the run folder:
#
#   STOP        created and removed by you: while it exists, no job of this folder starts or requeues
#   FAILED      names the rank that failed first, and why; written by the ranks. Each start of a job renames an old one
#               to FAILED.JOB.START
#   restarts    two numbers: the newest saved step at the last requeue, and the requeues since a newer step was saved

readonly PREEMPTED=85          # exit code of a rank that was told to stop and has saved
readonly UNHEARD=$((128 + 10)) # exit code of a rank that USR1 killed: in a container it can arrive before it is handled
readonly BROKEN=255            # srun sometimes reports this in place of UNHEARD when ranks on several nodes are killed

# shellcheck source=launch/slurm/relay.sh
source "$PROJECT/launch/slurm/relay.sh"
trap 'say "told to stop: USR1 to every rank"; told' USR1 USR2 TERM

say() { printf '[%(%F %T)T] %s\n' -1 "$*"; }

die() {
    say "error: $*" >&2
    exit 1
}

readonly RESTARTS=${SLURM_RESTART_COUNT:-0} # how often this job was requeued: by itself, by Slurm or by a person

# announce VARIABLE...: print the job's settings, check STOP and the number of requeues, and rename an old FAILED. Call
# it first.
announce() {
    say "job $SLURM_JOB_ID, start $((RESTARTS + 1)): $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST"
    declare -p "$@" SRUN_OPTIONS INSIDE | sed 's/^declare -[^ ]* /    /'
    case $REQUEUE in
        yes) say "requeued $RESTARTS times, of at most MAX_REQUEUES=$MAX_REQUEUES" ;;
        no) say "REQUEUE=no: told to stop, the job saves and ends; to go on, submit it again" ;;
        *) die "REQUEUE: '$REQUEUE' is neither yes nor no: correct the EDIT block" ;;
    esac
    mkdir -p "$RUN" "$EXTENSIONS"
    refuse_stopped
    ((RESTARTS <= MAX_REQUEUES)) || die "requeued more than MAX_REQUEUES=$MAX_REQUEUES times: to go on, submit it again"
    [ ! -e "$RUN/FAILED" ] || mv "$RUN/FAILED" "$RUN/FAILED.$SLURM_JOB_ID.$RESTARTS"
}

# Print the configuration file as it is when the job starts.
show_config() {
    [ -f "$CONFIG" ] || die "CONFIG: $CONFIG is not a file (seen from $PWD): correct the EDIT block"
    say "$CONFIG:"
    sed 's/^/    /' "$CONFIG"
}

refuse_stopped() {
    [ ! -e "$RUN/STOP" ] || die "$RUN/STOP exists: remove it to let jobs of this folder run"
}

# Export the address where the ranks meet, their network card and their number of threads. There is no default address:
# with a loopback address each node would train a model of its own.
rendezvous() {
    local hosts
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    [ "${#hosts[@]}" = "$SLURM_JOB_NUM_NODES" ] || die "scontrol names ${#hosts[@]} of $SLURM_JOB_NUM_NODES nodes"
    export MASTER_ADDR=${hosts[0]}
    if [ -n "$INTERFACE" ]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
    fi
    export TORCH_EXTENSIONS_DIR=$EXTENSIONS
    # Since Slurm 22.05 a step does not inherit the job's --cpus-per-task; without this, each rank would have one CPU.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
    say "meeting at $MASTER_ADDR, network card ${INTERFACE:-as the libraries choose}"
    say "$OMP_NUM_THREADS threads a rank"
}

# Run a command as one task per rank. Sets CODE to its exit code, PREEMPTED where the ranks have saved and stopped.
run_ranks() {
    local mark=$RUN/.preempted-$SLURM_JOB_ID-$RESTARTS
    # Signals go to srun, which passes them on: scancel with the job id of an array would reach its other tasks too.
    relay srun --kill-on-bad-exit=1 --wait=60 "${SRUN_OPTIONS[@]}" \
        bash "$PROJECT/launch/slurm/task.sh" "$mark" "${INSIDE[@]}" "$@"
    say "the step ended with code $CODE"
    if [ "$CODE" = 0 ] && [ -e "$mark" ]; then CODE=$PREEMPTED; fi
    if [ -n "$TOLD" ] && { [ "$CODE" = "$UNHEARD" ] || [ "$CODE" = "$BROKEN" ]; }; then CODE=$PREEMPTED; fi
    rm -f "$mark"
}

# End the job with the ranks' exit code, or requeue it if they were told to stop and REQUEUE is yes.
finish() {
    if [ -e "$RUN/FAILED" ]; then
        say "$RUN/FAILED:" >&2
        cat "$RUN/FAILED" >&2
        exit $((CODE == 0 ? 1 : CODE))
    fi
    [ "$CODE" = "$PREEMPTED" ] || exit "$CODE"
    refuse_stopped
    if [ "$REQUEUE" = no ]; then
        say "REQUEUE=no: saved step $(newest_step) and not requeued; to go on, submit it again"
        exit "$PREEMPTED"
    fi
    # As ARRAY_TASK, since the job id of an array's last task is also that of the whole array.
    local job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID} shown
    shown=" $(scontrol show job --oneliner "$job") "
    # Slurm itself has ended this start: the job was cancelled, or Slurm requeues it. If Slurm took this node for lost,
    # a later start of the job may already be running.
    if [[ $shown != *" JobState=RUNNING "* || $shown != *" Restarts=$RESTARTS "* ]]; then
        say "not requeued by itself: Slurm has ended this start of the job"
        exit "$PREEMPTED"
    fi
    if [[ $shown == *" Requeue=0 "* ]]; then
        say "not requeued: Slurm lists the job with Requeue=0 (sbatch --no-requeue); to go on, submit it again"
        exit "$PREEMPTED"
    fi
    count_requeue
    scontrol requeue "$job" || die "job $job cannot be requeued: submit it again to go on"
    say "requeued as $job, $((RESTARTS + 1)) of at most $MAX_REQUEUES times"
}

# Count a requeue. Die after MAX_REQUEUES of them, or after MAX_STALLED in a row that saved no newer step.
count_requeue() {
    local newest before=0 count=0
    newest=$(newest_step)
    ((RESTARTS < MAX_REQUEUES)) || die "requeued MAX_REQUEUES=$MAX_REQUEUES times; submit it again to go on"
    if [ -e "$RUN/restarts" ]; then read -r before count < "$RUN/restarts"; fi
    if [ "$newest" -gt "$before" ]; then count=0; fi
    [ "$count" -lt "$MAX_STALLED" ] || die "requeued $count times without progress: still at step $newest"
    echo "$newest $((count + 1))" > "$RUN/restarts"
    say "at step $newest, requeue $((count + 1)) of at most MAX_STALLED=$MAX_STALLED without a newer checkpoint"
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
