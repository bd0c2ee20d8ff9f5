"""The smallest edit that repairs: seen to repair, one pair less seen not to, and the weights of the exact selection."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.trees import leaf_at
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection, num_changed, undo
from sparsecbm_jax.intervention.minimal_edit import MinimalEdit, _minimal_edit, minimal_edit
from sparsecbm_jax.intervention.ranking import EditCosts, positions_of_true
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import make_forward, subnetwork_output
from sparsecbm_jax.model.losses import least_margin
from sparsecbm_jax.model.predictions import text_batches
from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM

from tests.support.tiny_model import TEXTS, tiny_model

pytestmark = pytest.mark.long

SERVICE = 2


@pytest.fixture(scope="module")
def model() -> SparseCBM:
    return tiny_model(num_layers=1)


@pytest.fixture(scope="module")
def batch(model: SparseCBM) -> Batch:
    """One text: the program that other files' tests compile as well."""
    return next(text_batches(model, TEXTS[:1], batch_size=1))


def search(model: SparseCBM, batch: Batch, concept: int, target: Any, **kwargs: Any) -> tuple[Any, MinimalEdit]:
    assert model.masks is not None
    return minimal_edit(model.config, model.arrays, ConceptCorrection(batch, concept, target), **kwargs)


def margin_with(model: SparseCBM, masks: Any, batch: Batch, concept: int, target: int) -> float:
    logits = make_forward(model.config)(model.arrays._replace(masks=masks), batch).concept_logits[:, concept]
    return float(least_margin(logits, jnp.full(logits.shape[0], target), batch.example_weight))


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=4)
def margin_gradient(
    config: CBMConfig, params: Any, heads: Any, batch: Batch, kernels: Any, concept: int, target: int
) -> jax.Array:
    activations = jnp.zeros((batch.input_ids.shape[0], config.num_concepts, config.num_classes))
    logits = subnetwork_output(config, params, heads, batch, kernels, concept, activations).concept_logits[:, 0]
    return least_margin(logits, jnp.full(logits.shape[0], target), batch.example_weight)


def changed(model: SparseCBM, batch: Batch, concept: int, target: int, n: int, costs: Any = None) -> Any:
    """Masks with n pairs changed by a gradient and the exact selection, without the search."""
    mask = masks_lib.concept(model.masks, concept)
    weights = {path: leaf_at(model.params, path) for path in mask}
    kernels = {path: jnp.where(kept, weights[path], 0) for path, kept in mask.items()}
    grads = margin_gradient(model.config, model.params, model.heads, batch, kernels, concept, target)
    gains = {path: grads[path] * weights[path] for path in mask}
    if costs is not None:
        gains = {path: grads[path] * jnp.sign(weights[path]) / jnp.sqrt(costs.costs[path]) for path in mask}
    return masks_lib.replace_concept(model.masks, concept, jax.jit(masks_lib.drop_and_grow)(mask, gains, gains, n).mask)


@pytest.mark.parametrize(("concept", "target", "has_costs"), [(0, 0, False), (2, 1, True), (0, 2, True)])
def test_n_repairs_and_one_less_does_not(
    model: SparseCBM, batch: Batch, concept: int, target: int, has_costs: bool
) -> None:
    costs = None
    if has_costs:
        rng = np.random.default_rng(0)
        drawn = {
            path: jnp.asarray(np.exp(rng.normal(size=mask.shape[1:])).astype(np.float32))
            for path, mask in model.masks.items()
        }
        costs = EditCosts(drawn)
    masks, found = search(model, batch, concept, target, costs=costs)
    before = margin_with(model, model.masks, batch, concept, target)
    count = int(found.num_pairs)
    np.testing.assert_array_equal(masks_lib.num_kept(masks), masks_lib.num_kept(model.masks))
    assert num_changed(found.edit) == (count, count)
    assert (count == 0) == (before > 0) and bool(found.is_repaired)
    chex.assert_trees_all_equal(undo(masks, found.edit), model.masks)
    assert float(found.margin) == pytest.approx(margin_with(model, masks, batch, concept, target), abs=1e-5)
    assert float(found.margin) > 0
    if count:
        chex.assert_trees_all_equal(masks, changed(model, batch, concept, target, count, costs))
        less = margin_with(model, changed(model, batch, concept, target, count - 1, costs), batch, concept, target)
        assert float(found.margin_below) == pytest.approx(less, abs=1e-5)
        assert float(found.margin_below) <= 0


