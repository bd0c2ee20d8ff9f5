"""Which weights a concept keeps: gradients, Fisher, scores (ρ_Q and its baselines), and masks cut by them."""

from sparsecbm_jax.config import moved_names
from sparsecbm_jax.pruning.criteria import Criterion, make_criterion
from sparsecbm_jax.pruning.pruner import prune_model
from sparsecbm_jax.pruning.schedule import PruningEvent, default_sparsity, schedule

__all__ = ["Criterion", "PruningEvent", "default_sparsity", "make_criterion", "prune_model", "schedule"]

__getattr__ = moved_names.raise_for(__name__)
