"""Gradients of L_k and their Gram against a loop written out."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.backbones import BackboneConfig, input_squares
from sparsecbm_jax.config.run_config import PrunerConfig, SparsityConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.trees import leaf_at, with_leaf
from sparsecbm_jax.data.schema import MISSING
from sparsecbm_jax.model.losses import subnetwork_loss
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.pruning import criteria, fisher, woodfisher
from sparsecbm_jax.pruning import gradients as gradients_lib
from sparsecbm_jax.pruning import pruner as pruner_lib
from sparsecbm_jax.pruning.gradients import Subnetwork, SubnetworkGradients
from sparsecbm_jax.pruning.masks_from_scores import prune_concept
from sparsecbm_jax.pruning.pruner import PruningHooks, PruningOptions
from sparsecbm_jax.pruning.schedule import schedule
from sparsecbm_jax.pruning.woodfisher_scores import ScoreReport, woodfisher_scores

from tests.model.test_forward import build, forward, random_batch

pytestmark = pytest.mark.long

TOLERANCE = 1e-5


@pytest.mark.parametrize("num_grads", [1, 7, 8, 19])
def test_streamed_gram_is_the_sum_of_outer_products(num_grads: int) -> None:
    rng = np.random.default_rng(num_grads)
    gradients = [{"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)} for _ in range(num_grads)]
    piece = fisher.Piece("w", None, 0, 4)
    result = fisher.accumulate(iter(gradients), (piece,), block_size=3)
    blocks = np.stack([np.asarray(woodfisher.to_blocks(g["w"], 3), np.float64) for g in gradients])
    expected = np.einsum("unb,unc->nbc", blocks, blocks).reshape(2, 4, 3, 3)
    np.testing.assert_allclose(result.states[0], expected, rtol=1e-4, atol=TOLERANCE)
    assert result.num_grads == num_grads, "the count that was seen divides"


def test_no_gradient_is_an_error() -> None:
    with pytest.raises(ValueError, match="no gradients"):
        fisher.accumulate(iter(()), (), 4)


def test_gradients_at_pruned_positions_are_zero_and_examples_average(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    batch = random_batch()._replace(concepts=np.ones((4, 3), np.int32), label=np.zeros(4, np.int32))
    activations = forward(config, ModelArrays(params, masks, heads), batch).activations
    mask = masks_lib.concept(masks, 1)
    pairs = [(batch, activations)]
    (together,) = SubnetworkGradients(Subnetwork(config, params, mask, heads, 1), pairs)
    rows = list(SubnetworkGradients(Subnetwork(config, params, mask, heads, 1), pairs, per_example=True))
    assert len(rows) == 4
    mean = jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0), *rows)
    chex.assert_trees_all_close(together, mean, atol=TOLERANCE)
    for path in mask:
        assert not jnp.where(mask[path], 0, together[path]).any()


def test_all_concepts_share_a_program(tiny_backbone_config: BackboneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    monkeypatch.setattr(gradients_lib, "subnetwork_loss", chex.assert_max_traces(subnetwork_loss, n=1))
    batch, activations = random_batch(rows=3, tokens=11), jnp.zeros((3, 3, 3))  # of a shape that no other test has
    for k in range(3):
        subnetwork = Subnetwork(config, params, masks_lib.concept(masks, k), heads, k)
        assert len(list(SubnetworkGradients(subnetwork, [(batch, activations)]))) == 1


def test_other_masks_reach_a_concepts_gradients_and_scores_by_its_label_alone(
    tiny_backbone_config: BackboneConfig,
) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    others = {path: mask.at[1].set(~mask[1]) for path, mask in masks.items()}
    mask = masks_lib.concept(masks, 0)
    kernels = masks_lib.kernels_of(params, mask)

    def found(is_labelled: bool, all_masks: dict[str, jax.Array]) -> tuple[Any, Any]:
        labels = np.full(4, 1 if is_labelled else MISSING, np.int32)
        batches = [random_batch(seed)._replace(label=labels) for seed in range(3)]
        arrays = ModelArrays(params, all_masks, heads)
        pairs = [(batch, forward(config, arrays, batch).activations) for batch in batches]
        gradients = SubnetworkGradients(Subnetwork(config, params, mask, heads, 0), pairs)
        scores = woodfisher_scores(kernels, gradients, config=PrunerConfig(num_grads=3, block_size=8))
        return list(gradients), scores

    chex.assert_trees_all_equal(found(False, masks), found(False, others))
    # L_k holds the label's loss, and the label is read from all concepts.
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(found(True, masks), found(True, others))


def test_wanda_takes_the_norms_of_the_subnetworks_own_inputs(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    batches = [random_batch(seed) for seed in range(2)]
    mask = masks_lib.concept(masks, 1)
    kernels = {path: jnp.where(kept, leaf_at(params, path), 0) for path, kept in mask.items()}
    pairs = [(batch, jnp.zeros(())) for batch in batches]
    scores = criteria.wanda_scores(kernels, SubnetworkGradients(Subnetwork(config, params, mask, heads, 1), pairs))
    masked = functools.reduce(lambda tree, path: with_leaf(tree, path, kernels[path]), mask, params)
    squares = [input_squares(config.backbone, masked, batch.input_ids, batch.attention_mask) for batch in batches]
    for path, kernel in kernels.items():
        norms = np.sqrt(np.asarray(squares[0][path] + squares[1][path]))
        np.testing.assert_allclose(scores[path], np.abs(kernel) * norms[..., None], rtol=1e-5)
        assert scores[path].any()


@pytest.mark.parametrize("num_grads", [5, 128], ids=["dual form", "gram form"])
def test_scores_against_dense_algebra(num_grads: int, tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    batches = [random_batch(seed) for seed in range(5)]
    mask = masks_lib.concept(masks, 0)
    pairs = [(b, forward(config, ModelArrays(params, masks, heads), b).activations) for b in batches]
    kernels = {path: jnp.where(kept, leaf_at(params, path), 0) for path, kept in mask.items()}
    gradients = list(SubnetworkGradients(Subnetwork(config, params, mask, heads, 0), pairs))
    settings = PrunerConfig(block_size=16, damping=0.1, num_grads=num_grads)
    scores = woodfisher_scores(kernels, gradients, config=settings)
    path, layer, output = "layers/ffn_in/kernel", 1, 7
    g = np.stack([np.asarray(gradient[path], np.float64) for gradient in gradients])
    damping = 0.1 * np.mean(g**2)
    for start in (0, 16):
        block = g[:, layer, start : start + 16, output]
        inverse = np.linalg.inv(damping * np.eye(16) + block.T @ block / len(g))
        w = np.asarray(kernels[path], np.float64)[layer, start : start + 16, output]
        np.testing.assert_allclose(
            scores[path][layer, start : start + 16, output], w**2 / (2 * np.diag(inverse)), rtol=1e-3, atol=1e-12
        )


def test_a_nan_gradient_names_the_kernel(tiny_backbone_config: BackboneConfig) -> None:
    kernels = {"layers/ffn_in/kernel": jnp.ones((1, 4, 4))}
    gradients = [{"layers/ffn_in/kernel": jnp.full((1, 4, 4), jnp.nan)}]
    with pytest.raises(FloatingPointError, match="layers/ffn_in/kernel"):
        woodfisher_scores(kernels, gradients, config=PrunerConfig(block_size=4))


@pytest.mark.parametrize("scope", ["global", "per_kernel"])
def test_pruning_is_exact_nested_and_keeps_the_best(scope: str, tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    full = {path: jnp.ones_like(mask) for path, mask in masks.items()}
    batches = [random_batch(seed) for seed in range(3)]
    previous = full
    for sparsity in (0.2, 0.5, 0.75):
        options = PruningOptions(PrunerConfig(block_size=8), SparsityConfig(scope=scope))
        pruned = pruner_lib.prune(config, ModelArrays(params, previous, heads), batches, sparsity, options)
        total = masks_lib.num_weights(full)
        if scope == "global":
            assert masks_lib.num_kept(pruned).tolist() == [total - round(sparsity * total)] * 3
        else:
            for mask in pruned.values():
                kernels = np.asarray(mask).reshape(-1, *mask.shape[-2:])
                assert len(kernels) == 3 * config.backbone.num_layers
                size = kernels[0].size
                assert kernels.sum(axis=(1, 2)).tolist() == [size - round(sparsity * size)] * len(kernels)
        for path in pruned:
            assert not (pruned[path] & ~previous[path]).any(), "what was pruned stays pruned"
        previous = pruned
    assert (masks_lib.overlap(previous)[~np.eye(3, dtype=bool)] < 1).all(), "concepts get masks of their own"


def test_regrow_lets_weights_come_back(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config, density=0.5)
    batches = [random_batch(seed) for seed in range(3)]
    options = PruningOptions(PrunerConfig(block_size=8), SparsityConfig(regrow=True))
    pruned = pruner_lib.prune(config, ModelArrays(params, masks, heads), batches, 0.5, options)
    assert any(bool((pruned[path] & ~masks[path]).any()) for path in masks)
    assert masks_lib.num_kept(pruned).tolist() == [round(0.5 * masks_lib.num_weights(masks))] * 3


def test_concepts_have_weights_in_common_or_lose_alike(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    full = {path: jnp.ones_like(mask) for path, mask in masks.items()}
    batches, total = [random_batch(seed) for seed in range(3)], masks_lib.num_weights(full)

    def prune(pattern: str = "1", **cut: Any) -> masks_lib.Masks:
        options = PruningOptions(PrunerConfig(block_size=8, pattern=pattern), SparsityConfig(**cut))
        return pruner_lib.prune(config, ModelArrays(params, full, heads), batches, 0.5, options)

    shared = prune(shared_fraction=0.6)
    assert masks_lib.num_kept(shared).tolist() == [total - round(0.5 * total)] * 3
    gone_everywhere = sum(int((~mask).all(axis=0).sum()) for mask in shared.values())
    assert gone_everywhere >= round(0.3 * total)
    allotted = masks_lib.total_density(prune(allotment="loss"))
    assert np.mean(allotted) == pytest.approx(0.5, abs=1e-3) and len(set(allotted.tolist())) == 3
    with pytest.raises(ValueError, match="goes with no N:M pattern"):
        prune(pattern="2:4", shared_fraction=0.5)


def test_weights_move_where_there_is_one_mask_only(tiny_backbone_config: BackboneConfig) -> None:
    pruner, batches = PrunerConfig(block_size=8), [random_batch(seed) for seed in range(3)]
    config, params, masks, heads = build(tiny_backbone_config)
    with pytest.raises(ValueError, match="which 3 subnetworks share"):
        pruner_lib.optimal_update(config, ModelArrays(params, masks, heads), masks, batches, pruner=pruner)
    config, params, masks, heads = build(tiny_backbone_config, k=1)
    batches = [batch._replace(concepts=batch.concepts[:, :1]) for batch in batches]
    before = ModelArrays(params, {path: jnp.ones_like(mask) for path, mask in masks.items()}, heads)
    after = pruner_lib.prune(config, before, batches, 0.5, PruningOptions(pruner))
    moved = pruner_lib.optimal_update(config, before, after, batches, pruner=pruner)
    num_moved = 0
    for path, mask in after.items():
        old, new = (np.asarray(leaf_at(tree, path)) for tree in (params, moved))
        kept = np.asarray(mask[0])
        np.testing.assert_array_equal(new[~kept], old[~kept])
        num_moved += (new[kept] != old[kept]).sum()
    assert num_moved > 100
    chex.assert_trees_all_equal(moved["embed"], params["embed"])


def test_concepts_have_sparsities_of_their_own_in_several_cuts(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    full = {path: jnp.ones_like(mask) for path, mask in masks.items()}
    reports: list[ScoreReport] = []
    wanted = (0.3, 0.5, 0.8)
    pruned = pruner_lib.prune(
        config,
        ModelArrays(params, full, heads),
        [random_batch(seed) for seed in range(2)],
        wanted,
        PruningOptions(PrunerConfig(block_size=8, num_grads=2), SparsityConfig(reestimations=2)),
        PruningHooks(reports=reports),
    )
    total = masks_lib.num_weights(full)
    assert masks_lib.num_kept(pruned).tolist() == [total - round(s * total) for s in wanted]
    assert [report["form"] for report in reports] == ["dual"] * 6, "three concepts, two cuts each"


def test_own_criterion_takes_the_place_of_woodfisher(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    full = {path: jnp.ones_like(mask) for path, mask in masks.items()}
    options = PruningOptions(PrunerConfig(), criterion=criteria.magnitude_scores)
    pruned = pruner_lib.prune(config, ModelArrays(params, full, heads), [], 0.5, options)
    kept = jnp.concatenate([jnp.abs(leaf_at(params, p))[pruned[p][0]] for p in pruned])
    gone = jnp.concatenate([jnp.abs(leaf_at(params, p))[~pruned[p][0]] for p in pruned])
    assert float(kept.min()) >= float(gone.max())


def test_shapes_that_do_not_fit_are_named(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    path, mask = next(iter(masks.items()))
    for wrong in ({path: mask[:2]}, {path: mask[..., :-1]}):
        with pytest.raises(AssertionError, match=f"the masks of {path}"):
            pruner_lib.prune(config, ModelArrays(params, masks | wrong, heads), [], 0.5, PruningOptions(PrunerConfig()))
    for change in ({"other": mask[0]}, {path: jnp.ones(3)}):
        own = PruningOptions(PrunerConfig(), criterion=lambda kernels, _, change=change: {**kernels, **change})
        with pytest.raises(AssertionError, match="kernels and their scores"):
            pruner_lib.prune(config, ModelArrays(params, masks, heads), [], 0.7, own)
    kernels = masks_lib.kernels_of(params, masks_lib.concept(masks, 0))
    with pytest.raises(AssertionError, match="kernels and a gradient"):
        woodfisher_scores(kernels, [{**kernels, path: jnp.ones(3)}], config=PrunerConfig(block_size=4))
    with pytest.raises(AssertionError, match="a mask and its scores"):
        prune_concept(masks_lib.concept(masks, 0), {path: kernels[path]}, 0.7)


def test_schedules() -> None:
    cubic = schedule(SparsityConfig(initial=0.2, start_epoch=2, end_epoch=5), 4, steps_per_epoch=10)
    assert [(event.epoch, event.step) for event in cubic] == [(2, 0), (3, 0), (4, 0), (5, 0)]
    assert cubic[0].sparsity == pytest.approx((0.2,) * 4)
    assert cubic[1].sparsity == pytest.approx((0.75 - 0.55 * (2 / 3) ** 3,) * 4)
    assert cubic[-1].sparsity == (0.75,) * 4 and str(cubic[-1]) == "0.75"
    linear = schedule(
        SparsityConfig(initial=0.2, final=0.6, start_epoch=0, end_epoch=1, schedule="linear", events_per_epoch=4), 4, 10
    )
    np.testing.assert_allclose([event.sparsity[0] for event in linear], [0.2, 0.3, 0.4, 0.5, 0.6])
    assert [(event.epoch, event.step) for event in linear] == [(0, 0), (0, 2), (0, 5), (0, 7), (1, 0)]
    (once,) = schedule(SparsityConfig(schedule="oneshot"), 10, 10)
    assert once.sparsity == pytest.approx((0.9,) * 10)
    own = schedule(SparsityConfig(per_concept=(0.5, 0.9), start_epoch=0, end_epoch=2, schedule="linear"), 2, 3)
    np.testing.assert_allclose([event.sparsity for event in own], [(0.2, 0.2), (0.35, 0.55), (0.5, 0.9)])
    assert str(own[1]) == "0.35 / 0.55"
    with pytest.raises(ValueError, match=r"per_concept has 2 fractions \(0\.5, 0\.9\), but there are 4 concepts"):
        schedule(SparsityConfig(per_concept=(0.5, 0.9)), 4, 3)
    with pytest.raises(ValueError, match="an epoch has 3 steps"):
        schedule(SparsityConfig(events_per_epoch=4), 4, 3)


def test_padding_rows_are_not_examples(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    batch = random_batch()
    batch = jax.tree.map(np.asarray, batch)._replace(example_weight=np.asarray([1, 1, 0, 0], np.float32))
    activations = forward(config, ModelArrays(params, masks, heads), batch).activations
    subnetwork = Subnetwork(config, params, masks_lib.concept(masks, 0), heads, 0)
    rows = SubnetworkGradients(subnetwork, [(batch, activations)], per_example=True)
    assert len(list(rows)) == 2
