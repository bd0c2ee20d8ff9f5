"""What a run ends with: scores of a split, the predictor that some strategies fit last, the model of the kept epoch."""

from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from sparsecbm_jax.config.run_config import RunConfig, to_dict
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.evaluation import scores
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.runtime.preemption import StopSignal
from sparsecbm_jax.training.label_predictor import with_fitted_predictor
from sparsecbm_jax.training.setup import Prepared, placed_batches
from sparsecbm_jax.training.train_step import TrainState


def _until(stop: StopSignal, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        stop.check()
        yield batch


def score(
    run: RunConfig, prepared: Prepared, mesh: Mesh, state: TrainState, split: str, stop: StopSignal
) -> dict[str, Any]:
    """Scores a state on one split; see `evaluation.evaluate`. Raises `Preempted` where SIGTERM came."""
    return scores.evaluate(
        prepared.config,
        ModelArrays(state.params, state.packed, state.heads),
        _until(stop, placed_batches(run, prepared.splits[split], mesh)),
        prepared.dataset.schema,
        forward_fn=make_forward(prepared.config, mesh),
    )


def final_model(
    run: RunConfig, prepared: Prepared, mesh: Mesh, state: TrainState, meta: Mapping[str, Any], stop: StopSignal
) -> tuple[SparseCBM, dict[str, Any]]:
    """The model of the kept epoch, what is fitted last fitted, and its scores on validation and test."""
    if STRATEGIES[run.strategy].predictor_inputs:
        state = with_fitted_predictor(run, prepared, mesh, state)
    config, schema = prepared.config, prepared.dataset.schema
    metrics: dict[str, Any] = {
        "validation": score(run, prepared, mesh, state, "validation", stop),
        "test": score(run, prepared, mesh, state, "test", stop),
        "best_epoch": meta["best_epoch"],
        "train_seconds": meta["seconds"],
    }
    masks = None if state.packed is None else masks_lib.unpack(state.packed, config.num_concepts)
    if masks is not None:
        metrics["density"] = dict(zip(schema.concepts, masks_lib.total_density(masks).tolist(), strict=True))
    metadata = {
        "seed": run.seed,
        "dataset": prepared.dataset.name,
        "backbone": run.backbone.name,
        "max_length": run.data.max_length,
        "metrics": metrics,
        "run_config": to_dict(run),
    }
    model = SparseCBM(config, state.params, masks, state.heads, schema, prepared.tokenizer, run.strategy, metadata)
    return model, metrics
