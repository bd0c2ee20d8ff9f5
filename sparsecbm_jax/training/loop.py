"""The epochs of a run: steps, pruning events, checkpoints, validation."""

import contextlib
import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sparsecbm_jax import backbones
from sparsecbm_jax.config.run_config import RunConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.data.batches import Tokenized, fisher_batches, num_batches, train_batches
from sparsecbm_jax.model.config import Heads
from sparsecbm_jax.model.losses import LossFn
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.pruning import pruner
from sparsecbm_jax.pruning.criteria import Criterion
from sparsecbm_jax.pruning.schedule import PruningEvent, schedule
from sparsecbm_jax.pruning.score_store import StoredScores
from sparsecbm_jax.pruning.woodfisher_scores import ScoreReport
from sparsecbm_jax.runtime import memory
from sparsecbm_jax.runtime.checkpoints import Checkpointer
from sparsecbm_jax.runtime.memory import peak_memory
from sparsecbm_jax.runtime.preemption import Preempted, StopSignal
from sparsecbm_jax.runtime.progress import progress
from sparsecbm_jax.training import throughput
from sparsecbm_jax.training.final_model import score
from sparsecbm_jax.training.metrics_log import MetricsLog
from sparsecbm_jax.training.profiling import StepTrace
from sparsecbm_jax.training.setup import Prepared
from sparsecbm_jax.training.throughput import Meter
from sparsecbm_jax.training.train_step import TrainState, init_state, make_optimizer, make_train_step

# A step that is not checked yet: its number, rows and metrics.
Pending = tuple[int, np.ndarray, Mapping[str, Any]] | None


class NonFiniteError(FloatingPointError):
    """Training met NaN or Inf."""


