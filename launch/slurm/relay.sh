# shellcheck shell=bash
# Passes stop signals (USR1, USR2, TERM) of job.sh and task.sh, which source it, on to their command. Needs bash 4.4.

readonly REPEAT_SECONDS=2
COMMAND=   # process id of the command that relay runs
TELLER=    # process id of the loop that passes the signal on
TOLD=      # not empty: this shell got a stop signal
SIGNALLED= # not empty: it got one since `wait` was last called
trap told USR1 USR2 TERM

# Run a command and set CODE to its exit code. A stop signal to this shell, before or meanwhile, is sent to the command
# as USR1 repeatedly until it ends: srun ignores USR1 until it has the step, a rank until its libraries are loaded.
# shellcheck disable=SC2034 # CODE is read by the sourcing script
relay() {
    (trap '' USR1 USR2 TERM && exec "$@") &
    COMMAND=$!
    [ -z "$TOLD" ] || tell
    CODE=0
    wait "$COMMAND" || CODE=$?
    # A signal ends `wait`, not the command: wait again after each.
    while [ -n "$SIGNALLED" ]; do
        SIGNALLED=
        CODE=0
        wait "$COMMAND" || CODE=$?
    done
    trap '' USR1 USR2 TERM
    [ -z "$TELLER" ] || kill "$TELLER" 2> /dev/null || true
}

told() {
    TOLD=yes
    SIGNALLED=yes
    [ -z "$COMMAND" ] || tell
}

# Started anew after every signal: Slurm signals all processes of a step, which ends the previous loop.
tell() {
    [ -z "$TELLER" ] || kill "$TELLER" 2> /dev/null || true
    while kill -USR1 "$COMMAND" 2> /dev/null; do sleep "$REPEAT_SECONDS"; done &
    TELLER=$!
}
