"""Costs of a change: the squared gradients of the masked subnetwork's loss, at kept and at pruned positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.trees import Params, leaf_at
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.edit_costs import fisher_costs, logit_directions
from sparsecbm_jax.model.config import CBMConfig, Heads
from sparsecbm_jax.model.forward import forward
from sparsecbm_jax.model.predictions import text_batches
from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM

from tests.support.tiny_model import TEXTS, tiny_model

CONCEPT = 1


@pytest.fixture(scope="module")
def model() -> SparseCBM:
    return tiny_model(num_layers=1)


@pytest.fixture(scope="module")
def batches(model: SparseCBM) -> list[Batch]:
    """Two rows and a row of padding, twice; a cell of the second batch is missing."""
    found = [next(text_batches(model, TEXTS[i : i + 2], batch_size=3)) for i in (0, 2)]
    concepts = np.array([[0, 1, 2], [2, 0, 1], [0, 2, 0]], np.int32)
    missing = np.where(np.arange(3)[:, None] == 1, -1, concepts)
    return [found[0]._replace(concepts=concepts), found[1]._replace(concepts=missing)]


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=1)
def loss_gradient(config: CBMConfig, params: Params, heads: Heads, batch: Batch) -> jax.Array:
    logits = forward(config, ModelArrays(params, None, heads), batch).concept_logits[:, CONCEPT]
    gold = batch.concepts[:, CONCEPT]
    counted = (gold >= 0) & (batch.example_weight > 0)
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(gold, 0)[:, None], axis=1)[:, 0]
    return -jnp.sum(jnp.where(counted, found, 0)) / jnp.sum(counted)


def squares_by_another_way(model: SparseCBM, batch: Batch) -> dict[str, np.ndarray]:
    """Of the dense model whose weights are those of the subnetwork, so that no mask hides a gradient."""
    assert model.masks is not None
    params = masks_lib.apply(model.params, model.masks, CONCEPT)
    grads = loss_gradient(model.config, params, model.heads, batch)
    return {path: np.square(np.asarray(leaf_at(grads, path))) for path in model.masks}


@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_costs_are_the_mean_square_of_gradients_at_all_positions(
    model: SparseCBM, batches: list[Batch], floor: float
) -> None:
    assert model.masks is not None
    seen: list[None] = []
    arrays = (model.config, model.arrays)
    found = fisher_costs(*arrays, batches, CONCEPT, floor=floor, on_gradient=lambda: seen.append(None))
    assert len(seen) == 2
    each = [squares_by_another_way(model, batch) for batch in batches]
    expected = {path: (each[0][path] + each[1][path]) / 2 for path in model.masks}
    mean = np.concatenate([leaf.ravel() for leaf in expected.values()]).mean()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found.costs[path], leaf + floor * mean, rtol=1e-4, atol=1e-6 * mean)
        pruned = ~np.asarray(model.masks[path][CONCEPT])
        assert (leaf[pruned] > 0).mean() > 0.9


def test_directions_are_mean_gradients_of_logits_by_gold_class(model: SparseCBM, batches: list[Batch]) -> None:
    assert model.masks is not None
    found = logit_directions(model.config, model.arrays, batches, CONCEPT)
    params = masks_lib.apply(model.params, model.masks, CONCEPT)

    @jax.jit
    @jax.grad
    def gradient(params: Params, gold: int, logit: int) -> jax.Array:
        total, count = jnp.float32(0), 0
        for batch in batches:
            arrays = ModelArrays(params, None, model.heads)
            logits = forward(model.config, arrays, batch).concept_logits[:, CONCEPT, logit]
            counted = (batch.concepts[:, CONCEPT] == gold) & (batch.example_weight > 0)
            total, count = total + jnp.sum(jnp.where(counted, logits, 0)), count + jnp.sum(counted)
        return total / count

    for gold, logit in ((0, 2), (1, 0)):
        grads = gradient(params, gold, logit)
        for path, leaf in found.items():
            expected = np.asarray(leaf_at(grads, path))
            np.testing.assert_allclose(leaf[3 * gold + logit], expected, rtol=1e-3, atol=1e-6)
    # Class 2 stands in a row of padding alone.
    assert not any(np.asarray(leaf[6:]).any() for leaf in found.values())


def test_a_concept_without_labels_has_no_costs(model: SparseCBM, batches: list[Batch]) -> None:
    assert model.masks is not None
    arrays = (model.config, model.arrays)
    unlabelled = [batch._replace(concepts=np.full((3, 3), -1, np.int32)) for batch in batches]
    for given in ([], unlabelled):
        with pytest.raises(ValueError, match=rf"concept 1: .* over {len(given)} batches add up to 0.0; expected train"):
            fisher_costs(*arrays, given, CONCEPT)