def print_once(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


class TrainingLoop:
    """The epochs of one run: what is fixed for it, and the few things that a checkpoint's meta data keeps."""

    def __init__(
        self,
        run: RunConfig,
        prepared: Prepared,
        heads: Heads,
        mesh: Mesh,
        checkpoints: Checkpointer,
        best: Checkpointer,
        scores: Checkpointer,
        workdir: Path,
        loss_fn: LossFn | None,
        criterion: Criterion | None,
        stop: StopSignal,
        profile: bool,
    ) -> None:
        self.settings, self.prepared, self.mesh, self.stop = run, prepared._replace(params=None), mesh, stop
        self.checkpoints, self.best, self.workdir, self.criterion = checkpoints, best, workdir, criterion
        self.scores = scores
        self.train_split = prepared.splits["train"]
        self.steps_per_epoch = num_batches(self.train_split.num_examples, run.training.batch_size)
        self.events: list[PruningEvent] = []
        if STRATEGIES[run.strategy].is_sparse:
            self.events = schedule(run.sparsity, prepared.config.num_concepts, self.steps_per_epoch)
            masks_lib.packed_dtype(prepared.config.num_concepts)
        _check_can_be_scored(run.strategy, prepared.splits["validation"])
        self.first_kept_epoch = self.events[-1].epoch if self.events else 0
        self.tx = make_optimizer(run.optim, run.training.num_epochs * self.steps_per_epoch)
        self.state = init_state(prepared.params, heads, self.tx, mesh)
        self.step_fn = make_train_step(
            prepared.config, self.tx, mesh, loss_fn=STRATEGIES[run.strategy].loss if loss_fn is None else loss_fn
        )
        self.rng = jax.random.fold_in(jax.random.key(run.seed), 1)
        self.meta: dict[str, Any] = {"events_done": 0, "best_score": None, "best_epoch": None, "seconds": 0.0}
        self.meta["scored_epochs"] = 0
        latest = checkpoints.latest_step()
        if latest is not None:
            self.meta = checkpoints.read_meta(latest)
            abstract = self._abstract(bool(self.meta["events_done"]))
            del self.state  # or there would be two for a while
            self.state = checkpoints.restore(latest, abstract)
            print_once(f"resuming {workdir} after step {latest}")
        self.step = latest or 0
        # Of an epoch that was stopped between its last step and its scores, these are still to come.
        redone = () if self._is_scored() else ("validation",)
        self.log = MetricsLog(workdir, step=self.step, redone=redone, is_writer=jax.process_index() == 0)
        self.trace = StepTrace(workdir / "profile" if profile and jax.process_index() == 0 else None)

    def _abstract(self, has_masks: bool) -> TrainState:
        state = self.state
        if has_masks:
            state = state._replace(packed=self._packed(self._full_masks()))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)

    def _full_masks(self) -> masks_lib.Masks:
        paths = backbones.maskable_paths(self.prepared.config.backbone)
        return masks_lib.create(self.state.params, paths, self.prepared.config.num_concepts)

    def _packed(self, masks: masks_lib.Masks) -> masks_lib.Packed:
        packed = jax.jit(masks_lib.pack)(masks)
        return jax.device_put(packed, sharding.shardings(self.mesh, sharding.packed_specs(packed)))

    def _is_scored(self) -> bool:
        return self.meta.get("scored_epochs", math.inf) >= self.step // self.steps_per_epoch

    def run_epochs(self) -> None:
        first = self.step // self.steps_per_epoch
        with contextlib.closing(self.log):
            try:
                if not self._is_scored():
                    self._end_of_epoch(first - 1)
                for epoch in range(first, self.settings.training.num_epochs):
                    if self.meta.get("stopped_early"):
                        break
                    self._epoch(epoch)
                    self._end_of_epoch(epoch)
            except Preempted:
                self._save()
                self.checkpoints.wait()
                print_once(f"saved what there is after step {self.step}")
                raise
            except KeyboardInterrupt:
                saved = self.checkpoints.latest_step() or 0
                print_once(f"\nstopped in step {self.step + 1}; the same command goes on after step {saved}")
                raise

    def _epoch(self, epoch: int) -> None:
        training = self.settings.training
        done = self.step - epoch * self.steps_per_epoch
        batches = train_batches(
            self.train_split,
            batch_size=training.batch_size,
            seed=self.settings.seed,
            epoch=epoch,
            start_batch=done,
            buckets=self.prepared.buckets,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        bar = progress(
            batches,
            description=f"epoch {epoch + 1}/{training.num_epochs}",
            total=self.steps_per_epoch,
            initial=done,
            unit="step",
        )
        self.started = time.monotonic()
        self.meter = Meter(self.prepared.config, list(self.mesh.devices.flat))
        pending: Pending = None
        for index, batch in enumerate(bar, start=done):
            while self._is_due(epoch, index):
                self._check(pending)
                with self.meter.not_counting():
                    self._prune(epoch)
                bar.unpause()  # its time left is that of steps
            self.trace.begin_step(functools.partial(self._check, pending))
            self.meter.add(batch, is_sparse=self.state.packed is not None)
            self.state, metrics = self.step_fn(self.state, sharding.put_batch(batch, self.mesh), self.rng)
            # One step behind, so that the device never waits for the host to look.
            self._check(pending)
            pending = (self.step + 1, batch.row_ids, metrics)
            self.step += 1
            if self.step % training.log_every_steps == 0:
                values = {name: float(value) for name, value in metrics.items()}
                rates = self.meter.read()
                self.log.write(self.step, "train", {"epoch": epoch, **values, **rates})
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {throughput.render(rates)}", refresh=False)
                if memory.stops_keeping():
                    print_once(
                        "half of the memory is in use: freed memory is given back from now on, and steps take longer"
                    )
            every = training.save_every_steps
            if self.stop.is_due():
                self._check(pending)
                self._count_time()
                raise Preempted
            if every and self.step % every == 0 and index + 1 < self.steps_per_epoch:
                self._check(pending)
                self._count_time()
                with self.meter.not_counting():
                    self._save()
                self.started = time.monotonic()
        self._check(pending)
        self._count_time()
        self.trace.end()
        if (traced := self.trace.report()) is not None:
            print_once(traced)
        print_once(f"epoch {epoch + 1}: {throughput.render(self.meter.read_all())}")

    def _count_time(self) -> None:
        """Adds the time since the last count to that of training."""
        now = time.monotonic()
        self.meta["seconds"] += now - self.started
        self.started = now

    def _check(self, pending: Pending) -> None:
        if pending is None:
            return
        step, row_ids, metrics = pending
        values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        if all(math.isfinite(value) for value in values.values()):
            return
        last = self.checkpoints.latest_step()
        where = "no checkpoint was saved yet" if last is None else f"the last good checkpoint is step {last}"
        rows = [int(row) for row in row_ids if row >= 0]
        raise NonFiniteError(
            f"step {step}: {', '.join(f'{name} is {value}' for name, value in values.items())} on train rows {rows}; "
            f"{where} in {self.workdir / 'checkpoints'}. A lower learning rate or clip_norm often helps"
        )

    def _is_due(self, epoch: int, index: int) -> bool:
        """Whether a pruning event falls before this step."""
        left = self.events[self.meta["events_done"] :]
        return bool(left) and (epoch, index) >= (left[0].epoch, left[0].step)

    def _prune(self, epoch: int) -> None:
        number = self.meta["events_done"]
        config, run, state, event = self.prepared.config, self.settings, self.state, self.events[number]
        masks = self._full_masks() if state.packed is None else masks_lib.unpack(state.packed, config.num_concepts)
        # Placed alike, the first time too, so that the programs of one event do for the next.
        masks = jax.device_put(masks, sharding.shardings(self.mesh, sharding.mask_specs(masks)))
        started, reports = time.monotonic(), list[ScoreReport]()
        if number == 0 and self.criterion is None:
            print_once(pruner.describe_plan(state.params, masks, run.pruner))
        about = {"event": number, "step": self.step}
        store = StoredScores(self.scores, config.num_concepts, about, discards_others=True)
        if len(store):
            have = f"{len(store)} of {config.num_concepts} concepts"
            print_once(f"scores of {have} are there already, from before the run was stopped")
        with memory.giving_back():
            masks = pruner.prune(
                config,
                state.params,
                masks,
                state.heads,
                fisher_batches(self.train_split, run.pruner, seed=run.seed, event=number),
                event.sparsity,
                pruner=run.pruner,
                cutting=run.sparsity,
                criterion=self.criterion,
                seed=run.seed + number,
                reports=reports,
                make_bar=functools.partial(progress, description=f"pruning to {event}", unit="gradient"),
                on_gradient=self.stop.check,
                store=store,
            )
        store.clear()
        self.state = state._replace(packed=self._packed(masks))
        record = {"epoch": epoch, "sparsity": event.sparsity, "density": masks_lib.total_density(masks).tolist()}
        record |= {"concepts": reports, "peak_bytes": peak_memory()}
        # Under the step it comes before: a continuation from this step does it, and writes it, again.
        self.log.write(self.step + 1, "prune", {**record, "seconds": time.monotonic() - started})
        self.meta["events_done"] = number + 1

    def _end_of_epoch(self, epoch: int) -> None:
        report = score(self.settings, self.prepared, self.mesh, self.state, "validation", self.stop)
        value = _selection_score(self.settings.strategy, report)
        is_eligible = epoch >= self.first_kept_epoch
        is_best = is_eligible and (self.meta["best_score"] is None or value > self.meta["best_score"])
        if is_best:
            self.meta.update(best_score=value, best_epoch=epoch)
            kept = (self.state.params, self.state.heads, self.state.packed)
            self.best.save(self.step, kept, {"epoch": epoch, "has_masks": self.state.packed is not None})
        shown = {name: report[name]["accuracy"] for name in ("concept", "task") if name in report}
        if STRATEGIES[self.settings.strategy].predictor_inputs:
            shown.pop("task")
        self.log.write(self.step, "validation", {"epoch": epoch, **{f"{k}_accuracy": v for k, v in shown.items()}})
        text = ", ".join(f"{name} {100 * (v or 0):.1f} %" for name, v in shown.items())
        print_once(f"epoch {epoch + 1}: validation accuracy {text}{' (best so far)' if is_best else ''}")
        patience = self.settings.training.patience
        if patience and is_eligible and epoch - self.meta["best_epoch"] >= patience:
            self.meta["stopped_early"] = True
            print_once(f"stopping early: no better validation score for {patience} epochs")
        self.meta["scored_epochs"] = epoch + 1
        self._save()

    def _save(self) -> None:
        # One of this step is left as it is, though an event or scores that follow it may have begun: they are done
        # again. To replace it would leave none for a while.
        if self.checkpoints.latest_step() != self.step:
            # What the meta data calls the best is there before they are.
            self.best.wait()
            self.checkpoints.save(self.step, self.state, self.meta)

    def best_state(self) -> tuple[TrainState, dict[str, Any]]:
        """The state of the kept epoch."""
        step = self.best.latest_step()
        if step is None:
            raise RuntimeError(f"{self.workdir / 'best'} holds no checkpoint, though the run has ended")
        abstract = self._abstract(self.best.read_meta(step)["has_masks"])
        kept = self.best.restore(step, (abstract.params, abstract.heads, abstract.packed))
        # What lies there counts, should a crash have come between it and the meta data.
        meta = {**self.meta, "best_epoch": self.best.read_meta(step)["epoch"]}
        return self.state._replace(params=kept[0], heads=kept[1], packed=kept[2]), meta


def _selection_score(strategy: str, report: Mapping[str, Any]) -> float:
    """Mean of validation concept and task accuracy, of those that the strategy has trained by then."""
    values = [report[name]["accuracy"] for name in STRATEGIES[strategy].trains]
    return float(np.mean([value for value in values if value is not None]))


def _check_can_be_scored(strategy: str, validation: Tokenized) -> None:
    labels = {"concept": validation.concepts, "task": validation.labels}
    if not any((labels[name] >= 0).any() for name in STRATEGIES[strategy].trains):
        raise ValueError(f"the validation split has no label that strategy {strategy!r} could be scored on")
