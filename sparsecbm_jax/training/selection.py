"""Validation: the score of every epoch, the best of them, and an early end."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsecbm_jax.data.batches import Tokenized
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.training.final_model import score
from sparsecbm_jax.training.run_checkpoints import RunCheckpoints, RunProgress
from sparsecbm_jax.training.setup import RunContext
from sparsecbm_jax.training.train_step import TrainState


class EpochSelection:
    """Scores epochs on the validation split and saves the best of those that the run's model may be made of.

    Args:
        context: the run.
        first_epoch: the first epoch that may be the best.
        checkpoints: where the best is saved.

    Raises:
        ValueError: if the validation split has no label that the run's strategy could be scored on.
    """

    def __init__(self, context: RunContext, first_epoch: int, checkpoints: RunCheckpoints) -> None:
        self._context, self._first_epoch, self._checkpoints = context, first_epoch, checkpoints
        _check_can_be_scored(context.settings.strategy, context.prepared.splits["validation"])

    def score_epoch(
        self, epoch: int, step: int, state: TrainState, progress: RunProgress
    ) -> tuple[dict[str, float | None], bool]:
        """Scores an epoch, and saves it where it is the best so far.

        Args:
            epoch: from 0.
            step: optimiser steps done.
            state: the state after them.
            progress: told of the best epoch.

        Returns:
            The accuracies of what the strategy has trained by then, and whether the epoch is the best so far.
        """
        strategy = self._context.settings.strategy
        report = score(self._context, state, "validation")
        value = _selection_score(strategy, report)
        is_best = epoch >= self._first_epoch and (progress.best_score is None or value > progress.best_score)
        if is_best:
            progress.best_score, progress.best_epoch = value, epoch
            self._checkpoints.save_best(step, epoch, state)
        accuracies: dict[str, float | None] = {
            name: report[name]["accuracy"] for name in ("concept", "task") if name in report
        }
        if STRATEGIES[strategy].predictor_inputs:
            accuracies.pop("task")
        return accuracies, is_best

    def ends_early(self, epoch: int, progress: RunProgress) -> bool:
        """Says whether no epoch is to follow this one, since none was better for `training.patience` epochs."""
        patience = self._context.settings.training.patience
        if not patience or epoch < self._first_epoch:
            return False
        assert progress.best_epoch is not None
        return epoch - progress.best_epoch >= patience


def _selection_score(strategy: str, report: Mapping[str, Any]) -> float:
    """Averages validation concept and task accuracy, of those that the strategy has trained by then."""
    values = [report[name]["accuracy"] for name in STRATEGIES[strategy].trains]
    return float(np.mean([value for value in values if value is not None]))


def _check_can_be_scored(strategy: str, validation: Tokenized) -> None:
    labels = {"concept": validation.concepts, "task": validation.labels}
    if not any((labels[name] >= 0).any() for name in STRATEGIES[strategy].trains):
        raise ValueError(f"the validation split has no label that strategy {strategy!r} could be scored on")
