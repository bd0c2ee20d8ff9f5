"""A run's checkpoints: its state, the best epoch's model, the scores of a pruning event."""

import contextlib
import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
from jax.sharding import Mesh

from sparsecbm_jax import backbones
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.masks import Masks, Packed
from sparsecbm_jax.core.trees import Params
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.runtime.checkpoints import Checkpointer
from sparsecbm_jax.training.setup import RunContext
from sparsecbm_jax.training.train_step import TrainState


@dataclasses.dataclass
class RunProgress:
    """Counts how far a run has come: what a checkpoint holds beside the state's arrays.

    Attributes:
        events_done: pruning events that are done.
        best_score: validation score of the best epoch so far.
        best_epoch: that epoch, from 0.
        seconds: time spent on training, in all processes of the run one after the other.
        scored_epochs: epochs that are scored; None in checkpoints of runs that did not count them.
        stopped_early: whether no epoch is to follow, since `patience` is at its end.
    """

    events_done: int = 0
    best_score: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    scored_epochs: int | None = 0
    stopped_early: bool = False

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        """Reads a checkpoint's meta data."""
        return cls(**{"scored_epochs": None, **meta})

    def to_meta(self) -> dict[str, Any]:
        """Returns JSON for a checkpoint's meta data."""
        left_out = {"scored_epochs": None, "stopped_early": False}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in left_out or value != left_out[name]
        }

    def is_scored(self, num_epochs: int) -> bool:
        """Says whether the first `num_epochs` epochs are scored."""
        return self.scored_epochs is None or self.scored_epochs >= num_epochs


class RunCheckpoints:
    """Opens a run's checkpoints in its directory while it is entered.

    Args:
        workdir: the run's directory.
        max_to_keep: how many of the latest states are left in place.
        num_scores: the most scores of a pruning event, all cuts and concepts together.

    Attributes:
        states: of the run, by step.
        best: parameters, heads and masks of the best epoch so far.
        scores: of the pruning event that is under way.
    """

    def __init__(self, workdir: Path, max_to_keep: int, num_scores: int) -> None:
        self._workdir, self._max_to_keep, self._num_scores = workdir, max_to_keep, num_scores

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.states = stack.enter_context(Checkpointer(self._workdir / "checkpoints", self._max_to_keep))
            self.best = stack.enter_context(Checkpointer(self._workdir / "best", 1))
            self.scores = stack.enter_context(Checkpointer(self._workdir / "scores", self._num_scores))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def save(self, step: int, state: TrainState, progress: RunProgress) -> None:
        """Saves the run's state after a step.

        A checkpoint of this step is left as it is, though an event or scores that follow it may have begun: they are
        done again. To replace it would leave none for a while.
        """
        if self.states.latest_step() != step:
            # What the meta data calls the best is there before they are.
            self.best.wait()
            self.states.save(step, state, progress.to_meta())

    def save_best(self, step: int, epoch: int, state: TrainState) -> None:
        """Saves what of an epoch's state the run's model is made of, in place of an earlier epoch's."""
        meta = {"epoch": epoch, "has_masks": state.packed is not None}
        self.best.save(step, (state.params, state.heads, state.packed), meta)

    def restore_best(self, context: RunContext, state: TrainState) -> tuple[TrainState, int]:
        """Restores the best epoch.

        Args:
            context: the run.
            state: the run's state, of which the result keeps what is no part of the model.

        Returns:
            The state, and the number of the epoch.

        Raises:
            RuntimeError: if none was saved.
        """
        step = self.best.latest_step()
        if step is None:
            raise RuntimeError(f"{self._workdir / 'best'} holds no checkpoint, though the run has ended")
        meta = self.best.read_meta(step)
        abstract = abstract_state(context, state, has_masks=meta["has_masks"])
        params, heads, packed = self.best.restore(step, (abstract.params, abstract.heads, abstract.packed))
        return state._replace(params=params, heads=heads, packed=packed), meta["epoch"]


def pack_on(mesh: Mesh, masks: Masks) -> Packed:
    """Packs masks and places them on a mesh as their kernels lie."""
    packed = jax.jit(masks_lib.pack)(masks)
    return jax.device_put(packed, sharding.shardings(mesh, sharding.packed_specs(packed)))


def full_masks(config: CBMConfig, params: Params) -> Masks:
    """Makes masks that prune nothing."""
    return masks_lib.create(params, backbones.maskable_paths(config.backbone), config.num_concepts)


def abstract_state(context: RunContext, state: TrainState, *, has_masks: bool) -> TrainState:
    """Describes a state's arrays, by shape and place, for a checkpoint to be restored to.

    Args:
        context: the run.
        state: a state of the run.
        has_masks: whether the described state has masks, though `state` may have none yet.
    """
    if has_masks:
        state = state._replace(packed=pack_on(context.mesh, full_masks(context.prepared.config, state.params)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
