"""CEBaB, four concepts of restaurant reviews (Table 2, left): 20 epochs, γ = 5, batch 8.

    python launch/train.py --config=configs/cebab.py:bert --config.data.path=DIR --workdir=runs/cebab_bert

DIR holds the published JSON files; without it the data set is loaded by its hub name. After the colon stands one of
minilm (default), distilbert, bert, roberta, opt_125m, opt_350m, opt_1_3b (batch 1) and tiny.
Add `--config.strategy=joint` (or standard, independent, sequential) for the dense baselines of Table 2.

Hardware: one accelerator; MiniLM also trains on a CPU. Expected time: not yet measured. Learning rates are ours, from
the grid in the paper's Table 3.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(backbone: str = "minilm") -> ConfigDict:
    """Returns the run with one of `common.BACKBONES`."""
    config = common.get_config(backbone)
    config.data.preset = "cebab"
    return config
