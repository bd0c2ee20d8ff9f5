"""OPT-13B on CEBaB, on 8 v5p chips: fsdp 8, batch 16, bfloat16, layers computed again.

    python launch/train.py --config=configs/cebab_opt_13b.py --config.data.path=DIR --workdir=runs/opt_13b
    python launch/plan.py --config=configs/cebab_opt_13b.py --topology=v5p:2x2x2

Planned with K = 4 and 512 tokens: a training step takes 31.6 of a chip's 102.8 GB, 1.22 times the model's flops, and
sends 110.2 GB; a pass of the pruner takes 69.1 GB, the selection 57.3, an intervention 41.7. It is the smallest
topology that was planned. RESULTS.md has the command.
The learning rate is ours, from the grid in the paper's Table 3, for a model that the paper has not.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_13b", batch_size=16, fsdp=8, fisher_gib=40)
