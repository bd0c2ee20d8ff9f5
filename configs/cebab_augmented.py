"""CEBaB with six further, machine-labelled concepts: ten in all, so ten subnetworks at sparsity 0.9.

    python launch/train.py --config=configs/cebab_augmented.py:bert --config.data.path=DIR --workdir=runs/augmented_bert

DIR holds the published CSV files. After the colon stands a backbone, as for configs/cebab.py.

Hardware: one accelerator; MiniLM also trains on a CPU. Expected time: not yet measured. Learning rates are ours, from
the grid in the paper's Table 3.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(backbone: str = "minilm") -> ConfigDict:
    """Returns the run with one of `common.BACKBONES`."""
    config = common.get_config(backbone)
    config.data.preset = "cebab_augmented"
    return config
