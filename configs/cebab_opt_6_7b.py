"""OPT-6.7B on CEBaB, on 16 v5e chips: fsdp 16, batch 16, bfloat16, layers computed again.

    python launch/train.py --config=configs/cebab_opt_6_7b.py --config.data.path=DIR --workdir=runs/opt_6_7b
    python launch/plan.py --config=configs/cebab_opt_6_7b.py --topology=v5e:4x4

Planned with K = 4 and 512 tokens: a training step takes 9.2 of a chip's 16.9 GB, 1.22 times the model's flops, and
sends 60.5 GB; a pass of the pruner takes 16.1 GB, the selection 14.8, an intervention 10.8. It is the smallest
topology that was planned. RESULTS.md has the command.
The learning rate is ours, from the grid in the paper's Table 3, for a model that the paper has not.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_6_7b", batch_size=16, fsdp=16, fisher_gib=8)
