"""One run, from a config to a saved model: data in, trained, pruned, evaluated, saved; resumable at any step.

The strategies are those of the paper's Appendix A. All but 'sparse' are dense; 'sparse' starts dense and re-scores its
K masks at each pruning event, training going on under them. Among the epochs at final sparsity (dense runs: all) the
one with the best mean of validation concept and task accuracy is kept, and the test split is scored once, with it.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
from sparsecbm_jax.runtime.checkpoints import Checkpointer
from sparsecbm_jax.runtime.json_files import write_json
from sparsecbm_jax.runtime.preemption import StopSignal
from sparsecbm_jax.runtime.run_directory import check_same_run, read_run
from sparsecbm_jax.training import vocabulary
from sparsecbm_jax.training.final_model import final_model
from sparsecbm_jax.training.loop import TrainingLoop, print_once
from sparsecbm_jax.training.setup import prepare

# Settings that change how a run is watched, not what it computes: a resumed run may differ in them.
_UNRELATED = ("training.log_every_steps", "training.save_every_steps", "training.keep_checkpoints", "mesh")


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
        metrics = read_metrics(workdir)
        print_once(f"{workdir} holds this run, finished already:\n{render_table(metrics['test'])}")
        return TrainResult(model, metrics, workdir)
    mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor, run.mesh.concept)
    check_batch_sizes(run)
    prepared = prepare(run, mesh)
    if start is not None:
        if (start.config.backbone, start.schema) != (prepared.config.backbone, prepared.dataset.schema):
            raise ValueError("the model to start from has another backbone or schema than the run")
        prepared = prepared._replace(params=sharding.put(start.params, mesh))
    print_once(prepared.dataset.describe())
    # Only now, so that a command that could not start does not claim the directory.
    check_same_run(workdir, described, ignore=_UNRELATED)
    with (
        StopSignal() as stop,
        Checkpointer(workdir / "checkpoints", run.training.keep_checkpoints) as checkpoints,
        Checkpointer(workdir / "best", 1) as best,
        Checkpointer(workdir / "scores", prepared.config.num_concepts * run.sparsity.reestimations) as scores,
    ):
        small = vocabulary.restrict(prepared.config, prepared.params, prepared.splits)
        has_bottleneck, key = STRATEGIES[run.strategy].has_bottleneck, jax.random.key(run.seed)
        heads = init_heads(key, small.config, has_bottleneck=has_bottleneck) if start is None else start.heads
        in_use = prepared._replace(config=small.config, params=small.params, splits=small.splits)
        loop = TrainingLoop(
            run, in_use, heads, mesh, checkpoints, best, scores, workdir, loss_fn, criterion, stop, profile
        )
        # The loop trains a copy. Of the values that it began from, only rows of tokens in no text are needed again.
        table, ids = leaf_at(prepared.params, vocabulary.PATH), small.ids
        prepared, in_use = prepared._replace(params=None), loop.prepared
        del small
        loop.run_epochs()
        state, meta = loop.best_state()
        model, metrics = final_model(run, in_use, mesh, state, meta, stop)
    if jax.process_index() == 0:
        shutil.rmtree(workdir / "scores")  # empty by now
    whole = vocabulary.put_back(model.params, table, ids)
    model = dataclasses.replace(model, config=prepared.config, params=whole)
    save(model, workdir / "model")
    if jax.process_index() == 0:
        write_json(workdir / "metrics.json", metrics)
    print_once(f"test, epoch {metrics['best_epoch'] + 1} kept:\n{render_table(metrics['test'])}")
    print_once(f"saved {workdir / 'model'} and {workdir / 'metrics.json'}")
    return TrainResult(model, metrics, workdir)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _name_of(function: Any) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
