"""OPT-13B on CEBaB, on 8 v5p chips: fsdp 8, batch 16, bfloat16, layers computed again.

    python launch/train.py --config=configs/cebab_opt_13b.py --config.data.path=DIR --workdir=runs/opt_13b
    python launch/plan.py --config=configs/cebab_opt_13b.py --topology=v5p:2x2x2

Its plan has not been compiled yet; training's state takes 20.9 GB of a chip's 102.8.
The learning rate is ours, from the grid in the paper's Table 3, for a model that the paper has not.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_13b", batch_size=16, fsdp=8, fisher_gib=40)
