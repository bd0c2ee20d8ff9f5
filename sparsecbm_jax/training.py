"""One run, from a config to a saved model: data in, trained, pruned, evaluated, saved; resumable at any step.

The strategies are those of the paper's Appendix A. All but 'sparse' are dense; 'sparse' starts dense and re-scores its
K masks at each pruning event, training going on under them. Among the epochs at final sparsity (dense runs: all) the
one with the best mean of validation concept and task accuracy is kept, and the test split is scored once, with it.
"""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparsecbm_jax import backbones, evaluation, host_memory, pruning, sharding, throughput, vocabulary
from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.artifact import SparseCBM, load, save
from sparsecbm_jax.blockwise import Report
from sparsecbm_jax.cbm import Heads, LossFn, concept_loss, init_heads, joint_loss, task_loss
from sparsecbm_jax.checkpoint import Checkpointer, check_same_run, read_run, write_atomically
from sparsecbm_jax.config import RunConfig, to_dict
from sparsecbm_jax.criteria import Criterion
from sparsecbm_jax.data.batches import Tokenized, num_batches, train_batches
from sparsecbm_jax.finishing import kept_model, score
from sparsecbm_jax.logs import MetricsLog, StepTrace, progress
from sparsecbm_jax.preparation import Prepared, prepare
from sparsecbm_jax.pruning import PruningEvent
from sparsecbm_jax.steps import TrainState, init_state, make_optimizer, make_train_step
from sparsecbm_jax.stopping import Preempted, StopSignal
from sparsecbm_jax.throughput import Meter

LOSSES: dict[str, LossFn] = {
    "standard": task_loss,
    "independent": concept_loss,
    "sequential": concept_loss,
    "joint": joint_loss,
    "sparse": joint_loss,
}
# Settings that change how a run is watched, not what it computes: a resumed run may differ in them.
_UNRELATED = ("training.log_every_steps", "training.save_every_steps", "training.keep_checkpoints", "mesh")
# What a strategy has trained by the time its epochs are scored; the others have both.
_SCORED = {"standard": ("task",), "independent": ("concept",), "sequential": ("concept",)}


# A step that is not checked yet: its number, rows and metrics.
Pending = tuple[int, np.ndarray, Mapping[str, Any]] | None


class NonFiniteError(FloatingPointError):
    """Training met NaN or Inf."""


class TrainResult(NamedTuple):
    """What a run leaves: the model of the kept epoch, its metrics, and where both were written."""

    model: SparseCBM
    metrics: dict[str, Any]
    workdir: Path


