# shellcheck shell=bash
# Sourced by the recipes on_*.sh: starting again where training asks for it, converting once, and showing commands only.
#
#   DRY_RUN=1 bash launch/on_gpus.sh    prints what would be run

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
    local child status is_last=
    if [[ -n "${DRY_RUN:-}" ]]; then
        run "$@"
        return
    fi
    while :; do
        "$@" &
        child=$!
        trap 'is_last=1; kill -TERM "$child"' TERM
        status=0
        wait "$child" || status=$?
        # The signal ends the first wait.
        if [[ -n "$is_last" ]]; then
            status=0
            wait "$child" || status=$?
        fi
        trap - TERM
        if [[ "$status" != "$AGAIN" || -n "$is_last" ]]; then
            return "$status"
        fi
        echo "starting again" >&2
    done
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
