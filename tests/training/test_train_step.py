"""One optimiser step and twenty, on one device and on eight; the predictor that is fitted apart."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.config.run_config import OptimConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.trees import path_string
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.losses import joint_loss, make_loss
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.model.subnetwork_weights import SubnetworkWeights
from sparsecbm_jax.training import train_step

from tests.model.test_forward import build, encode, random_batch
from tests.support.random_weights import random_params

pytestmark = pytest.mark.long

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-5
MESHES = {
    "data 2 x fsdp 2 x concept 2": {"data": 2, "fsdp": 2, "concept": 2},
    "data 2 x tensor 4": {"data": 2, "tensor": 4},
}


@pytest.fixture(scope="module")
def noisy(tiny_backbone_config: BackboneConfig) -> BackboneConfig:
    """Dropout on, so that the noise too must not depend on the mesh."""
    return dataclasses.replace(tiny_backbone_config, dropout=0.1, attention_dropout=0.1)


@functools.cache
def run(backbone: BackboneConfig, mesh_name: str | None, num_steps: int, masked: bool) -> tuple[list[float], Any]:
    config, params, masks, heads = build(backbone, k=4)
    # What is computed again on several devices is kept on one: that must not matter either.
    config = dataclasses.replace(config, remat="none" if mesh_name is None else "full")
    mesh = sharding.make_mesh(**(MESHES[mesh_name] if mesh_name else {}))
    settings = OptimConfig(learning_rate=1e-3, warmup_fraction=0.0, decay="constant", clip_norm=1e9)
    tx = train_step.make_optimizer(settings, num_steps)
    state = train_step.init_state(params, heads, tx, mesh)
    packed = masks_lib.pack(masks) if masked else None
    if packed is not None:
        packed = jax.device_put(packed, sharding.shardings(mesh, sharding.packed_specs(packed)))
    state = state._replace(packed=packed)
    rng = jax.random.key(5)
    step = train_step.make_train_step(config, tx, mesh)
    losses, grads = [], None
    for i in range(num_steps):
        state, metrics = step(state, sharding.put_batch(random_batch(i % 2, rows=8, k=4), mesh), rng)
        losses.append(float(metrics["loss"]))
        if i == 0:
            # Adam's first moments are then (1 − 0.9) times the gradients.
            moments = [mu for _, mu in optax.tree_utils.tree_get_all_with_path(state.opt_state, "mu")]
            grads = jax.tree.map(lambda mu: np.asarray(mu) / (1 - 0.9), moments)
    return losses, grads


@pytest.mark.parametrize(
    ("name", "masked"),
    [("data 2 x fsdp 2 x concept 2", True), ("data 2 x tensor 4", True), ("data 2 x fsdp 2 x concept 2", False)],
    ids=["sparse, fsdp and concept", "sparse, tensor", "dense"],
)
def test_eight_devices_train_as_one_does(name: str, masked: bool, noisy: BackboneConfig) -> None:
    losses, grads = run(noisy, None, 20, masked)
    sharded_losses, sharded_grads = run(noisy, name, 20, masked)
    np.testing.assert_allclose(sharded_losses, losses, rtol=0, atol=LOSS_TOLERANCE)
    chex.assert_trees_all_close(sharded_grads, grads, atol=GRADIENT_TOLERANCE, rtol=1e-4)
    assert losses[-2] < losses[0], "on the same batch"


def test_batches_of_one_width_are_traced_once(tiny_backbone_config: BackboneConfig) -> None:
    config, params, _, heads = build(tiny_backbone_config, k=1)
    mesh, tx = sharding.make_mesh(), train_step.make_optimizer(OptimConfig(), 3)
    once = chex.assert_max_traces(joint_loss, n=1)
    step = train_step.make_train_step(config, tx, mesh, loss_fn=once)
    state = train_step.init_state(params, heads, tx, mesh)
    for seed in range(3):
        state, _ = step(state, sharding.put_batch(random_batch(seed, k=1), mesh), jax.random.key(seed))
    with pytest.raises(AssertionError, match="traced"):
        step(state, sharding.put_batch(random_batch(tokens=12, k=1), mesh), jax.random.key(0))


def test_sharded_forward_equals_one_device(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config, k=4)
    batch = random_batch(0, rows=8, k=4)
    mesh = sharding.make_mesh(data=2, fsdp=2, concept=2)
    single = make_forward(config)(ModelArrays(params, masks, heads), batch)
    placed = sharding.put(params, mesh), sharding.put(heads, mesh)
    for given in (masks, masks_lib.pack(masks), None):
        expected = single if given is not None else make_forward(config)(ModelArrays(params, None, heads), batch)
        got = make_forward(config, mesh)(ModelArrays(placed[0], given, placed[1]), sharding.put_batch(batch, mesh))
        chex.assert_trees_all_close(got, expected, atol=1e-5)


def test_weights_are_gathered_and_reduced_once_for_all_concepts(tiny_backbone_config: BackboneConfig) -> None:
    """The wire carries a layer's weights and gradients once, however many concepts there are."""
    mesh = sharding.make_mesh(fsdp=8)

    def collectives(k: int) -> dict[str, int]:
        config, params, masks, heads = build(tiny_backbone_config, k=k)
        packed = masks_lib.pack(masks)
        loss = make_loss(config, mesh)
        batch = random_batch(0, rows=8, k=k)
        grad = jax.jit(jax.grad(lambda p, h, m, b: loss(p, h, m, b, None)[0]))
        text = grad.lower(
            sharding.put(params, mesh),
            sharding.put(heads, mesh),
            jax.device_put(packed, sharding.shardings(mesh, sharding.packed_specs(packed))),
            sharding.put_batch(batch, mesh),
        ).as_text()
        return {name: text.count(f"stablehlo.{name}") for name in ("all_gather", "reduce_scatter")}

    of_four = collectives(4)
    assert collectives(2) == of_four
    assert of_four["reduce_scatter"] >= 6


