"""Counts of every scope, what is pinned, what concepts have in common, and how a sparsity is allotted."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.core.selection import select_smallest_in_rows
from sparsecbm_jax.pruning import patterns
from sparsecbm_jax.pruning.masks_from_scores import allot, prune_concept, prune_in_common

A, B = "layers/ffn_in/kernel", "layers/ffn_out/kernel"


def scores(seed: int = 0) -> dict[str, jnp.ndarray]:
    rng = np.random.default_rng(seed)
    # Few values, so that there are ties.
    return {A: jnp.asarray(rng.integers(0, 6, (2, 8, 5)), jnp.float32), B: jnp.asarray(rng.normal(size=(2, 4, 8)) ** 2)}


def whole() -> dict[str, jnp.ndarray]:
    return {path: jnp.ones(leaf.shape, bool) for path, leaf in scores().items()}


def test_rows_are_those_of_a_stable_sort() -> None:
    rng = np.random.default_rng(1)
    for values in (rng.integers(0, 3, (3, 12, 4)).astype(np.float32), rng.normal(size=(3, 12, 4)).astype(np.float32)):
        values[0, :3, 0] = np.nan, np.inf, -np.inf
        eligible, counts = rng.random(values.shape) < 0.7, rng.integers(0, 13, (3, 4)).astype(np.uint32)
        got = np.asarray(select_smallest_in_rows(jnp.asarray(values), jnp.asarray(counts), jnp.asarray(eligible)))
        for layer, unit in np.ndindex(3, 4):
            order = np.argsort(values[layer, :, unit], kind="stable")
            expected = [i for i in order if eligible[layer, i, unit]][: counts[layer, unit]]
            assert sorted(expected) == np.flatnonzero(got[layer, :, unit]).tolist()


def test_every_output_unit_gets_its_count_and_keeps_its_best() -> None:
    once = prune_concept(whole(), scores(), 0.25, scope="per_row")
    twice = prune_concept(once, scores(), 0.5, scope="per_row")
    for path, inputs in ((A, 8), (B, 4)):
        assert (np.asarray(twice[path]).sum(axis=-2) == inputs // 2).all()
        assert not (twice[path] & ~once[path]).any()
        kept = np.where(twice[path], scores()[path], np.inf).min(axis=-2)
        pruned = np.where(twice[path], -np.inf, scores()[path]).max(axis=-2)
        assert (kept >= pruned).all()
    of_four = prune_concept(whole(), scores(), 0.5, scope="per_row", unit=patterns.unit_of("4", 4))
    assert (np.asarray(of_four[A]).reshape(2, 2, 4, 5).sum(axis=2) % 4 == 0).all()


def test_pinned_kernels_stay_whole_and_the_others_make_up_for_them() -> None:
    cut = prune_concept(whole(), scores(), 0.25, pinned=["layers/ffn_out/*"])
    assert bool(cut[B].all()) and int((~cut[A]).sum()) == 36
    with pytest.raises(ValueError, match=r"prunes 108 weights, but only 80 of 144 are not pinned"):
        prune_concept(whole(), scores(), 0.75, pinned=[B])
    with pytest.raises(ValueError, match="has 'layers/fnn', which names no kernel"):
        prune_concept(whole(), scores(), 0.25, pinned=["layers/fnn"])


def test_what_is_in_common_is_of_lowest_summed_score() -> None:
    masks = {path: jnp.stack([mask] * 3) for path, mask in whole().items()}
    of_concepts = [scores(seed) for seed in range(3)]
    cut = prune_in_common(masks, of_concepts, 0.25, patterns.SINGLE_WEIGHT)
    summed = {path: sum(of[path] for of in of_concepts) for path in masks}
    expected = prune_concept(whole(), summed, 0.25)
    for path, mask in cut.items():
        for k in range(3):
            np.testing.assert_array_equal(mask[k], expected[path])


def test_allotted_sparsities_cost_the_same_and_have_the_mean_asked_for() -> None:
    rng = np.random.default_rng(2)
    of_concepts = [{A: jnp.asarray(scale * rng.random((2, 50, 40)), jnp.float32)} for scale in (1.0, 2.0, 8.0)]
    shares = allot(of_concepts, 0.6)
    assert np.mean(shares) == pytest.approx(0.6) and shares[0] > shares[1] > shares[2]
    losses = [
        np.sort(np.ravel(of[A]))[: round(share * 4000)].sum() for of, share in zip(of_concepts, shares, strict=True)
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=0.01)


def test_signed_and_lopsided_scores_are_allotted_to_the_mean_asked_for() -> None:
    rng = np.random.default_rng(3)
    signed = [{A: jnp.asarray(scale * rng.normal(size=(2, 50, 40)), jnp.float32)} for scale in (1.0, 5.0)]
    assert np.mean(allot(signed, 0.7)) == pytest.approx(0.7)
    free = {A: jnp.asarray(np.where(rng.random((2, 50, 40)) < 0.8, 0, 1), jnp.float32)}
    assert np.mean(allot([free, {A: jnp.ones((2, 50, 40))}], 0.2)) == pytest.approx(0.2)


def test_what_was_pruned_stays_so_in_a_pinned_kernel_and_counts() -> None:
    before = prune_concept(whole(), scores(), 0.25)
    cut = prune_concept(before, scores(), 0.5, pinned=[B])
    np.testing.assert_array_equal(cut[B], before[B])
    assert sum(int((~mask).sum()) for mask in cut.values()) == 72


@pytest.mark.parametrize("scope", ["global", "per_row"])
def test_groups_cannot_go_where_a_mask_has_holes(scope: str) -> None:
    holes = prune_concept(whole(), scores(), 0.5)
    with pytest.raises(ValueError, match="made with another pattern"):
        prune_concept(holes, scores(), 0.75, scope=scope, unit=patterns.unit_of("4", 4))
