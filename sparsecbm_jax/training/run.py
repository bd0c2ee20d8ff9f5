"""One run, from a config to a saved model: data in, trained, pruned, evaluated, saved; resumable at any step.

The strategies are those of the paper's Appendix A. All but 'sparse' are dense; 'sparse' starts dense and scores and
cuts its K masks again at each pruning event, while training goes on under them. The run's model is that of the epoch
with the best mean of validation concept and task accuracy, among those at the final sparsity (dense runs: among all).
The test split is scored once, with it.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparsecbm_jax.config.run_config import RunConfig, check_batch_sizes, to_dict
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.trees import leaf_at
from sparsecbm_jax.evaluation.run_summary import read_metrics
from sparsecbm_jax.evaluation.tables import render_table
from sparsecbm_jax.model.heads import init_heads
from sparsecbm_jax.model.losses import LossFn
from sparsecbm_jax.model.saved_model import load, save
from sparsecbm_jax.model.sparse_cbm import SparseCBM
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.pruning.criteria import Criterion
from sparsecbm_jax.runtime.json_files import write_json
from sparsecbm_jax.runtime.preemption import StopSignal
from sparsecbm_jax.runtime.run_directory import check_same_run, read_run
from sparsecbm_jax.training import vocabulary
from sparsecbm_jax.training.final_model import final_model
from sparsecbm_jax.training.loop import TrainingLoop
from sparsecbm_jax.training.metrics_log import print_once
from sparsecbm_jax.training.run_checkpoints import RunCheckpoints
from sparsecbm_jax.training.setup import Prepared, RunContext, names_of, prepare

# Settings that change how a run is watched, not what it computes: a resumed run may differ in them.
_UNRELATED = ("training.log_every_steps", "training.save_every_steps", "training.keep_checkpoints", "mesh")


class TrainResult(NamedTuple):
    """Holds a run's result: the model of the best epoch, its metrics, and where both were written."""

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
        loss_fn: a loss of one's own, of the shape of `model.losses.joint_loss`.
        criterion: a pruning score of one's own, of the shape of `pruning.criteria.snip_scores`.
        start: a model of the same backbone and schema whose parameters and heads to start from, in place of the
            pretrained backbone and fresh heads.
        profile: whether a few of the steps are traced by JAX's profiler, to workdir/profile.

    Returns:
        The model of the best epoch and its metrics.

    Raises:
        NonFiniteError: if a loss or gradient is NaN or Inf; names the step, the rows and the last good checkpoint.
        Preempted: SIGTERM came. The step under way was finished and a checkpoint saved.
        RunMismatchError: if `workdir` holds a run with another config, loss or criterion.
    """
    workdir = Path(workdir)
    described = _describe(run, {"loss_fn": loss_fn, "criterion": criterion}, start)
    if read_run(workdir) is not None:
        check_same_run(workdir, described, ignore=_UNRELATED)
    if (finished := _finished_run(workdir)) is not None:
        print_once(f"{workdir} holds this run, finished already:\n{render_table(finished.metrics['test'])}")
        return finished
    mesh = _make_mesh(run)
    prepared = _prepare(run, mesh, start)
    print_once(prepared.dataset.describe())
    # Only now, so that a command that could not start does not claim the directory.
    check_same_run(workdir, described, ignore=_UNRELATED)
    num_scores = prepared.config.num_concepts * run.sparsity.reestimations
    with StopSignal() as stop, RunCheckpoints(workdir, run.training.keep_checkpoints, num_scores) as checkpoints:
        small = vocabulary.restrict(prepared.config, prepared.params, prepared.splits)
        has_bottleneck, key = STRATEGIES[run.strategy].has_bottleneck, jax.random.key(run.seed)
        heads = init_heads(key, small.config, has_bottleneck=has_bottleneck) if start is None else start.heads
        in_use = prepared._replace(config=small.config, params=None, splits=small.splits)
        context = RunContext(run, in_use, mesh, workdir, stop, loss_fn, criterion, profile)
        loop = TrainingLoop(context, small.params, heads, checkpoints)
        # The loop trains a copy. Of the values that it began from, only rows of tokens in no text are needed again.
        table, ids = leaf_at(prepared.params, vocabulary.PATH), small.ids
        prepared = prepared._replace(params=None)
        del small
        loop.run_epochs()
        state, best_epoch = loop.best_state()
        model, metrics = final_model(context, state, best_epoch=best_epoch, seconds=loop.progress.seconds)
    whole = vocabulary.put_back(model.params, table, ids)
    model = dataclasses.replace(model, config=prepared.config, params=whole)
    _write(workdir, model, metrics)
    return TrainResult(model, metrics, workdir)


def _describe(run: RunConfig, own: Mapping[str, Any], start: SparseCBM | None) -> dict[str, Any]:
    """Describes a run as JSON: two runs of one description compute the same.

    Args:
        run: its config.
        own: functions of the caller's by the names of `train`'s arguments, or None.
        start: the model that it starts from.
    """
    described = {**to_dict(run), **names_of(own)}
    if start is not None:
        leaves = jax.tree_util.tree_leaves_with_path({"params": start.params, "heads": start.heads})
        described["start"] = {jax.tree_util.keystr(path): float(jnp.sum(jnp.abs(leaf))) for path, leaf in leaves}
    return described


def _finished_run(workdir: Path) -> TrainResult | None:
    """Reads what an earlier call has left, where it came to its end."""
    if not ((workdir / "metrics.json").is_file() and (workdir / "model").is_dir()):
        return None
    model = load(workdir / "model")
    return TrainResult(model, read_metrics(workdir), workdir)


def _make_mesh(run: RunConfig) -> Mesh:
    """Makes the run's mesh, whose devices must divide its batches."""
    mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor, run.mesh.concept)
    check_batch_sizes(run)
    return mesh


def _prepare(run: RunConfig, mesh: Mesh, start: SparseCBM | None) -> Prepared:
    """Prepares the run, with the parameters of the model that it starts from, where there is one."""
    prepared = prepare(run, mesh)
    if start is None:
        return prepared
    if (start.config.backbone, start.schema) != (prepared.config.backbone, prepared.dataset.schema):
        raise ValueError("the model to start from has another backbone or schema than the run")
    return prepared._replace(params=sharding.put(start.params, mesh))


def _write(workdir: Path, model: SparseCBM, metrics: Mapping[str, Any]) -> None:
    """Writes the run's result, the metrics last: where they are, the run came to its end."""
    if jax.process_index() == 0:
        shutil.rmtree(workdir / "scores")  # empty by now
    save(model, workdir / "model")
    if jax.process_index() == 0:
        write_json(workdir / "metrics.json", metrics)
    print_once(f"test, epoch {metrics['best_epoch'] + 1} kept:\n{render_table(metrics['test'])}")
    print_once(f"saved {workdir / 'model'} and {workdir / 'metrics.json'}")
