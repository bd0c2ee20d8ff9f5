#!/usr/bin/env bash
# Trains on one host with several GPUs, in one process, and starts again after SIGTERM (a spot machine's notice):
#
#   bash launch/clusters/gpus.sh --config.seed=1          further flags go to train.py
#   DRY_RUN=1 bash launch/clusters/gpus.sh                prints the commands
#
# Needs the extra cuda, and torch if the checkpoint is a pytorch_model.bin.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/clusters/common.sh

# Set these, here or in the environment.
: "${CONFIG:=configs/cebab_opt.py:1_3b}"    # what to train
: "${CHECKPOINT:=facebook/opt-1.3b}"        # its backbone: a name on the hub, or a directory
: "${DATA:=data/cebab}"                     # folder of the data's files
: "${WEIGHTS:=checkpoints/opt-1.3b}"        # where the backbone goes as safetensors
: "${WORKDIR:=runs/opt-1.3b}"               # where the run goes
: "${GPUS:=8}"                              # of this host

convert_once "$CHECKPOINT" "$WEIGHTS"
start_again python launch/train.py --config="$CONFIG" --config.data.path="$DATA" --config.backbone.name="$WEIGHTS" \
    --config.mesh.fsdp="$GPUS" --workdir="$WORKDIR" "$@"
