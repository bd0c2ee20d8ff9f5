"""The composition: Eq. 3, subnetworks that do not meet, dense equals all-True, packed equals boolean."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax import backbones
from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.trees import leaf_at
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model import encode as encode_lib
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.encode import pool
from sparsecbm_jax.model.forward import forward as run_forward
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.losses import joint_loss, subnetwork_loss
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.model.subnetwork_weights import SubnetworkWeights

from tests.support.random_weights import random_heads, random_masks, random_params

EXACT, CLOSE = 1e-6, 1e-5
NUM_CONCEPTS, NUM_CLASSES, NUM_LABELS = 3, 3, 4


def random_batch(seed: int = 0, rows: int = 4, tokens: int = 9, k: int = NUM_CONCEPTS) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, tokens + 1, rows)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int32)
    return Batch(
        input_ids=(rng.integers(5, 60, (rows, tokens)) * mask).astype(np.int32),
        attention_mask=mask,
        concepts=rng.integers(-1, NUM_CLASSES, (rows, k)).astype(np.int32),
        label=rng.integers(-1, NUM_LABELS, rows).astype(np.int32),
        example_weight=np.ones(rows, np.float32),
        row_ids=np.arange(rows, dtype=np.int32),
    )


def build(
    backbone: BackboneConfig, k: int = NUM_CONCEPTS, density: float = 0.6, seed: int = 0
) -> tuple[CBMConfig, dict, masks_lib.Masks, dict]:
    config = CBMConfig(backbone, k, NUM_CLASSES, NUM_LABELS)
    return config, random_params(backbone, seed), random_masks(config, density, seed), random_heads(config, seed)


# Compiled once for each shape; without `jit` the scan over layers is compiled again in every call.
forward = jax.jit(run_forward, static_argnums=0)
encode = jax.jit(encode_lib.encode, static_argnums=0)
encode_dense = jax.jit(backbones.encode_dense, static_argnums=0)


@pytest.fixture(scope="module")
def opt_350m_like() -> BackboneConfig:
    """Post-norm OPT whose two embedding projections are masked too."""
    return backbones.config_from_hf(
        {
            "model_type": "opt",
            "vocab_size": 64,
            "hidden_size": 16,
            "word_embed_proj_dim": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "max_position_embeddings": 32,
            "do_layer_norm_before": False,
            "dropout": 0.0,
        }
    )


def test_each_concept_is_its_masked_backbone(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    batch = random_batch()
    output = forward(config, ModelArrays(params, masks, heads), batch)
    total = heads["predictor"]["bias"]
    for k in range(NUM_CONCEPTS):
        subnetwork = masks_lib.apply(params, masks, k)
        hidden = encode_dense(
            backbones.make_backbone(config.backbone), subnetwork, batch.input_ids, batch.attention_mask
        )
        z = pool(hidden, batch.attention_mask)
        u = z @ heads["projector"]["kernel"][k] + heads["projector"]["bias"][k]
        chex.assert_trees_all_close(output.concept_logits[:, k], u, atol=CLOSE)
        total = total + (u - u.mean(axis=-1, keepdims=True)) / 10 @ heads["predictor"]["kernel"][k]
    chex.assert_trees_all_close(output.label_logits, total, atol=CLOSE)


@pytest.mark.parametrize("activation", ["log_odds", "centred", "sigmoid"])
def test_the_label_reads_no_more_than_the_probabilities(tiny_backbone_config: BackboneConfig, activation: str) -> None:
    """A constant that is added to a concept's logits changes no probability; the paper's form lets it through."""
    config, params, masks, heads = build(tiny_backbone_config)
    config = dataclasses.replace(config, activation=activation)
    bias = heads["projector"]["bias"]
    moved = {**heads, "projector": {**heads["projector"], "bias": bias.at[1].add(3.0)}}
    batch = random_batch()
    before, after = (forward(config, ModelArrays(params, masks, one), batch) for one in (heads, moved))
    assert float(jnp.abs(after.concept_logits - before.concept_logits).max()) > 2
    chex.assert_trees_all_close(*(jax.nn.softmax(out.concept_logits) for out in (before, after)), atol=CLOSE)
    difference = float(jnp.abs(after.label_logits - before.label_logits).max())
    assert difference > 0.01 if activation == "sigmoid" else difference < CLOSE


def test_opt_projections_are_masked_per_concept(opt_350m_like: BackboneConfig) -> None:
    config, params, masks, _ = build(opt_350m_like)
    assert {"embed/project_in/kernel", "finish/project_out/kernel"} <= set(masks)
    batch = random_batch()
    z = encode(config, SubnetworkWeights(params, masks), batch)
    for k in range(NUM_CONCEPTS):
        subnetwork = masks_lib.apply(params, masks, k)
        dense = encode(config, SubnetworkWeights(subnetwork), batch)[:, 0]
        chex.assert_trees_all_close(z[:, k], dense, atol=CLOSE)


def test_all_true_masks_are_the_dense_model(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    full = {path: jnp.ones_like(mask) for path, mask in masks.items()}
    batch = random_batch()
    masked, dense = (forward(config, ModelArrays(params, m, heads), batch) for m in (full, None))
    chex.assert_trees_all_close(masked.label_logits, dense.label_logits, atol=EXACT)
    chex.assert_trees_all_close(masked.concept_logits, dense.concept_logits, atol=EXACT)
    assert dense.pooled.shape[1] == 1


def test_packed_and_boolean_masks_agree_to_the_bit(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    made = make_forward(config)
    boolean, packed = (made(ModelArrays(params, m, heads), random_batch()) for m in (masks, masks_lib.pack(masks)))
    # What is read through the masks; the compiler may fuse the heads behind it one way or the other.
    chex.assert_trees_all_equal(boolean.pooled, packed.pooled)
    chex.assert_trees_all_close(boolean, packed, atol=CLOSE)


def test_another_concepts_mask_never_changes_this_ones_forward(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    batch = random_batch()
    changed = {path: mask.at[1].set(~mask[1]) for path, mask in masks.items()}
    before, after = (forward(config, ModelArrays(params, m, heads), batch).concept_logits for m in (masks, changed))
    chex.assert_trees_all_equal(before[:, 0], after[:, 0])
    chex.assert_trees_all_equal(before[:, 2], after[:, 2])
    assert float(jnp.abs(before[:, 1] - after[:, 1]).max()) > 1e-3


def test_padding_and_company_change_nothing(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    batch = random_batch()
    wide = batch._replace(
        input_ids=np.pad(batch.input_ids, ((0, 0), (0, 7))),
        attention_mask=np.pad(batch.attention_mask, ((0, 0), (0, 7))),
    )
    alone = jax.tree.map(lambda leaf: leaf[2:3], batch)
    base, padded, single = (
        forward(config, ModelArrays(params, masks, heads), b).label_logits for b in (batch, wide, alone)
    )
    chex.assert_trees_all_close(base, padded, atol=CLOSE)
    chex.assert_trees_all_close(base[2:3], single, atol=CLOSE)


def test_joint_gradient_of_a_kernel_copy_is_that_of_its_own_loss(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    # With every cell labelled, mean_k and the single L_k differ by the factor K in the concept term only.
    batch = random_batch()._replace(concepts=np.ones((4, NUM_CONCEPTS), np.int32), label=np.ones(4, np.int32))
    kernels = {path: jnp.where(mask, leaf_at(params, path), 0) for path, mask in masks.items()}
    config_sum = dataclasses.replace(config, gamma=config.gamma * NUM_CONCEPTS)

    def joint(effective: dict) -> jax.Array:
        return joint_loss(
            config_sum, run_forward(config_sum, ModelArrays(params, None, heads), batch, kernels=effective), batch
        )[0]

    together = jax.jit(jax.grad(joint))(kernels)
    activations = forward(config, ModelArrays(params, masks, heads), batch).activations

    def own_loss(own: dict, k: jax.Array) -> jax.Array:
        return subnetwork_loss(config, params, heads, batch, own, k, activations)

    own_gradient = jax.jit(jax.grad(own_loss))
    for k in range(NUM_CONCEPTS):
        alone = own_gradient({path: kernel[k] for path, kernel in kernels.items()}, k)
        chex.assert_trees_all_close({p: g[k] for p, g in together.items()}, alone, atol=CLOSE, rtol=1e-4)
        pruned = [~masks[path][k] for path in masks]
        alive = sum(float(jnp.abs(jnp.where(gone, alone[p], 0)).sum()) for p, gone in zip(masks, pruned, strict=True))
        assert alive > 0, "gradients at pruned positions are alive"


def test_pruned_weights_get_no_gradient_through_the_masks(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config, density=0.3)
    batch = random_batch()

    @jax.jit
    @jax.grad
    def gradient(p: dict) -> jax.Array:
        return joint_loss(config, run_forward(config, ModelArrays(p, masks, heads), batch), batch)[0]

    grads = gradient(params)
    for path, mask in masks.items():
        found = leaf_at(grads, path)
        chex.assert_trees_all_equal(jnp.where(mask.any(axis=0), 0, found), jnp.zeros_like(found))


def test_losses_by_hand(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    batch = random_batch(seed=3)._replace(example_weight=np.asarray([1, 1, 1, 0], np.float32))
    output = forward(config, ModelArrays(params, masks, heads), batch)
    u, y = (np.asarray(leaf, np.float64) for leaf in (output.concept_logits, output.label_logits))

    def entropy(logits: np.ndarray, target: int) -> float:
        return float(np.log(np.exp(logits).sum()) - logits[target])

    task = [entropy(y[b], batch.label[b]) for b in range(3) if batch.label[b] >= 0]
    cells = [
        entropy(u[b, k], batch.concepts[b, k])
        for b in range(3)
        for k in range(NUM_CONCEPTS)
        if batch.concepts[b, k] >= 0
    ]
    loss, parts = joint_loss(config, output, batch)
    assert float(parts["task_loss"]) == pytest.approx(np.mean(task), rel=CLOSE)
    assert float(parts["concept_loss"]) == pytest.approx(np.mean(cells), rel=CLOSE)
    assert float(loss) == pytest.approx(np.mean(task) + config.gamma * np.mean(cells), rel=CLOSE)


def test_a_batch_without_any_label_costs_nothing(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    batch = random_batch()._replace(label=np.full(4, -1, np.int32), concepts=np.full((4, NUM_CONCEPTS), -1, np.int32))
    loss, _ = joint_loss(config, forward(config, ModelArrays(params, masks, heads), batch), batch)
    assert float(loss) == 0.0


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_remat_changes_no_gradient(tiny_backbone_config: BackboneConfig, remat: str) -> None:
    config, params, masks, heads = build(tiny_backbone_config, k=1)
    batch = random_batch(k=1)

    def gradient(config: CBMConfig) -> dict:
        def loss(p: dict) -> jax.Array:
            return joint_loss(config, run_forward(config, ModelArrays(p, masks, heads), batch), batch)[0]

        return jax.jit(jax.grad(loss))(params)

    chex.assert_trees_all_close(
        gradient(config), gradient(dataclasses.replace(config, remat=remat)), atol=EXACT, rtol=CLOSE
    )


def test_own_word_embeddings_per_concept(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, _ = build(tiny_backbone_config)
    batch = random_batch()
    words = params["embed"]["word"]["embedding"][batch.input_ids]
    weights = SubnetworkWeights(params, masks)
    z = encode(config, weights, batch)
    shared = encode(config, weights, batch, word_embeddings=words)
    apart = encode(config, weights, batch, word_embeddings=jnp.stack([words, 0 * words, words]))
    chex.assert_trees_all_close(z, shared, atol=EXACT)
    chex.assert_trees_all_close(z[:, [0, 2]], apart[:, [0, 2]], atol=EXACT)
    assert float(jnp.abs(z[:, 1] - apart[:, 1]).max()) > 1e-3


def test_standard_strategy_has_no_concepts(tiny_backbone_config: BackboneConfig) -> None:
    config, params, _, _ = build(tiny_backbone_config)
    heads = random_heads(config, strategy="standard")
    output = forward(config, ModelArrays(params, None, heads), random_batch())
    assert output.label_logits.shape == (4, NUM_LABELS)
    assert output.concept_logits.shape == (4, 0, NUM_CLASSES)
