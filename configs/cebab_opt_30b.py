"""OPT-30B on CEBaB, on 16 v5p chips: fsdp 4 x tensor 4, batch 16, bfloat16, layers computed again.

    python launch/train.py --config=configs/cebab_opt_30b.py --config.data.path=DIR --workdir=runs/opt_30b
    python launch/plan.py --config=configs/cebab_opt_30b.py --topology=v5p:2x2x4

Planned with K = 4 and 512 tokens: a training step takes 40.1 of a chip's 102.8 GB, 1.22 times the model's flops, and
sends 86.8 GB; a pass of the pruner takes 76.3 GB, the selection 68.1, an intervention 51.3. It is the smallest
topology that was planned. RESULTS.md has the command.
The learning rate is ours, from the grid in the paper's Table 3, for a model that the paper has not.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_30b", batch_size=16, fsdp=4, tensor=4, fisher_gib=40)
