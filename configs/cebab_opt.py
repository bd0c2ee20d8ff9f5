"""OPT on CEBaB, from one v5e chip (125M) to 64 v5p chips (66B): bfloat16, layers computed again in the backward pass.

    python launch/train.py --config=configs/cebab_opt.py:66b --config.data.path=DIR --workdir=runs/opt_66b
    python launch/plan.py --config=configs/cebab_opt.py:66b --topology=v5p:4x4x4

Memory of the training step and of the pass of the pruner, in GB of a chip, with K = 4 and 512 tokens, as
`launch/plan.py` printed it. The whole tables and their commands are in docs/results/scale.md.

| size | topology | training step | pruner | memory of a chip |
| --- | --- | ---: | ---: | ---: |
| 125m | v5e:1x1 | 3.2 | 10.0 | 16.9 |
| 350m | v5e:1x1 | 8.0 | 14.2 | 16.9 |
| 1_3b | v5e:4x4 | 3.0 | 9.2 | 16.9 |
| 6_7b | v5e:4x4 | 9.2 | 16.1 | 16.9 |
| 13b | v5p:2x2x2 | 31.6 | 69.1 | 102.8 |
| 30b | v5p:2x2x4 | 40.1 | 76.3 | 102.8 |
| 66b | v5p:4x4x4 | 22.4 | 58.7 | 102.8 |

The learning rates are ours, from the grid in the paper's Table 3, which ends at OPT-1.3B.
"""

from __future__ import annotations

from typing import NamedTuple

from ml_collections import ConfigDict

from sparsecbm_jax.config.names import check_name

from configs import common


class Scale(NamedTuple):
    """The mesh of a size, its batch and its memory for pruning.

    Attributes:
        batch_size: Examples in a training step, and in an evaluation step, over all devices.
        fisher_gib: Memory of a device that pruning may take, in GiB.
        fsdp: Devices that parameters and rows are spread over.
        tensor: Devices that heads and hidden units are spread over.
    """

    batch_size: int
    fisher_gib: int
    fsdp: int = 1
    tensor: int = 1


SCALES = {
    "125m": Scale(batch_size=8, fisher_gib=8),
    "350m": Scale(batch_size=8, fisher_gib=8),
    "1_3b": Scale(batch_size=64, fisher_gib=8, fsdp=16),
    "6_7b": Scale(batch_size=16, fisher_gib=8, fsdp=16),
    "13b": Scale(batch_size=16, fisher_gib=40, fsdp=8),
    "30b": Scale(batch_size=16, fisher_gib=40, fsdp=4, tensor=4),
    "66b": Scale(batch_size=16, fisher_gib=40, fsdp=16, tensor=4),
}


def get_config(size: str = "1_3b") -> ConfigDict:
    """Returns the run of one of `SCALES`."""
    check_name("size of OPT", size, SCALES)
    scale = SCALES[size]
    config = common.get_config(f"opt_{size}")
    config.data.preset = "cebab"
    config.backbone.dtype = "bfloat16"
    config.backbone.remat = "full"
    config.training.batch_size = config.training.eval_batch_size = scale.batch_size
    config.mesh.fsdp = scale.fsdp
    config.mesh.tensor = scale.tensor
    config.pruner.fisher_memory = scale.fisher_gib * 2**30
    return config
