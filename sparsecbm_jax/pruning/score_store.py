"""Scores of a pruning event, saved until its masks are cut."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

from sparsecbm_jax.pruning.gradients import Kernels
from sparsecbm_jax.runtime.checkpoints import Checkpointer


class StoredScores:
    """Keeps scores on disk, as a `ScoreStore`: a checkpoint for each cut and concept, at four bytes a weight.

    Args:
        checkpoints: where the scores lie.
        num_concepts: K.
        about: JSON that says what the scores are of.
        discards_others: scores of something else are deleted; else asking for them is an error.
    """

    def __init__(
        self, checkpoints: Checkpointer, num_concepts: int, about: Mapping[str, Any], *, discards_others: bool = False
    ) -> None:
        self._checkpoints, self._num_concepts = checkpoints, num_concepts
        self._about = json.loads(json.dumps(about))
        if discards_others and any(checkpoints.read_meta(step) != self._about for step in checkpoints.steps()):
            checkpoints.clear()

    def __len__(self) -> int:
        return len(self._checkpoints.steps())

    def clear(self) -> None:
        """Deletes all scores."""
        self._checkpoints.clear()

    def _step(self, cut: int, concept: int) -> int:
        return (cut - 1) * self._num_concepts + concept

    def get(self, cut: int, concept: int, like: Kernels) -> Kernels | None:
        """Returns scores as `ScoreStore.get` does.

        Raises:
            ValueError: if the scores there are of something else.
            CheckpointError: if they are damaged.
        """
        step = self._step(cut, concept)
        if step not in self._checkpoints.steps():
            return None
        if (found := self._checkpoints.read_meta(step)) != self._about:
            keys = [key for key in {**found, **self._about} if found.get(key) != self._about.get(key)]
            shown = "; ".join(f"{key}: saved {found.get(key)}, current {self._about.get(key)}" for key in keys)
            raise ValueError(f"the scores that are stored are of something else: {shown}")
        return self._checkpoints.restore(step, dict(like))

    def put(self, cut: int, concept: int, scores: Kernels) -> None:
        """Keeps scores as `ScoreStore.put` does."""
        self._checkpoints.save(self._step(cut, concept), dict(scores), self._about)


class ScoreStore(Protocol):
    """Keeps the scores of a cut and concept.

    An event that was stopped, or a cut at another sparsity, need not make them again.
    """

    def get(self, cut: int, concept: int, like: Kernels) -> Kernels | None:
        """Returns the scores, placed as `like` is, or None where there are none."""

    def put(self, cut: int, concept: int, scores: Kernels) -> None:
        """Keeps the scores."""
