# shellcheck shell=bash
# What job.sh and task.sh do when they are told to stop, by USR1, USR2 or TERM; they source it. Needs bash 4.4.

readonly REPEAT_SECONDS=2
COMMAND=   # process id of what relay runs
TELLER=    # process id of what passes the signal on
TOLD=      # not empty: this shell was told to stop
SIGNALLED= # not empty: it was told since the last look
trap told USR1 USR2 TERM

# Run a command and leave its exit code in CODE. What this shell is told, before or meanwhile, reaches the command as
# USR1, again and again until it ends: srun listens only once it has the step, a rank once it has loaded its libraries.
# Until then they ignore it.
# shellcheck disable=SC2034 # CODE is for whoever sources this
relay() {
    (trap '' USR1 USR2 TERM && exec "$@") &
    COMMAND=$!
    [ -z "$TOLD" ] || tell
    CODE=0
    wait "$COMMAND" || CODE=$?
    # A signal ends wait, not the command: wait again for as long as one came meanwhile.
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

# Once more after every signal: Slurm sends one to all processes of a step, and so ends the teller before.
tell() {
    [ -z "$TELLER" ] || kill "$TELLER" 2> /dev/null || true
    while kill -USR1 "$COMMAND" 2> /dev/null; do sleep "$REPEAT_SECONDS"; done &
    TELLER=$!
}
