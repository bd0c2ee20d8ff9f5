"""The pruning events of a run: when one is due, and the masks that it makes."""

import functools
import time
from typing import Any

import jax

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.data.batches import fisher_batches
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.pruning import pruner
from sparsecbm_jax.pruning.pruner import PruningHooks, PruningOptions
from sparsecbm_jax.pruning.schedule import PruningEvent, schedule
from sparsecbm_jax.pruning.score_store import StoredScores
from sparsecbm_jax.pruning.woodfisher_scores import ScoreReport
from sparsecbm_jax.runtime import memory
from sparsecbm_jax.runtime.checkpoints import Checkpointer
from sparsecbm_jax.runtime.memory import peak_memory
from sparsecbm_jax.runtime.progress import progress
from sparsecbm_jax.training.metrics_log import print_once
from sparsecbm_jax.training.run_checkpoints import full_masks, pack_on
from sparsecbm_jax.training.setup import RunContext
from sparsecbm_jax.training.train_step import TrainState


class PruningEvents:
    """Prunes the model at the steps that the run's schedule names; dense runs have no events.

    Args:
        context: the run.
        steps_per_epoch: steps of an epoch.
        scores: where scores lie until the event's masks are made.

    Raises:
        ValueError: if the schedule does not fit the run, or its masks do not fit an integer.
    """

    def __init__(self, context: RunContext, steps_per_epoch: int, scores: Checkpointer) -> None:
        self._context, self._scores = context, scores
        self._events: list[PruningEvent] = []
        run, num_concepts = context.settings, context.prepared.config.num_concepts
        if STRATEGIES[run.strategy].is_sparse:
            self._events = schedule(run.sparsity, num_concepts, steps_per_epoch)
            masks_lib.packed_dtype(num_concepts)

    @property
    def last_epoch(self) -> int:
        """Returns the first epoch at the final sparsity; of dense runs, the first of all."""
        return self._events[-1].epoch if self._events else 0

    def steps(self, steps_per_epoch: int) -> tuple[int, ...]:
        """Lists the steps of the run before which an event is, rising."""
        return tuple(event.epoch * steps_per_epoch + event.step for event in self._events)

    def is_due(self, num_done: int, epoch: int, step: int) -> bool:
        """Says whether an event falls before a step of an epoch, both from 0, with `num_done` events done."""
        if num_done == len(self._events):
            return False
        event = self._events[num_done]
        return (epoch, step) >= (event.epoch, event.step)

    def prune(self, number: int, step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Scores and cuts the masks of all concepts.

        Args:
            number: of the event, from 0.
            step: optimiser steps done.
            state: the run's state.

        Returns:
            The state with new masks, and a record of the event for the log.
        """
        context, event, started = self._context, self._events[number], time.monotonic()
        config, run = context.prepared.config, context.settings
        if state.packed is None:
            masks = full_masks(config, state.params)
        else:
            masks = masks_lib.unpack(state.packed, config.num_concepts)
        # Placed alike, the first time too, so that the programs of one event do for the next.
        masks = jax.device_put(masks, sharding.shardings(context.mesh, sharding.mask_specs(masks)))
        if number == 0 and context.criterion is None:
            print_once(pruner.describe_plan(state.params, masks, run.pruner))
        store = self._open_store({"event": number, "step": step})
        reports: list[ScoreReport] = []
        with memory.giving_back():
            masks = pruner.prune(
                config,
                ModelArrays(state.params, masks, state.heads),
                fisher_batches(context.prepared.splits["train"], run.pruner, seed=run.seed, event=number),
                event.sparsity,
                PruningOptions(run.pruner, run.sparsity, context.criterion, run.seed + number),
                PruningHooks(
                    reports=reports,
                    make_bar=functools.partial(progress, description=f"pruning to {event}", unit="gradient"),
                    on_gradient=context.stop.check,
                    store=store,
                ),
            )
        store.clear()
        state = state._replace(packed=pack_on(context.mesh, masks))
        record = {
            "sparsity": event.sparsity,
            "density": masks_lib.total_density(masks).tolist(),
            "concepts": reports,
            "peak_bytes": peak_memory(),
            "seconds": time.monotonic() - started,
        }
        return state, record

    def _open_store(self, about: dict[str, int]) -> StoredScores:
        num_concepts = self._context.prepared.config.num_concepts
        store = StoredScores(self._scores, num_concepts, about, discards_others=True)
        if len(store):
            have = f"{len(store)} of {num_concepts} concepts"
            print_once(f"scores of {have} are there already, from before the run was stopped")
        return store
