#!/usr/bin/env bash
# Trains on the GPUs of several nodes under SLURM, one process for each GPU, and requeues itself after SIGTERM:
#
#   sbatch launch/clusters/slurm.sh --config.seed=1       from the checkout; further flags go to train.py
#   DRY_RUN=1 bash launch/clusters/slurm.sh               prints the commands
#
# SIGTERM comes five minutes before the time limit, or when another job needs the nodes. Every node must see the checkout,
# the environment, the data and all folders below.
#SBATCH --job-name=sparsecbm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# SLURM runs a copy of this file.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"
source launch/clusters/common.sh

# Set these, here or in the environment, and the lines above.
: "${CONFIG:=configs/cebab_opt.py:6_7b}"    # what to train
: "${CHECKPOINT:=facebook/opt-6.7b}"        # its backbone: a name on the hub, or a directory
: "${DATA:=data/cebab}"                     # folder of the data's files
: "${WEIGHTS:=checkpoints/opt-6.7b}"        # where the backbone goes as safetensors
: "${WORKDIR:=runs/opt-6.7b}"               # where the run goes

convert_once "$CHECKPOINT" "$WEIGHTS"
status=0
run srun --kill-on-bad-exit=1 python launch/train.py --coordinator=auto --config="$CONFIG" \
    --config.data.path="$DATA" --config.backbone.name="$WEIGHTS" --config.mesh.fsdp="${SLURM_NTASKS:-16}" \
    --workdir="$WORKDIR" "$@" || status=$?
if [[ "$status" == "$AGAIN" ]]; then
    run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
