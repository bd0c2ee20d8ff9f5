"""OPT-6.7B on CEBaB, on 16 v5e chips: fsdp 16, batch 16, bfloat16, layers computed again.

    python launch/train.py --config=configs/cebab_opt_6_7b.py --config.data.path=DIR --workdir=runs/opt_6_7b
    python launch/plan.py --config=configs/cebab_opt_6_7b.py --topology=v5e:4x4

Its plan has not been compiled yet; training's state takes 5.4 GB of a chip's 16.9.
The learning rate is ours, from the grid in the paper's Table 3, for a model that the paper has not.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_6_7b", batch_size=16, fsdp=16, fisher_gib=8)
