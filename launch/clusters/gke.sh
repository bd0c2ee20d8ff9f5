#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster, as a workload of xpk, which starts it again after SIGTERM:
#
#   PROJECT=... ZONE=... CLUSTER=... IMAGE=... bash launch/clusters/gke.sh --config.seed=1
#   DRY_RUN=1 ... bash launch/clusters/gke.sh             prints the commands
#
# Further flags go to train.py. The image has this checkout in /app, with the extras tpu and torch. Data, checkpoints and
# runs lie on a Filestore share that the cluster mounts in every pod (xpk storage attach --auto-mount=true).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/clusters/common.sh

# Set these, here or in the environment.
: "${PROJECT:?the project on Google Cloud}"
: "${ZONE:?the zone of the cluster, such as us-east5-a}"
: "${CLUSTER:?the cluster, as xpk made it}"
: "${IMAGE:?the image that holds this checkout}"
: "${NAME:=sparsecbm}"                      # of the workload
: "${TYPE:=v5p-128}"                        # 64 chips: launch/plan.py --topology=v5p:4x4x4 says whether they suffice
: "${CONFIG:=configs/cebab_opt.py:66b}"     # what to train; its mesh has to have as many devices as the slice
: "${CHECKPOINT:=facebook/opt-66b}"         # its backbone: a name on the hub, or a directory
: "${DATA:=/mnt/share/cebab}"               # folder of the data's files
: "${WEIGHTS:=/mnt/share/opt-66b}"          # where the backbone goes as safetensors
: "${WORKDIR:=/mnt/share/runs/opt-66b}"     # where the run goes

train=(python launch/train.py --coordinator=auto --config="$CONFIG" --config.data.path="$DATA"
    --config.backbone.name="$WEIGHTS" --workdir="$WORKDIR" "$@")
# The first pod converts, the others wait for it. `exec`, so that Python receives SIGTERM.
first="if [[ \${TPU_WORKER_ID:-0} == 0 ]]; then convert_once $(printf '%q %q' "$CHECKPOINT" "$WEIGHTS"); fi"
command="cd /app && source launch/clusters/common.sh && $first && wait_for $(printf '%q' "$WEIGHTS") && exec $(printf '%q ' "${train[@]}")"

run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
    --tpu-type="$TYPE" --num-slices=1 --docker-image="$IMAGE" --max-restarts=100 --restart-on-exit-codes="$AGAIN" \
    --termination-grace-period-seconds=300 --command="bash -c $(printf '%q' "$command")"
