"""OPT-1.3B on CEBaB, on 16 v5e chips: fsdp 16, batch 64, bfloat16, layers computed again.

    python launch/train.py --config=configs/cebab_opt_1_3b.py --config.data.path=DIR --workdir=runs/opt_1_3b
    python launch/plan.py --config=configs/cebab_opt_1_3b.py --topology=v5e:4x4

Planned with K = 4 and 512 tokens: a training step takes 3.0 of a chip's 16.9 GB, 1.23 times the model's flops, and
sends 11.4 GB; a pass of the pruner takes 9.2 GB, the selection 2.7, an intervention 2.0. It is the smallest topology
that was planned. RESULTS.md has the command.
The learning rate is ours, from the grid in the paper's Table 3.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_1_3b", batch_size=64, fsdp=16, fisher_gib=8)
