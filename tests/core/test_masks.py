"""Masks: bits round-trip, densities, drop-and-grow conserves the count, NaN stays where it is masked."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.trees import with_leaf

pytestmark = pytest.mark.strict_rank

SHAPES = {"layers/a/kernel": (2, 6, 5), "finish/b/kernel": (7, 3)}


def random_masks(k: int = 3, density: float = 0.5, seed: int = 0) -> masks_lib.Masks:
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.random((k, *shape)) < density) for path, shape in SHAPES.items()}


def random_params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "layers": {"a": {"kernel": jnp.asarray(rng.normal(size=(2, 6, 5)), jnp.float32), "bias": jnp.ones((2, 5))}},
        "finish": {"b": {"kernel": jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)}},
    }


@pytest.mark.parametrize(
    ("k", "dtype"), [(1, jnp.uint8), (8, jnp.uint8), (9, jnp.uint16), (17, jnp.uint32), (32, jnp.uint32)]
)
def test_pack_round_trips(k: int, dtype: jnp.dtype) -> None:
    masks = random_masks(k)
    packed = jax.jit(masks_lib.pack)(masks)
    assert {bits.dtype for bits in packed.values()} == {jnp.dtype(dtype)}
    chex.assert_trees_all_equal(masks_lib.unpack(packed, k), masks)


def test_bits_at_rest_round_trip_and_are_an_eighth() -> None:
    masks = random_masks()
    bits = masks_lib.to_bits(masks)
    chex.assert_trees_all_equal(masks_lib.from_bits(bits, {p: m.shape for p, m in masks.items()}), masks)
    assert all(bits[path].size == -(-mask.size // 8) for path, mask in masks.items())
    with pytest.raises(ValueError, match=r"finish/b/kernel: 8 bytes of mask bits, but the shape \(4, 7, 3\) needs 11"):
        masks_lib.from_bits(bits, {"finish/b/kernel": (4, 7, 3)})


def test_fingerprint_sees_one_bit() -> None:
    masks = random_masks()
    other = {**masks, "finish/b/kernel": masks["finish/b/kernel"].at[0, 0, 0].set(~masks["finish/b/kernel"][0, 0, 0])}
    assert masks_lib.fingerprint(masks) == masks_lib.fingerprint(random_masks())
    assert masks_lib.fingerprint(masks) != masks_lib.fingerprint(other)


def test_apply_zeroes_only_pruned_kernels_even_nan() -> None:
    masks, params = random_masks(), random_params()
    poisoned = with_leaf(
        params, "layers/a/kernel", jnp.where(masks["layers/a/kernel"][1], params["layers"]["a"]["kernel"], jnp.nan)
    )
    subnetwork = masks_lib.apply(poisoned, masks, 1)
    expected = jnp.where(masks["layers/a/kernel"][1], params["layers"]["a"]["kernel"], 0)
    chex.assert_trees_all_equal(subnetwork["layers"]["a"]["kernel"], expected)
    chex.assert_trees_all_equal(subnetwork["layers"]["a"]["bias"], params["layers"]["a"]["bias"])
    assert jnp.isnan(poisoned["layers"]["a"]["kernel"]).any(), "the parameters themselves are left alone"


def test_apply_names_a_wrong_shape_and_a_missing_kernel() -> None:
    params = random_params()
    with pytest.raises(ValueError, match=r"finish/b/kernel: the mask has shape \(2, 2\) but the kernel \(7, 3\)"):
        masks_lib.apply(params, {"finish/b/kernel": jnp.ones((1, 2, 2), bool)}, 0)
    with pytest.raises(KeyError, match="no leaf 'finish/c/kernel'"):
        masks_lib.apply(params, {"finish/c/kernel": jnp.ones((1, 2, 2), bool)}, 0)


def test_densities_and_overlap() -> None:
    masks = {"a": jnp.asarray([[True, True, False, False], [True, False, True, False]])}
    np.testing.assert_allclose(masks_lib.total_density(masks), [0.5, 0.5])
    np.testing.assert_allclose(masks_lib.overlap(masks), [[1, 1 / 3], [1 / 3, 1]])
    assert masks_lib.num_weights(masks) == 4
    big = {"a": jnp.asarray(np.random.default_rng(0).random((2, 200_000)) < 0.25)}
    assert masks_lib.overlap(big)[0, 1] == pytest.approx(masks_lib.chance_overlap(0.25), abs=0.005)


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_drop_and_grow_conserves_the_count(count: int) -> None:
    rng = np.random.default_rng(count)
    mask = masks_lib.concept(random_masks(), 0)
    score = {path: jnp.asarray(rng.integers(0, 5, leaf.shape), jnp.float32) for path, leaf in mask.items()}
    result = jax.jit(masks_lib.drop_and_grow)(mask, score, score, jnp.uint32(count))
    for path in mask:
        assert not (result.dropped[path] & ~mask[path]).any(), "only kept weights are dropped"
        assert not (result.grown[path] & mask[path]).any(), "only pruned weights are grown"
    for tree in (result.dropped, result.grown):
        assert sum(int(leaf.sum()) for leaf in tree.values()) == count
    kept_before, kept_after = (sum(int(leaf.sum()) for leaf in tree.values()) for tree in (mask, result.mask))
    assert kept_before == kept_after
    undone = {path: (result.mask[path] | result.dropped[path]) & ~result.grown[path] for path in mask}
    chex.assert_trees_all_equal(undone, mask)


def test_replace_concept_touches_one() -> None:
    masks = random_masks()
    empty = {path: jnp.zeros(shape, bool) for path, shape in SHAPES.items()}
    replaced = jax.jit(masks_lib.replace_concept)(masks, jnp.int32(2), empty)
    for path in masks:
        chex.assert_trees_all_equal(replaced[path][:2], masks[path][:2])
        assert not replaced[path][2].any()


def test_bad_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 32"):
        masks_lib.create(random_params(), ["finish/b/kernel"], 33)
    with pytest.raises(ValueError, match="leading axes must all be K"):
        masks_lib.num_concepts({"a": jnp.ones((2, 3), bool), "b": jnp.ones((3, 3), bool)})
