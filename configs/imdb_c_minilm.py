"""MiniLM on IMDB-C in minutes on a CPU: the first 128 tokens of a review. docs/results/accuracy.md has both runs.

    python launch/train.py --config=configs/imdb_c_minilm.py --config.data.path=DIR --workdir=runs/imdb_c

After a colon: `sparse` (default), `joint`, `standard`, `independent` or `sequential`. DIR holds the published CSV
files; the labels are those made by people. The settings are ours.

Hardware: 2 CPU cores. Expected time: a quarter of an hour on one of them, 5 minutes for `joint`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import cebab_minilm


def get_config(strategy: str = "sparse") -> ConfigDict:
    """Returns the run with one of the training strategies."""
    config = cebab_minilm.get_config(strategy)
    config.data.preset = "imdb_c_manual"
    config.data.max_length = 128
    config.training.batch_size = 8
    config.training.num_epochs = 10
    config.sparsity.start_epoch = 3
    config.sparsity.end_epoch = 5
    config.pruner.num_grads = 16
    config.pruner.grad_batch_size = 8
    return config
