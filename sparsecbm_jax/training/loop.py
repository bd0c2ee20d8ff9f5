"""The epochs of a run: steps, pruning events, checkpoints, validation."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sparsecbm_jax.core import sharding
from sparsecbm_jax.data.batches import Batch, Process, num_batches, train_batches
from sparsecbm_jax.model.config import Heads
from sparsecbm_jax.runtime import memory
from sparsecbm_jax.runtime.preemption import Preempted
from sparsecbm_jax.runtime.progress import progress
from sparsecbm_jax.training import throughput
from sparsecbm_jax.training.metrics_log import MetricsLog, print_once
from sparsecbm_jax.training.profiling import StepTrace
from sparsecbm_jax.training.pruning_events import PruningEvents
from sparsecbm_jax.training.run_checkpoints import RunCheckpoints, RunProgress, abstract_state
from sparsecbm_jax.training.selection import EpochSelection
from sparsecbm_jax.training.setup import RunContext
from sparsecbm_jax.training.teacher import Teacher, is_distilled, loss_of
from sparsecbm_jax.training.throughput import Meter
from sparsecbm_jax.training.train_step import TrainState, init_state, make_optimizer, make_train_step


class NonFiniteError(FloatingPointError):
    """Training met NaN or Inf."""


class TrainingLoop:
    """Runs the epochs of one run, from its beginning or from its latest checkpoint.

    Args:
        context: the run.
        params: the backbone's parameters that training begins with; a copy of them is trained.
        heads: the heads that training begins with.
        checkpoints: of the run.

    Attributes:
        state: the run's arrays.
        step: optimiser steps done.
        progress: how far the run has come.
        log: the run's log of metrics.
    """

    def __init__(self, context: RunContext, params: Any, heads: Heads, checkpoints: RunCheckpoints) -> None:
        run, config = context.settings, context.prepared.config
        self._context, self._checkpoints = context, checkpoints
        self._train_split = context.prepared.splits["train"]
        self._steps_per_epoch = num_batches(self._train_split.num_examples, run.training.batch_size)
        self._pruning = PruningEvents(context, self._steps_per_epoch, checkpoints.scores)
        self._selection = EpochSelection(context, self._pruning.last_epoch, checkpoints)
        num_steps = run.training.num_epochs * self._steps_per_epoch
        tx = make_optimizer(run.optim, num_steps, self._pruning.steps(self._steps_per_epoch))
        self.state = init_state(params, heads, tx, context.mesh)
        loss_fn = loss_of(run, context.loss_fn)
        self._teacher: Teacher | None = None
        self._step_fn = make_train_step(config, tx, context.mesh, loss_fn=loss_fn)
        self._rng = jax.random.fold_in(jax.random.key(run.seed), 1)
        self.progress, self.step = RunProgress(), 0
        self._resume()
        is_writer = jax.process_index() == 0
        # Of an epoch that was stopped between its last step and its scores, these are still to come.
        redone = () if self._is_scored() else ("validation",)
        self.log = MetricsLog(context.workdir, step=self.step, redone=redone, is_writer=is_writer)
        self._trace = StepTrace(context.workdir / "profile" if context.profile and is_writer else None)

    def _resume(self) -> None:
        """Goes on from the latest checkpoint, where there is one."""
        latest = self._checkpoints.states.latest_step()
        if latest is None:
            return
        self.progress = RunProgress.from_meta(self._checkpoints.states.read_meta(latest))
        abstract = abstract_state(self._context, self.state, has_masks=bool(self.progress.events_done))
        del self.state  # or there would be two for a while
        self.state, self.step = self._checkpoints.states.restore(latest, abstract), latest
        if self.progress.events_done and is_distilled(self._context.settings):
            self._teacher = Teacher.load(self._context.workdir)
        print_once(f"resuming {self._context.workdir} after step {latest}")

    def run_epochs(self) -> None:
        """Trains to the last epoch, or until no epoch is better for `training.patience` epochs.

        Raises:
            NonFiniteError: if a loss or gradient is NaN or Inf.
            Preempted: SIGTERM came, and a checkpoint is saved.
        """
        first = self.step // self._steps_per_epoch
        with contextlib.closing(self.log):
            try:
                if not self._is_scored():
                    self._end_epoch(first - 1)
                for epoch in range(first, self._context.settings.training.num_epochs):
                    if self.progress.stopped_early:
                        break
                    self._run_steps(epoch)
                    self._end_epoch(epoch)
            except Preempted:
                self._save()
                self._checkpoints.states.wait()
                print_once(f"saved what there is after step {self.step}")
                raise
            except KeyboardInterrupt:
                saved = self._checkpoints.states.latest_step() or 0
                print_once(f"\nstopped in step {self.step + 1}; the same command goes on after step {saved}")
                raise

    def best_state(self) -> tuple[TrainState, int]:
        """Restores the state of the best epoch, and says which one it is.

        What is saved there counts, should a crash have come between it and the run's own checkpoint.
        """
        return self._checkpoints.restore_best(self._context, self.state)

    def _run_steps(self, epoch: int) -> None:
        """Takes the steps of an epoch that are still to come, and does the pruning events that fall among them."""
        done = self.step - epoch * self._steps_per_epoch
        description = f"epoch {epoch + 1}/{self._context.settings.training.num_epochs}"
        bar = progress(
            self._batches(epoch, done),
            description=description,
            total=self._steps_per_epoch,
            initial=done,
            unit="step",
        )
        self._started = time.monotonic()
        self._meter = Meter(self._context.prepared.config, list(self._context.mesh.devices.flat))
        self._check = _FiniteCheck(self._context, self._checkpoints)
        for index, batch in enumerate(bar, start=done):
            while self._pruning.is_due(self.progress.events_done, epoch, index):
                self._prune(epoch)
                bar.unpause()  # its time left is that of steps
            metrics = self._take_step(batch)
            if self.step % self._context.settings.training.log_every_steps == 0:
                loss, rates = self._log_step(epoch, metrics)
                bar.set_postfix_str(f"loss {loss:.3f}, {throughput.render(rates)}", refresh=False)
            self._stop_or_save(is_last=index + 1 == self._steps_per_epoch)
        self._check.run()
        self._count_time()
        self._trace.end()
        if (traced := self._trace.report()) is not None:
            print_once(traced)
        print_once(f"epoch {epoch + 1}: {throughput.render(self._meter.read_all())}")

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        run = self._context.settings
        return train_batches(
            self._train_split,
            batch_size=run.training.batch_size,
            seed=run.seed,
            epoch=epoch,
            start_batch=start,
            buckets=self._context.prepared.buckets,
            process=Process(jax.process_index(), jax.process_count()),
        )

    def _take_step(self, batch: Batch) -> Mapping[str, Any]:
        self._trace.begin_step(self._check.run)
        self._meter.add(batch, is_sparse=self.state.packed is not None)
        batch = batch if self._teacher is None else self._teacher.teach(batch)
        self.state, metrics = self._step_fn(self.state, sharding.put_batch(batch, self._context.mesh), self._rng)
        self._check.run()
        self.step += 1
        self._check.wait_with(self.step, batch.row_ids, metrics)
        return metrics

    def _log_step(self, epoch: int, metrics: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
        values = {name: float(value) for name, value in metrics.items()}
        rates = self._meter.read()
        self.log.write(self.step, "train", {"epoch": epoch, **values, **rates})
        if memory.stops_keeping():
            print_once("half of the memory is in use: freed memory is given back from now on, and steps take longer")
        return values["loss"], rates

    def _stop_or_save(self, *, is_last: bool) -> None:
        """Ends the run where it is to end now, and saves it where that is due; after the last step others save it."""
        every = self._context.settings.training.save_every_steps
        if self._context.stop.is_due():
            self._check.run()
            self._count_time()
            raise Preempted
        if every and self.step % every == 0 and not is_last:
            self._check.run()
            self._count_time()
            with self._meter.not_counting():
                self._save()
            self._started = time.monotonic()

    def _count_time(self) -> None:
        """Adds the time since the last count to that of training."""
        now = time.monotonic()
        self.progress.seconds += now - self._started
        self._started = now

    def _prune(self, epoch: int) -> None:
        """Does the pruning event that is due."""
        self._check.run()
        with self._meter.not_counting():
            if self.progress.events_done == 0 and is_distilled(self._context.settings):
                self._teacher = Teacher.of_state(self._context, self.state)
                self._teacher.save(self._context.workdir)
            self.state, record = self._pruning.prune(self.progress.events_done, self.step, self.state)
            # Under the step it comes before: a continuation from this step does it, and writes it, again.
            self.log.write(self.step + 1, "prune", {"epoch": epoch, **record})
            self.progress.events_done += 1

    def _end_epoch(self, epoch: int) -> None:
        """Scores an epoch, and saves the run."""
        accuracies, is_best = self._selection.score_epoch(epoch, self.step, self.state, self.progress)
        record = {f"{name}_accuracy": value for name, value in accuracies.items()}
        self.log.write(self.step, "validation", {"epoch": epoch, **record})
        text = ", ".join(f"{name} {100 * (value or 0):.1f} %" for name, value in accuracies.items())
        print_once(f"epoch {epoch + 1}: validation accuracy {text}{' (best so far)' if is_best else ''}")
        if self._selection.ends_early(epoch, self.progress):
            self.progress.stopped_early = True
            patience = self._context.settings.training.patience
            print_once(f"stopping early: no better validation score for {patience} epochs")
        self.progress.scored_epochs = epoch + 1
        self._save()

    def _is_scored(self) -> bool:
        return self.progress.is_scored(self.step // self._steps_per_epoch)

    def _save(self) -> None:
        self._checkpoints.save(self.step, self.state, self.progress)


class _FiniteCheck:
    """Looks at a step's metrics when the next step is under way, so that the device never waits for the host to look.

    Args:
        context: the run.
        checkpoints: of which the error names the latest.
    """

    def __init__(self, context: RunContext, checkpoints: RunCheckpoints) -> None:
        self._workdir, self._states = context.workdir, checkpoints.states
        self._waiting: tuple[int, np.ndarray, Mapping[str, Any]] | None = None

    def wait_with(self, step: int, row_ids: np.ndarray, metrics: Mapping[str, Any]) -> None:
        """Takes a step's metrics, and the rows that they are of, to look at later."""
        self._waiting = step, row_ids, metrics

    def run(self) -> None:
        """Looks at the metrics that wait, if any do; returns when their step is done.

        Raises:
            NonFiniteError: if the loss or the gradients' norm is NaN or Inf.
        """
        if self._waiting is None:
            return
        (step, row_ids, metrics), self._waiting = self._waiting, None
        values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        if all(math.isfinite(value) for value in values.values()):
            return
        last = self._states.latest_step()
        where = "no checkpoint was saved yet" if last is None else f"the last good checkpoint is step {last}"
        rows = [int(row) for row in row_ids if row >= 0]
        raise NonFiniteError(
            f"step {step}: {', '.join(f'{name} is {value}' for name, value in values.items())} on train rows {rows}; "
            f"{where} in {self._workdir / 'checkpoints'}. A lower learning rate or clip_norm often helps"
        )