def train(
    run: RunConfig,
    workdir: str | Path,
    *,
    loss_fn: LossFn | None = None,
    criterion: Criterion | None = None,
    start: SparseCBM | None = None,
    profile: bool = False,
) -> TrainResult:
    """Runs a config to its end, or goes on with what an earlier call left in `workdir`.

    Args:
      run: the run.
      workdir: written to: run.json, metrics.jsonl, checkpoints/, best/, and at the end model/ and metrics.json.
      loss_fn: a loss of one's own, of the shape of `cbm.joint_loss`.
      criterion: a pruning score of one's own, of the shape of `blockwise.woodfisher_scores`.
      start: a model of the same backbone and schema whose parameters and heads to start from, in place of the
        pretrained backbone and fresh heads.
      profile: whether a few of the steps are traced by JAX's profiler, to workdir/profile.

    Returns:
      The model of the kept epoch and its metrics.

    Raises:
      NonFiniteError: if a loss or gradient is NaN or Inf; names the step, the rows and the last good checkpoint.
      Preempted: SIGTERM came. The step under way was finished and a checkpoint saved.
      RunMismatchError: if `workdir` holds a run with another config, loss or criterion.
    """
    workdir = Path(workdir)
    own = {"loss_fn": loss_fn, "criterion": criterion}
    described = {**to_dict(run), **{name: _name_of(function) for name, function in own.items() if function is not None}}
    if start is not None:
        leaves = _leaves({"params": start.params, "heads": start.heads})
        described["start"] = {name: float(jnp.sum(jnp.abs(leaf))) for name, leaf in leaves}
    if read_run(workdir) is not None:
        check_same_run(workdir, described, ignore=_UNRELATED)
    if (workdir / "metrics.json").is_file() and (workdir / "model").is_dir():
        model = load(workdir / "model")
        metrics = json.loads((workdir / "metrics.json").read_text(encoding="utf-8"))
        _say(f"{workdir} holds this run, finished already:\n{evaluation.render_table(metrics['test'])}")
        return TrainResult(model, metrics, workdir)
    mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor, run.mesh.concept)
    rows = run.mesh.data * run.mesh.fsdp
    for name in ("batch_size", "eval_batch_size"):
        if getattr(run.training, name) % rows:
            raise ValueError(
                f"config.training.{name} is {getattr(run.training, name)}, but must be a multiple of {rows}, "
                "the devices along mesh.data and mesh.fsdp"
            )
    prepared = prepare(run, mesh)
    if start is not None:
        if (start.config.backbone, start.schema) != (prepared.config.backbone, prepared.dataset.schema):
            raise ValueError("the model to start from has another backbone or schema than the run")
        prepared = prepared._replace(params=sharding.put(start.params, mesh))
    _say(prepared.dataset.describe())
    # Only now, so that a command that could not start does not claim the directory.
    check_same_run(workdir, described, ignore=_UNRELATED)
    with (
        StopSignal() as stop,
        Checkpointer(workdir / "checkpoints", run.training.keep_checkpoints) as checkpoints,
        Checkpointer(workdir / "best", 1) as best,
        Checkpointer(workdir / "scores", prepared.config.num_concepts * run.sparsity.reestimations) as scores,
    ):
        small = vocabulary.restrict(prepared.config, prepared.params, prepared.splits)
        heads = init_heads(jax.random.key(run.seed), small.config, run.strategy) if start is None else start.heads
        in_use = prepared._replace(config=small.config, params=small.params, splits=small.splits)
        loop = _Loop(run, in_use, heads, mesh, checkpoints, best, scores, workdir, loss_fn, criterion, stop, profile)
        # The loop trains a copy. Of the values that it began from, only rows of tokens in no text are needed again.
        table, ids = masks_lib.leaf_at(prepared.params, vocabulary.PATH), small.ids
        prepared, in_use = prepared._replace(params=None), loop.prepared
        del small
        loop.run_epochs()
        state, meta = loop.best_state()
        model, metrics = kept_model(run, in_use, mesh, state, meta, stop)
    if jax.process_index() == 0:
        shutil.rmtree(workdir / "scores")  # empty by now
    whole = vocabulary.put_back(model.params, table, ids)
    model = dataclasses.replace(model, config=prepared.config, params=whole)
    save(model, workdir / "model")
    if jax.process_index() == 0:
        write_atomically(workdir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    _say(f"test, epoch {metrics['best_epoch'] + 1} kept:\n{evaluation.render_table(metrics['test'])}")
    _say(f"saved {workdir / 'model'} and {workdir / 'metrics.json'}")
    return TrainResult(model, metrics, workdir)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _name_of(function: Any) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


class _Loop:
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
        if run.strategy == "sparse":
            self.events = pruning.schedule(run.sparsity, prepared.config.num_concepts, self.steps_per_epoch)
            masks_lib.packed_dtype(prepared.config.num_concepts)
        _check_can_be_scored(run.strategy, prepared.splits["validation"])
        self.first_kept_epoch = self.events[-1].epoch if self.events else 0
        self.tx = make_optimizer(run.optim, run.training.num_epochs * self.steps_per_epoch)
        self.state = init_state(prepared.params, heads, self.tx, mesh)
        self.step_fn = make_train_step(
            prepared.config, self.tx, mesh, loss_fn=LOSSES[run.strategy] if loss_fn is None else loss_fn
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
            _say(f"resuming {workdir} after step {latest}")
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
                _say(f"saved what there is after step {self.step}")
                raise
            except KeyboardInterrupt:
                saved = self.checkpoints.latest_step() or 0
                _say(f"\nstopped in step {self.step + 1}; the same command goes on after step {saved}")
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
                if host_memory.stops_keeping():
                    _say("half of the memory is in use: freed memory is given back from now on, and steps take longer")
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
            _say(traced)
        _say(f"epoch {epoch + 1}: {throughput.render(self.meter.read_all())}")

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
        started, reports = time.monotonic(), list[Report]()
        if number == 0 and self.criterion is None:
            _say(pruning.describe_plan(state.params, masks, run.pruner))
        about = {"event": number, "step": self.step}
        store = pruning.StoredScores(self.scores, config.num_concepts, about, discards_others=True)
        if len(store):
            have = f"{len(store)} of {config.num_concepts} concepts"
            _say(f"scores of {have} are there already, from before the run was stopped")
        with host_memory.giving_back():
            masks = pruning.prune(
                config,
                state.params,
                masks,
                state.heads,
                pruning.fisher_batches(self.train_split, run.pruner, seed=run.seed, event=number),
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
        record |= {"concepts": reports, "peak_bytes": pruning.peak_memory()}
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
        if self.settings.strategy in ("independent", "sequential"):
            shown.pop("task")
        self.log.write(self.step, "validation", {"epoch": epoch, **{f"{k}_accuracy": v for k, v in shown.items()}})
        text = ", ".join(f"{name} {100 * (v or 0):.1f} %" for name, v in shown.items())
        _say(f"epoch {epoch + 1}: validation accuracy {text}{' (best so far)' if is_best else ''}")
        patience = self.settings.training.patience
        if patience and is_eligible and epoch - self.meta["best_epoch"] >= patience:
            self.meta["stopped_early"] = True
            _say(f"stopping early: no better validation score for {patience} epochs")
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
    values = [report[name]["accuracy"] for name in _SCORED.get(strategy, ("concept", "task"))]
    return float(np.mean([value for value in values if value is not None]))


def _check_can_be_scored(strategy: str, validation: Tokenized) -> None:
    labels = {"concept": validation.concepts, "task": validation.labels}
    if not any((labels[name] >= 0).any() for name in _SCORED.get(strategy, ("concept", "task"))):
        raise ValueError(f"the validation split has no label that strategy {strategy!r} could be scored on")
