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

# Print what scontrol says of a job, in one line that begins and ends with a space. Fails where it does not answer.
shown() {
    local said
    said=$(scontrol show job --oneliner "$1") && echo " $said "
}

[ -n "${SLURM_JOB_ID:-}" ] || die "SLURM_JOB_ID is not set, so this is not a job: submit the script with sbatch"
export PATH # bash has a PATH of its own where it inherits none, and does not pass that on
command -v srun > /dev/null || die "srun is not in PATH=$PATH: add the folder of Slurm's programs in the SETUP block"
JOB=$SLURM_JOB_ID                  # this job in commands of Slurm
RESTARTS=${SLURM_RESTART_COUNT:-0} # how often this job was requeued: by itself, by Slurm or by a person
# The job id of an array's last task is also that of the whole array, so a task is ARRAY_TASK. But a job that was
# submitted from inside another job inherits that one's array and its number of restarts.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && said=$(shown "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" 2> /dev/null); then
    if [[ $said == *" JobId=$SLURM_JOB_ID "* ]]; then JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
fi
ANSWERED= # not empty where scontrol answers on this node
if said=$(shown "$JOB"); then
    ANSWERED=yes
    if [[ $said == *" Restarts=0 "* ]]; then RESTARTS=0; fi
fi
readonly NO_ANSWER="\`scontrol show job $JOB\` does not answer on $HOSTNAME, so the job cannot requeue itself"

# announce VARIABLE...: print the job's settings, check STOP and the number of requeues, and rename an old FAILED. Call
# it first.
announce() {
    say "job $JOB, start $((RESTARTS + 1)): $SLURM_JOB_NODELIST, tasks of each node: $SLURM_TASKS_PER_NODE"
    if [ -n "${SLURM_HET_SIZE:-}" ]; then say "warning: a heterogeneous job: its ranks run on component 0 alone"; fi
    declare -p "$@" SRUN_OPTIONS INSIDE | sed 's/^declare -[^ ]* /    /'
    case $REQUEUE in
        yes)
            say "requeued $RESTARTS times, of at most MAX_REQUEUES=$MAX_REQUEUES"
            [ -n "$ANSWERED" ] || say "warning: $NO_ANSWER: told to stop, it saves and ends"
            ;;
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

# Export the network card of the ranks and their number of threads. task.sh exports the address where they meet.
set_up_ranks() {
    if [ -n "$INTERFACE" ]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
    fi
    export TORCH_EXTENSIONS_DIR=$EXTENSIONS
    # In Slurm 22.05 and 23.02 a step does not inherit the job's --cpus-per-task; without this, each rank would have one
    # CPU. A job that asked for --cpus-per-gpu must not have both.
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_GPU:-1}}}
    say "network card ${INTERFACE:-as the libraries choose}, $OMP_NUM_THREADS threads per rank"
}

# Run a command as one task per rank. Sets CODE to its exit code, PREEMPTED where the ranks have saved and stopped.
run_ranks() {
    local mark=$RUN/.preempted-$SLURM_JOB_ID-$RESTARTS
    # Signals go to srun, which passes them on: scancel with the job id of an array would reach its other tasks too.
    # --export: where sbatch was given one, as NONE, srun would repeat it, and the ranks would have no PATH.
    relay srun --export=ALL --kill-on-bad-exit=1 --wait=60 "${SRUN_OPTIONS[@]}" \
        /bin/bash "$PROJECT/launch/slurm/task.sh" "$mark" "${INSIDE[@]}" "$@"
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
    local said
    if ! said=$(shown "$JOB"); then
        say "not requeued: $NO_ANSWER; saved step $(newest_step); to go on, submit it again"
        exit "$PREEMPTED"
    fi
    # Slurm itself has ended this start: the job was cancelled, or Slurm requeues it. If Slurm took this node for lost,
    # a later start of the job may already be running.
    if [[ $said != *" JobState=RUNNING "* || $said != *" Restarts=$RESTARTS "* ]]; then
        say "not requeued by itself: Slurm has ended this start of the job"
        exit "$PREEMPTED"
    fi
    if [[ $said == *" Requeue=0 "* ]]; then
        say "not requeued: Slurm lists the job with Requeue=0 (sbatch --no-requeue); to go on, submit it again"
        exit "$PREEMPTED"
    fi
    count_requeue
    scontrol requeue "$JOB" || die "job $JOB cannot be requeued: submit it again to go on"
    say "requeued as $JOB, $((RESTARTS + 1)) of at most $MAX_REQUEUES times"
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
