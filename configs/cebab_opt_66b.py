"""OPT-66B on CEBaB, on 64 v5p chips: fsdp 16 x tensor 4, batch 16, bfloat16, layers computed again.

    python launch/train.py --config=configs/cebab_opt_66b.py --config.data.path=DIR --workdir=runs/opt_66b
    python launch/plan.py --config=configs/cebab_opt_66b.py --topology=v5p:4x4x4

Planned with K = 4 and 512 tokens: a training step takes 22.4 of a chip's 102.8 GB, 1.22 times the model's flops, and
sends 142 GB; a pass of the pruner takes 58.7 GB, the selection 37.3, an intervention 28.4. The smallest topology that
was planned is v5p:2x4x4 (fsdp 8 x tensor 4), with 42.5 GB for a training step; v5e:16x16 (fsdp 16 x tensor 8 x
concept 2) has it in 11.7 of 16.9. RESULTS.md has the commands.
The learning rate is ours, from the grid in the paper's Table 3, for a model that the paper has not.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_66b", batch_size=16, fsdp=16, tensor=4, fisher_gib=40)