def test_a_margin_takes_more_and_what_cannot_be_had_changes_nothing(model: SparseCBM, batch: Batch) -> None:
    wrong = [t for t in range(3) if margin_with(model, model.masks, batch, SERVICE, t) <= 0]
    _, plain = search(model, batch, SERVICE, wrong[0])
    _, wide = search(model, batch, SERVICE, wrong[0], margin=plain.margin)
    assert bool(wide.is_repaired) and float(wide.margin) > float(plain.margin)
    assert int(wide.num_pairs) > int(plain.num_pairs)
    masks, none = search(model, batch, SERVICE, wrong[0], margin=1e6)
    assert not bool(none.is_repaired) and int(none.num_pairs) == 0
    chex.assert_trees_all_equal(masks, model.masks)


def test_several_rows_are_repaired_together_in_one_program(model: SparseCBM) -> None:
    # And a row of padding.
    batch = next(text_batches(model, TEXTS[:3], batch_size=4))
    size = _minimal_edit._cache_size()
    _, first = search(model, batch, 0, np.array([1, 0, 2, 0]))
    _, second = search(model, batch, 1, np.array([0, 0, 1, 2]), margin=0.5)
    assert _minimal_edit._cache_size() == size + 1
    for found, target, margin in ((first, [1, 0, 2], 0), (second, [0, 0, 1], 0.5)):
        logits = found.edit.concept_logits_after[:3, int(found.edit.concept)]
        own = float(least_margin(logits, jnp.array(target), jnp.ones(3)))
        assert bool(found.is_repaired) == (own > margin)


def test_a_mesh_finds_the_same_bits_for_packed_masks(model: SparseCBM, batch: Batch) -> None:
    mesh = sharding.make_mesh(fsdp=2, tensor=2, concept=1)
    masks, found = search(model, batch, SERVICE, 0)
    packed = masks_lib.pack(model.masks)
    packed = jax.device_put(packed, sharding.shardings(mesh, sharding.packed_specs(packed)))
    params = sharding.put(model.params, mesh)
    arrays = ModelArrays(params, packed, model.heads)
    there, on_mesh = minimal_edit(model.config, arrays, ConceptCorrection(batch, SERVICE, 0))
    assert int(on_mesh.num_pairs) == int(found.num_pairs)
    chex.assert_trees_all_equal(jax.device_get(there), jax.device_get(masks_lib.pack(masks)))


@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4)])
def test_positions_of_true_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    for seed, density in enumerate((0.0, 0.3, 1.0)):
        flags = np.random.default_rng(seed).random(shape) < density
        for size in (1, 4, 40):
            index = np.stack(positions_of_true(jnp.asarray(flags), size))
            expected = np.stack(np.nonzero(flags))[:, :size]
            np.testing.assert_array_equal(index[:, : expected.shape[1]], expected)
            assert (index[0, expected.shape[1] :] == shape[0]).all()


def test_bad_arguments_are_named(model: SparseCBM, batch: Batch) -> None:
    with pytest.raises(ValueError, match="max_pairs is 0"):
        search(model, batch, 0, 0, max_pairs=0)
    for margin in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"margin is {margin}; expected a number of logits"):
            search(model, batch, 0, 0, margin=margin)
    with pytest.raises(ValueError, match=r"target is 3; expected an integer in \[0, 2\]"):
        search(model, batch, 0, 3)
