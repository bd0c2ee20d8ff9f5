"""OPT-350M on CEBaB, on one v5e chip: one device, batch 8, bfloat16, layers computed again.

    python launch/train.py --config=configs/cebab_opt_350m.py --config.data.path=DIR --workdir=runs/opt_350m
    python launch/plan.py --config=configs/cebab_opt_350m.py --topology=v5e:1x1

Planned with K = 4 and 512 tokens: a training step takes 8.0 of the chip's 16.9 GB and 1.33 times the model's flops,
an evaluation step 5.1 GB, a pass of the pruner 14.2, the selection 11.3 and the intervention 8.2.
The learning rate is ours, from the grid in the paper's Table 3.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_350m", batch_size=8, fisher_gib=8)
