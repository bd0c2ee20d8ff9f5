"""MiniLM on CEBaB in minutes on a CPU: the runs of docs/results/accuracy.md.

    python launch/train.py --config=configs/cebab_minilm.py --config.data.path=DIR --seeds=0,1,2 --workdir=runs/cebab

`configs/cebab_minilm.py:joint`, `:standard`, `:independent` and `:sequential` train the dense baselines. Batch, epochs,
learning rates and the timing of the pruning events are ours, chosen on the validation split so that two CPU cores
suffice. A subnetwork at 75 % sparsity has to change more than the dense model: it needs three times its learning rate.

Hardware: 2 CPU cores. Scores: docs/results/accuracy.md.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(strategy: str = "sparse") -> ConfigDict:
    """Returns the run with one of the training strategies."""
    config = common.get_config("minilm")
    config.data.preset = "cebab"
    config.strategy = strategy
    # Every sixth training review has no majority label for the task, but has labels for its concepts.
    config.data.keep_unlabelled = strategy != "standard"
    config.optim.learning_rate = 3e-4 if strategy == "sparse" else 1e-4
    config.optim.head_learning_rate = 1e-2
    config.training.batch_size = 16
    config.training.num_epochs = 12
    config.sparsity.start_epoch = 2
    config.sparsity.end_epoch = 4
    config.pruner.num_grads = 32
    config.pruner.grad_batch_size = 16
    return config
