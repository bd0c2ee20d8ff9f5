"""OPT-30B on CEBaB, on 16 v5p chips: fsdp 4 x tensor 4, batch 16, bfloat16, layers computed again.

    python launch/train.py --config=configs/cebab_opt_30b.py --config.data.path=DIR --workdir=runs/opt_30b
    python launch/plan.py --config=configs/cebab_opt_30b.py --topology=v5p:2x2x4

Its plan has not been compiled yet; training's state takes 25.2 GB of a chip's 102.8.
The learning rate is ours, from the grid in the paper's Table 3, for a model that the paper has not.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_30b", batch_size=16, fsdp=4, tensor=4, fisher_gib=40)
