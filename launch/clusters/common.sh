# shellcheck shell=bash
# Sourced by the recipes on_*.sh: starting again where training asks for it, converting once, and showing commands only.
#
#   DRY_RUN=1 bash launch/clusters/gpus.sh    prints what would be run

# What training that was sent SIGTERM ends with, once it has saved what it had (sparsecbm_jax/stopping.py).
AGAIN=75

# run COMMAND...
run() {
    if [[ -n "${DRY_RUN:-}" ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# start_again COMMAND...: again as long as it ends with $AGAIN. A SIGTERM to this shell goes to the command, and is the
# last start.
start_again() {
    local child='' status is_last='' is_told=''
    if [[ -n "${DRY_RUN:-}" ]]; then
        run "$@"
        return
    fi
    trap 'is_last=1; tell_once' TERM
    while :; do
        "$@" &
        child=$!
        # A signal that came before there was a number to tell.
        if [[ -n "$is_last" ]]; then
            tell_once
        fi
        status=0
        wait "$child" || status=$?
        # A signal ends the wait, not the command.
        while kill -0 "$child" 2>/dev/null; do
            status=0
            wait "$child" || status=$?
        done
        child=
        if [[ "$status" != "$AGAIN" || -n "$is_last" ]]; then
            trap - TERM
            return "$status"
        fi
        echo "starting again" >&2
    done
}

# The command of start_again, whose variables these are.
tell_once() {
    if [[ -n "$child" && -z "$is_told" ]]; then
        is_told=1
        kill -TERM "$child"
    fi
}

# convert_once CHECKPOINT DIR: to safetensors, where DIR is not there. It comes to be whole, at once.
convert_once() {
    if [[ ! -d "$2" ]]; then
        run python launch/convert.py --model="$1" --save="$2"
    fi
}

# wait_for DIR: until another process has converted.
wait_for() {
    until [[ -d "$1" || -n "${DRY_RUN:-}" ]]; do
        sleep 5
    done
}
