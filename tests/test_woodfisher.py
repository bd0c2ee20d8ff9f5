"""Block-wise WoodFisher against dense float64 algebra and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax import cholesky, woodfisher

INVERSE_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-9


def random_fisher(rng: np.random.Generator, size: int, num_grads: int, damping: float) -> np.ndarray:
    gradients = rng.normal(size=(num_grads, size)) * np.exp(rng.normal(size=size))
    return damping * np.eye(size) + gradients.T @ gradients / num_grads


@pytest.mark.parametrize("shape", [(6, 4), (7, 4), (2, 8, 3), (2, 5, 3)])
def test_blocks_are_consecutive_inputs_of_one_output(shape: tuple[int, ...]) -> None:
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    blocks = woodfisher.to_blocks(kernel, 4)
    np.testing.assert_array_equal(woodfisher.from_blocks(blocks, shape), kernel)
    first = kernel[0] if len(shape) == 3 else kernel
    np.testing.assert_array_equal(blocks[0], first[:4, 0])


def test_padding_changes_no_real_score() -> None:
    rng = np.random.default_rng(1)
    kernel, gradients = rng.normal(size=(5, 2)), rng.normal(size=(9, 5, 2))
    blocks = jnp.stack([woodfisher.to_blocks(jnp.asarray(g, jnp.float32), 4) for g in gradients], axis=1)
    weights = woodfisher.to_blocks(jnp.asarray(kernel, jnp.float32), 4)
    scores = woodfisher.from_blocks(woodfisher.saliency(weights, woodfisher.gram(blocks), 9, 0.2)[0], (5, 2))
    for output in range(2):
        for group in (slice(0, 4), slice(4, 5)):
            g = gradients[:, group, output]
            inverse = np.linalg.inv(0.2 * np.eye(g.shape[1]) + g.T @ g / 9)
            expected = kernel[group, output] ** 2 / (2 * np.diag(inverse))
            np.testing.assert_allclose(scores[group, output], expected, rtol=INVERSE_TOLERANCE)


def test_scores_are_the_brute_force_loss_increase() -> None:
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        for _ in range(100):
            size = int(rng.choice([3, 5]))  # few shapes, so that few programs are compiled
            fisher, weights = random_fisher(rng, size, 3 * size, 0.05), rng.normal(size=size)
            inverse = cholesky.inverse(jnp.asarray(fisher)[None])[0]
            group = rng.choice(size, rng.integers(1, 4), replace=False)
            rest = np.setdiff1d(np.arange(size), group)
            # The best the others can do about w_Q → 0 on the quadratic ½ δᵀ F δ.
            delta = np.zeros(size)
            delta[group] = -weights[group]
            delta[rest] = -np.linalg.solve(fisher[np.ix_(rest, rest)], fisher[np.ix_(rest, group)] @ delta[group])
            increase = 0.5 * delta @ fisher @ delta
            score = woodfisher.group_score(jnp.asarray(weights), inverse, group)
            np.testing.assert_allclose(score, increase, rtol=FLOAT64_TOLERANCE)
            update = woodfisher.optimal_update(jnp.asarray(weights), inverse, group)
            np.testing.assert_allclose(update, delta, rtol=1e-7, atol=FLOAT64_TOLERANCE)


def test_any_number_of_weights_moves_as_one_group_does() -> None:
    rng = np.random.default_rng(11)
    num, size, num_grads, damping = 100, 6, 9, 0.2
    with jax.enable_x64(True):
        gradients, weights = rng.normal(size=(num, num_grads, size)), rng.normal(size=(num, size))
        kept = rng.random((num, size)) < 0.5
        kept[0], kept[1] = True, False
        grams = woodfisher.gram(jnp.asarray(gradients))
        got, _ = woodfisher.joint_update(jnp.asarray(weights), jnp.asarray(kept), grams, num_grads, damping)
        for block in range(num):
            fisher = damping * np.eye(size) + gradients[block].T @ gradients[block] / num_grads
            inverse, gone = jnp.asarray(np.linalg.inv(fisher)), np.flatnonzero(~kept[block])
            update = woodfisher.optimal_update(jnp.asarray(weights[block]), inverse, gone)
            np.testing.assert_allclose(got[block], weights[block] + np.asarray(update), atol=1e-9)
            # The conditions of Eq. 9's optimum: w_Q is zero, and the gradient vanishes at all that stays.
            assert not np.asarray(got[block])[gone].any()
            slope = fisher @ (np.asarray(got[block]) - weights[block])
            np.testing.assert_allclose(slope[kept[block]], 0, atol=1e-9)


def test_single_scores_are_groups_of_one() -> None:
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        fisher, weights = random_fisher(rng, 5, 12, 0.1), rng.normal(size=5)
        inverse = cholesky.inverse(jnp.asarray(fisher)[None])
        singles = woodfisher.single_scores(jnp.asarray(weights)[None], inverse)[0]
        groups = [woodfisher.group_score(jnp.asarray(weights), inverse[0], [i]) for i in range(5)]
        np.testing.assert_allclose(singles, groups, rtol=FLOAT64_TOLERANCE)


def test_joint_update_is_not_the_sum_of_single_ones() -> None:
    rng = np.random.default_rng(4)
    fisher, weights = random_fisher(rng, 6, 18, 0.01), rng.normal(size=6)
    inverse = cholesky.inverse(jnp.asarray(fisher, jnp.float32)[None])[0]
    weights32 = jnp.asarray(weights, jnp.float32)
    joint = woodfisher.optimal_update(weights32, inverse, [0, 3])
    summed = sum(woodfisher.optimal_update(weights32, inverse, [i]) for i in (0, 3))
    assert float(jnp.abs(joint - summed).max()) > 1e-2


def test_bounds_and_monotony() -> None:
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        for _ in range(50):
            fisher, weights, damping = random_fisher(rng, 6, 4, 0.3), rng.normal(size=6), 0.3
            inverse = cholesky.inverse(jnp.asarray(fisher)[None])[0]
            previous = 0.0
            for size in range(1, 7):
                group = np.arange(size)
                score = float(woodfisher.group_score(jnp.asarray(weights), inverse, group))
                low = 0.5 * damping * weights[group] @ weights[group]
                high = 0.5 * weights[group] @ fisher[np.ix_(group, group)] @ weights[group]
                assert low * (1 - 1e-9) <= score <= high * (1 + 1e-9)
                assert score >= previous * (1 - 1e-9)
                previous = score


def test_gradient_order_sign_and_scale() -> None:
    rng = np.random.default_rng(6)
    gradients = jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)

    def scores(g: jax.Array, damping: float) -> jax.Array:
        return woodfisher.saliency(weights, woodfisher.gram(g), g.shape[1], damping)[0]

    base = scores(gradients, 0.1)
    np.testing.assert_allclose(scores(gradients[:, ::-1], 0.1), base, rtol=1e-5)
    np.testing.assert_allclose(scores(-gradients, 0.1), base, rtol=1e-5)
    np.testing.assert_allclose(scores(jnp.concatenate([gradients] * 2, axis=1), 0.1), base, rtol=1e-5)
    np.testing.assert_allclose(scores(3 * gradients, 0.9), 9 * base, rtol=1e-5)


def test_zero_gradients_score_by_magnitude() -> None:
    weights = jnp.asarray([[1.0, -2.0, 0.0]])
    scores, _ = woodfisher.saliency(weights, jnp.zeros((1, 3, 3)), 5, 0.5)
    np.testing.assert_allclose(scores, 0.25 * weights**2, rtol=1e-6)
    relative = woodfisher.relative_damping(jnp.float32(0), 5, 0.1, 3)
    assert float(relative) > 0


def test_nan_gradient_poisons_its_block_only() -> None:
    gradients = np.random.default_rng(7).normal(size=(2, 4, 3)).astype(np.float32)
    gradients[0, 1, 2] = np.nan
    scores, _ = woodfisher.saliency(jnp.ones((2, 3)), woodfisher.gram(jnp.asarray(gradients)), 4, 0.1)
    assert jnp.isnan(scores[0]).any()
    assert jnp.isfinite(scores[1]).all()


def test_relative_damping_is_a_share_of_the_mean_square() -> None:
    assert float(woodfisher.relative_damping(jnp.float32(6.0), 2, 0.1, 3)) == pytest.approx(0.1)


@pytest.mark.parametrize(("num_grads", "size"), [(1, 8), (5, 8), (20, 64)])
def test_dual_form_equals_the_gram_form(num_grads: int, size: int) -> None:
    rng = np.random.default_rng(num_grads)
    gradients = jnp.asarray(rng.normal(size=(70, num_grads, size)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(70, size)), jnp.float32)
    gram_form, _ = woodfisher.saliency(weights, woodfisher.gram(gradients), num_grads, 0.1)
    dual_form, _ = dual_saliency(weights, gradients, 0.1)
    np.testing.assert_allclose(dual_form, gram_form, rtol=1e-4)


def dual_saliency(weights: jax.Array, gradients: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """Of blocks, as the columns of a kernel."""
    size = weights.shape[1]
    return woodfisher.dual_saliency(weights.T, [g.T for g in jnp.moveaxis(gradients, 1, 0)], damping, size)


@pytest.mark.parametrize("shape", [(8, 3), (11, 40), (4, 16)])
def test_outer_products_add_up_in_tiles(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(10)
    gradients = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(5)]
    blocks = jnp.stack([woodfisher.to_blocks(g, 4) for g in gradients], axis=1)
    start = jnp.ones((blocks.shape[0], 4, 4))
    np.testing.assert_allclose(woodfisher.add_gram(start, gradients), 1 + woodfisher.gram(blocks), rtol=1e-5)
    weights = gradients[0]
    expected = dual_saliency(woodfisher.to_blocks(weights, 4), blocks, 0.1)
    tiled = woodfisher.dual_saliency(weights, gradients, 0.1, 4)
    for got, wanted in zip(tiled, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4)


def diagonal_of_the_inverse(gradients: np.ndarray, damping: float) -> np.ndarray:
    """diag F⁻¹ of every block in float64."""
    fisher = np.einsum("nmb,nmc->nbc", gradients, gradients) / gradients.shape[1]
    return np.diagonal(np.linalg.inv(fisher + damping * np.eye(gradients.shape[-1])), axis1=1, axis2=2)


@pytest.mark.parametrize("rank", [None, 5], ids=["independent", "rank 5"])
@pytest.mark.parametrize("num_grads", [20, 128, 1024])
def test_float32_is_right_or_says_that_it_is_not(num_grads: int, rank: int | None) -> None:
    rng = np.random.default_rng(num_grads)
    num, size, damping = 16, 64, 1e-7
    if rank is None:
        base = rng.normal(size=(num, num_grads, size))
    else:
        base = rng.normal(size=(num, num_grads, rank)) @ rng.normal(size=(num, rank, size)) / np.sqrt(rank)
    # Units as different as in a trained network, too.
    gradients = np.concatenate([rms * base for rms in (1e-6, 1e-4, 1e-2, 1.0)]).astype(np.float32)
    gradients[1::4] *= np.exp(rng.normal(size=(num, 1, size)))
    exact = diagonal_of_the_inverse(gradients.astype(np.float64), damping)
    ones = jnp.ones(exact.shape, jnp.float32)
    if woodfisher.form(num_grads, size) == "dual":
        scores, estimates = dual_saliency(ones, jnp.asarray(gradients), damping)
    else:
        scores, estimates = woodfisher.saliency(ones, woodfisher.gram(jnp.asarray(gradients)), num_grads, damping)
    errors, is_trusted = np.abs(2 * exact * np.asarray(scores) - 1).max(axis=1), estimates <= woodfisher.LARGEST_ERROR
    assert errors[is_trusted].max() < woodfisher.LARGEST_ERROR
    assert is_trusted[: 2 * num].all(), "small gradients are no reason for doubt"
    assert (rank is None and num_grads > size) or not is_trusted.all()
    by_qr = np.asarray(woodfisher.qr_saliency(ones, jnp.asarray(gradients), damping))
    assert (by_qr > 0).all() and np.abs(2 * exact * by_qr - 1).max() < woodfisher.LARGEST_ERROR


def test_qr_inverse_is_the_whole_inverse() -> None:
    rng = np.random.default_rng(9)
    gradients = rng.normal(size=(5, 12, 8))
    fisher = np.einsum("nmb,nmc->nbc", gradients, gradients) / 12 + 0.3 * np.eye(8)
    inverses = [
        np.asarray(f(jnp.asarray(gradients, jnp.float32), 0.3))
        for f in (woodfisher.qr_inverse, woodfisher.dual_inverse)
    ]
    for got in inverses:
        np.testing.assert_allclose(got, np.linalg.inv(fisher), atol=1e-5)


def test_all_pairs_of_a_small_block_against_the_schur_complement() -> None:
    rng = np.random.default_rng(8)
    with jax.enable_x64(True):
        fisher, weights = random_fisher(rng, 5, 9, 0.2), rng.normal(size=5)
        inverse = cholesky.inverse(jnp.asarray(fisher)[None])[0]
        for pair in itertools.combinations(range(5), 2):
            group, rest = list(pair), [i for i in range(5) if i not in pair]
            coupling = fisher[np.ix_(group, rest)]
            schur = fisher[np.ix_(group, group)] - coupling @ np.linalg.solve(fisher[np.ix_(rest, rest)], coupling.T)
            expected = 0.5 * weights[group] @ schur @ weights[group]
            score = woodfisher.group_score(jnp.asarray(weights), inverse, group)
            np.testing.assert_allclose(score, expected, rtol=FLOAT64_TOLERANCE)


def test_bad_block_size_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size is 0"):
        woodfisher.to_blocks(jnp.ones((2, 2)), 0)
