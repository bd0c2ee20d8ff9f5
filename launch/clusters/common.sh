# shellcheck shell=bash
# Sourced by the other recipes: start training again when it asks for it, convert once, print commands only.
#
#   DRY_RUN=1 bash launch/clusters/gpus.sh    prints the commands

# The exit status of training after SIGTERM, once it has saved its state (sparsecbm_jax/runtime/preemption.py).
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

# start_again COMMAND...: runs the command again as long as it ends with $AGAIN. A SIGTERM to this shell is passed to the
# command, which is then not started again.
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
        # A signal that came before the command's process number was known.
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

# Passes SIGTERM to the command of start_again, once; uses its variables.
tell_once() {
    if [[ -n "$child" && -z "$is_told" ]]; then
        is_told=1
        kill -TERM "$child"
    fi
}

# convert_once CHECKPOINT DIR: converts to safetensors if DIR does not exist. DIR appears only when it is complete.
convert_once() {
    if [[ ! -d "$2" ]]; then
        run python launch/convert.py --model="$1" --save="$2"
    fi
}

# wait_for DIR: waits until another process has converted.
wait_for() {
    until [[ -d "$1" || -n "${DRY_RUN:-}" ]]; do
        sleep 5
    done
}
