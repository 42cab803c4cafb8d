# shellcheck shell=bash
# Passes the stop signals (USR1, USR2, TERM) that a script gets on to the command that it runs. Sourced by job.sh and
# task.sh. Needs bash 4.4.

readonly REPEAT_SECONDS=2
COMMAND=   # process id of the command that relay runs
TELLER=    # process id of the loop that passes the signal on
TOLD=      # not empty once this shell got a stop signal
SIGNALLED= # not empty where it got one since the last call of `wait`
trap told USR1 USR2 TERM

# Run a command and set CODE to its exit code. If this shell gets a stop signal, before or meanwhile, the command gets
# USR1 again and again until it ends: srun ignores USR1 until the step has begun, a rank until its libraries are loaded.
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

# Each signal starts a new loop: Slurm signals all processes of a step, which ends the loop that ran before.
tell() {
    [ -z "$TELLER" ] || kill "$TELLER" 2> /dev/null || true
    while kill -USR1 "$COMMAND" 2> /dev/null; do sleep "$REPEAT_SECONDS"; done &
    TELLER=$!
}