def test_the_state_lies_where_the_rules_say(tiny_backbone_config: BackboneConfig) -> None:
    _, params, _, heads = build(tiny_backbone_config, k=4)
    mesh = sharding.make_mesh(fsdp=4, concept=2)
    state = train_step.init_state(params, heads, train_step.make_optimizer(OptimConfig(), 10), mesh)
    kernel = state.params["layers"]["ffn_in"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert len(moments) == 2
    for moment in moments:
        assert moment.sharding.spec == kernel.sharding.spec
    replicated = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 512 and leaf.sharding.is_fully_replicated]
    assert not replicated, "no large leaf is left replicated"


def test_a_leaf_without_a_rule_raises() -> None:
    with pytest.raises(KeyError, match="no sharding rule for the leaf 'layers/gate/kernel'"):
        sharding.param_specs({"layers": {"gate": {"kernel": jnp.zeros((2, 3))}}})


def test_a_mesh_that_does_not_fit_names_leaf_and_axis(tiny_backbone_config: BackboneConfig) -> None:
    config, _, _, heads = build(tiny_backbone_config, k=3)
    del config
    with pytest.raises(ValueError, match=r"projector/kernel: dimension 0 of \(3, 32, 3\) is not divisible by 2"):
        sharding.check_divisible(heads, sharding.make_mesh(concept=2))
    with pytest.raises(ValueError, match="needs 64 devices, but 8 are available"):
        sharding.make_mesh(data=8, fsdp=8)
    with pytest.raises(ValueError, match="a batch of 6 rows does not divide over data x fsdp = 4"):
        sharding.put_batch(random_batch(rows=6), sharding.make_mesh(data=2, fsdp=2))


def test_dropout_differs_between_steps_rows_and_concepts(noisy: BackboneConfig) -> None:
    config, params, masks, _ = build(noisy, k=4)
    full = {path: jnp.ones_like(mask) for path, mask in masks.items()}
    one = random_batch(rows=1)
    batch = jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis=0), one)
    weights = SubnetworkWeights(params, full)
    first = encode(config, weights, batch, dropout_rng=jax.random.key(0))
    second = encode(config, weights, batch, dropout_rng=jax.random.key(1))
    assert float(jnp.abs(first - second).max()) > 1e-3
    assert float(jnp.abs(first[0] - first[1]).max()) > 1e-3
    assert float(jnp.abs(first[:, 0] - first[:, 1]).max()) > 1e-3


def test_learning_rates_are_apart_and_warm_up() -> None:
    tx = train_step.make_optimizer(
        OptimConfig(learning_rate=1e-3, head_learning_rate=1e-1, warmup_fraction=0.1, clip_norm=1e9), 100
    )
    trained = {"backbone": {"w": jnp.zeros(())}, "heads": {"v": jnp.zeros(())}}
    state, sizes = tx.init(trained), []
    update, gradient = jax.jit(tx.update), jax.tree.map(jnp.ones_like, trained)
    for _ in range(100):
        updates, state = update(gradient, state, trained)
        sizes.append((-float(updates["backbone"]["w"]), -float(updates["heads"]["v"])))
    assert sizes[0][0] == pytest.approx(1e-4, rel=1e-3), "the first step takes a tenth of the peak"
    assert max(backbone for backbone, _ in sizes) == pytest.approx(1e-3, rel=1e-3)
    assert sizes[-1][0] < 2e-5
    assert all(head == pytest.approx(100 * backbone, rel=1e-3) for backbone, head in sizes)


def test_rates_are_rewound_at_each_event() -> None:
    settings = OptimConfig(warmup_fraction=0.1, rewind=True)
    rates = train_step.learning_rates(settings, 100, (40, 60), 1.0, 3.0)
    found = np.array([float(rates(step)) for step in range(100)])
    parts = [found[:40], found[40:60], found[60:]]
    assert [part.max() for part in parts] == pytest.approx([1.0, 3.0, 3.0])
    assert [int(part.argmax()) for part in parts] == [3, 1, 3], "a tenth of each part warms up"
    assert all(part[-1] < 0.1 * part.max() for part in parts)
    whole = train_step.learning_rates(OptimConfig(warmup_fraction=0.1), 100, (40, 60), 1.0, 3.0)
    once = train_step.learning_rates(OptimConfig(warmup_fraction=0.1), 100, (), 1.0, 3.0)
    for step in (0, 9, 39, 40, 99):
        assert float(whole(step)) == pytest.approx(float(once(step)) * (3 if step >= 40 else 1))


def test_weight_decay_spares_biases_and_norms(tiny_backbone_config: BackboneConfig) -> None:
    params = jax.tree.map(jnp.ones_like, random_params(tiny_backbone_config))
    trained = {"backbone": params, "heads": {"projector": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}}
    tx = train_step.make_optimizer(OptimConfig(learning_rate=0.1, head_learning_rate=0.2, weight_decay=0.5), 1)
    updates, _ = jax.jit(lambda params: tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params))(
        trained
    )
    moved = {path_string(path) for path, leaf in jax.tree_util.tree_leaves_with_path(updates) if leaf.any()}
    assert "backbone/layers/ffn_in/kernel" in moved and "heads/projector/kernel" in moved
    assert {path.rpartition("/")[2] for path in moved} == {"kernel", "embedding"}
    still = {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(updates)} - moved
    assert {path.rpartition("/")[2] for path in still} == {"scale", "bias"}
