#!/usr/bin/env bash
# Trains on a TPU pod slice, from a machine that has gcloud; makes the slice, and makes it again after pre-emption:
#
#   PROJECT=... ZONE=... REPOSITORY=... SHARE=... bash launch/clusters/tpu_pod.sh --config.seed=1
#   DRY_RUN=1 ... bash launch/clusters/tpu_pod.sh         prints the commands
#
# Further flags go to train.py. The slice is not deleted in the end; the last line shows the command for that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/clusters/common.sh

# Set these, here or in the environment.
: "${PROJECT:?the project on Google Cloud}"
: "${ZONE:?the zone of the slice, such as us-east5-a}"
: "${REPOSITORY:?the address from which git clones this code}"
: "${SHARE:?an NFS share (Filestore) for data, checkpoints and runs, such as 10.0.0.2:/share}"
: "${NAME:=sparsecbm}"                      # of the slice
: "${TYPE:=v5p-128}"                        # 64 chips: launch/plan.py --topology=v5p:4x4x4 says whether they suffice
: "${VERSION:=v2-alpha-tpuv5}"              # software of the slice
: "${CONFIG:=configs/cebab_opt.py:66b}"     # what to train; its mesh has to have as many devices as the slice
: "${CHECKPOINT:=facebook/opt-66b}"         # its backbone: a name on the hub, or a directory
: "${DATA:=/mnt/share/cebab}"               # folder of the data's files
: "${WEIGHTS:=/mnt/share/opt-66b}"          # where the backbone goes as safetensors
: "${WORKDIR:=/mnt/share/runs/opt-66b}"     # where the run goes

on_slice=(--project="$PROJECT" --zone="$ZONE")

# on_workers WHICH COMMAND: in the checkout of these workers
on_workers() {
    run gcloud compute tpus tpu-vm ssh "$NAME" "${on_slice[@]}" --worker="$1" \
        --command="cd sparsecbm && source .venv/bin/activate && source launch/clusters/common.sh && $2"
}

state() {
    gcloud compute tpus tpu-vm describe "$NAME" "${on_slice[@]}" --format='value(state)' 2>/dev/null || true
}

make_slice() {
    local found=""
    [[ -n "${DRY_RUN:-}" ]] || found="$(state)"
    if [[ "$found" == READY ]]; then
        return
    fi
    if [[ -n "$found" ]]; then
        run gcloud compute tpus tpu-vm delete "$NAME" "${on_slice[@]}" --quiet
    fi
    run gcloud compute tpus tpu-vm create "$NAME" "${on_slice[@]}" --accelerator-type="$TYPE" --version="$VERSION" --spot
}

mount="sudo mkdir -p /mnt/share && (mountpoint -q /mnt/share || sudo mount -t nfs $(printf '%q' "$SHARE") /mnt/share)"
clone="[ -d sparsecbm ] || git clone --depth=1 $(printf '%q' "$REPOSITORY") sparsecbm"
install="cd sparsecbm && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,torch]'"
train=(python launch/train.py --coordinator=auto --config="$CONFIG" --config.data.path="$DATA"
    --config.backbone.name="$WEIGHTS" --workdir="$WORKDIR" "$@")

while :; do
    make_slice
    run gcloud compute tpus tpu-vm ssh "$NAME" "${on_slice[@]}" --worker=all --command="$mount && ($clone) && $install"
    on_workers 0 "convert_once $(printf '%q %q' "$CHECKPOINT" "$WEIGHTS")"
    # Each worker starts again by itself as long as the slice exists.
    if on_workers all "start_again $(printf '%q ' "${train[@]}")"; then
        break
    fi
    if [[ "$(state)" == READY ]]; then
        echo "error: training failed, though the slice exists; see the output of the workers above" >&2
        exit 1
    fi
done
echo "done; to delete the slice: gcloud compute tpus tpu-vm delete $NAME ${on_slice[*]}"
