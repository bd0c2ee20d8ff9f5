"""OPT-125M on CEBaB, on one v5e chip: one device, batch 8, bfloat16, layers computed again.

    python launch/train.py --config=configs/cebab_opt_125m.py --config.data.path=DIR --workdir=runs/opt_125m
    python launch/plan.py --config=configs/cebab_opt_125m.py --topology=v5e:1x1

Planned with K = 4 and 512 tokens: a training step takes 3.2 of the chip's 16.9 GB and 1.23 times the model's flops; a
pass of the pruner takes 10.0 GB, the selection 3.5, an intervention 2.2. There is no smaller topology. RESULTS.md has
the command.
The learning rate is ours, from the grid in the paper's Table 3.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_125m", batch_size=8, fisher_gib=8)
