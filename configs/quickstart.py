"""A first SparseCBM in minutes on two CPU cores: the embedded synthetic reviews, MiniLM.

Five epochs: three dense, two at the final sparsity. One pruning event replaces the gradual ones of the other configs.

    python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart

`configs/quickstart.py:tiny` needs no pretrained weights: a small BERT from random values, with a vocabulary made from
the training texts.

Hardware: 2 CPU cores. Time and scores: docs/results/accuracy.md. The learning rates are ours.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(backbone: str = "minilm") -> ConfigDict:
    """Returns the run with one of `common.BACKBONES`."""
    config = common.get_config(backbone)
    config.data.preset = "synthetic"
    # Few steps: a higher learning rate than the default.
    config.optim.learning_rate = max(config.optim.learning_rate, 3e-4)
    config.optim.head_learning_rate = 3e-2
    config.training.num_epochs = 5
    config.training.batch_size = 16
    config.sparsity.schedule = "oneshot"
    config.sparsity.start_epoch = 3
    config.sparsity.end_epoch = 4
    config.pruner.criterion = "diagonal_fisher"
    if backbone == "tiny":
        # It starts from nothing, and its epochs take seconds.
        config.training.num_epochs = 20
        config.sparsity.start_epoch = 14
        config.sparsity.end_epoch = 15
    config.pruner.num_grads = 16
    return config
