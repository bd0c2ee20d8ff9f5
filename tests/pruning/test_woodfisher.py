"""Block-wise WoodFisher against dense float64 algebra and brute force."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.pruning import cholesky, patterns, woodfisher

from tests.support import numpy_woodfisher
from tests.support.compiling import quick_jit

pytestmark = [pytest.mark.well_compiled, pytest.mark.strict_rank]

INVERSE_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-9
NUM_PROBLEMS = 100

# Compiled once for each shape, as in the library; without `jit` a loop is compiled again in every call.
inverse = quick_jit(cholesky.inverse)
gram = quick_jit(woodfisher.gram)
saliency = quick_jit(woodfisher.saliency, static_argnums=4)
scores_of_groups = quick_jit(patterns.group_scores, static_argnums=2)
joint_update = quick_jit(woodfisher.joint_update)
dual_saliency = quick_jit(woodfisher.dual_saliency, static_argnums=(3, 4))
qr_saliency = quick_jit(woodfisher.qr_saliency, static_argnums=3)
add_gram = quick_jit(woodfisher.add_gram)


def random_fisher(rng: np.random.Generator, size: int, num_grads: int, damping: float) -> np.ndarray:
    gradients = rng.normal(size=(num_grads, size)) * np.exp(rng.normal(size=size))
    return damping * np.eye(size) + gradients.T @ gradients / num_grads


@pytest.mark.parametrize("shape", [(6, 4), (7, 4), (2, 8, 3), (2, 5, 3)])
def test_blocks_are_consecutive_inputs_of_one_output(shape: tuple[int, ...]) -> None:
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    blocks = woodfisher.to_blocks(kernel, 4)
    np.testing.assert_array_equal(numpy_woodfisher.from_blocks(blocks, shape), kernel)
    first = kernel[0] if len(shape) == 3 else kernel
    np.testing.assert_array_equal(blocks[0], first[:4, 0])


def test_padding_changes_no_real_score() -> None:
    rng = np.random.default_rng(1)
    kernel, gradients = rng.normal(size=(5, 2)), rng.normal(size=(9, 5, 2))
    blocks = jnp.stack([woodfisher.to_blocks(jnp.asarray(g, jnp.float32), 4) for g in gradients], axis=1)
    weights = woodfisher.to_blocks(jnp.asarray(kernel, jnp.float32), 4)
    scores = numpy_woodfisher.from_blocks(saliency(weights, gram(blocks), 9, 0.2)[0], (5, 2))
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
            size, num_removed = ((3, 1), (3, 3), (6, 1), (6, 2), (6, 3))[rng.integers(5)]  # few shapes to compile
            fisher, weights = random_fisher(rng, size, 3 * size, 0.05), rng.normal(size=size)
            group = rng.choice(size, num_removed, replace=False)
            # The best the others can do about w_Q → 0 on the quadratic ½ δᵀ F δ.
            increase = numpy_woodfisher.loss_increase(weights, fisher, group)
            score = group_scores(weights[None], fisher[None], group)
            np.testing.assert_allclose(score, increase, rtol=FLOAT64_TOLERANCE)
            delta = numpy_woodfisher.optimal_update(weights, fisher, group)
            np.testing.assert_allclose(updates(weights[None], fisher[None], group)[0], delta, rtol=1e-7, atol=1e-9)


def test_any_number_of_weights_moves_as_one_group_does() -> None:
    rng = np.random.default_rng(11)
    num, size, num_grads, damping = 100, 6, 9, 0.2
    with jax.enable_x64(True):
        gradients, weights = rng.normal(size=(num, num_grads, size)), rng.normal(size=(num, size))
        kept = rng.random((num, size)) < 0.5
        kept[0], kept[1] = True, False
        grams = gram(jnp.asarray(gradients))
        got, _ = joint_update(jnp.asarray(weights), jnp.asarray(kept), grams, num_grads, damping)
        for block in range(num):
            fisher = damping * np.eye(size) + gradients[block].T @ gradients[block] / num_grads
            gone = np.flatnonzero(~kept[block])
            update = numpy_woodfisher.optimal_update(weights[block], fisher, gone)
            np.testing.assert_allclose(got[block], weights[block] + update, atol=1e-9)
            # The conditions of Eq. 9's optimum: w_Q is zero, and the gradient vanishes at all that stays.
            assert not np.asarray(got[block])[gone].any()
            slope = fisher @ (np.asarray(got[block]) - weights[block])
            np.testing.assert_allclose(slope[kept[block]], 0, atol=1e-9)


def problems(seed: int, size: int, num_grads: int, damping: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, gradients and Fisher of NUM_PROBLEMS blocks, in float64."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(NUM_PROBLEMS, num_grads, size)) * np.exp(rng.normal(size=(NUM_PROBLEMS, 1, size)))
    fisher = damping * np.eye(size) + np.swapaxes(gradients, 1, 2) @ gradients / num_grads
    return rng.normal(size=(NUM_PROBLEMS, size)), gradients, fisher


def group_scores(weights: np.ndarray, fisher: np.ndarray, group: Sequence[int] | np.ndarray) -> np.ndarray:
    """ρ_Q of every problem, with the weights so ordered that Q comes first; |Q| divides their number."""
    order = np.concatenate([group, np.setdiff1d(np.arange(weights.shape[1]), group)]).astype(int)
    inverses = inverse(jnp.asarray(fisher[:, order][:, :, order]))
    shared = scores_of_groups(jnp.asarray(weights[:, order]), inverses, len(group))
    return len(group) * np.asarray(shared)[:, 0]


def updates(weights: np.ndarray, fisher: np.ndarray, group: Sequence[int] | np.ndarray) -> np.ndarray:
    """δ of every problem whose weights Q go."""
    kept = np.ones(weights.shape, bool)
    kept[:, np.asarray(group)] = False
    moved, _ = joint_update(jnp.asarray(weights), jnp.asarray(kept), jnp.asarray(fisher), 1, 0.0)
    return np.asarray(moved) - weights


def test_single_scores_are_groups_of_one() -> None:
    with jax.enable_x64(True):
        weights, _, fisher = problems(3, size=5, num_grads=12, damping=0.1)
        singles = woodfisher.single_scores(jnp.asarray(weights), inverse(jnp.asarray(fisher)))
        for i in range(5):
            np.testing.assert_allclose(singles[:, i], group_scores(weights, fisher, [i]), rtol=FLOAT64_TOLERANCE)
            expected = [numpy_woodfisher.loss_increase(w, f, [i]) for w, f in zip(weights, fisher, strict=True)]
            np.testing.assert_allclose(singles[:, i], expected, rtol=FLOAT64_TOLERANCE)


def test_joint_update_is_not_the_sum_of_single_ones() -> None:
    with jax.enable_x64(True):
        weights, _, fisher = problems(4, size=6, num_grads=18, damping=0.01)
        of_both, of_first, of_second = (updates(weights, fisher, group) for group in ([0, 3], [0], [3]))
        differences = np.abs(of_both - of_first - of_second).max(axis=1)
        assert float(differences.min()) > 1e-4 and float(np.median(differences)) > 1e-1


def test_bounds_and_monotony() -> None:
    damping = 0.3
    with jax.enable_x64(True):
        weights, _, fisher = problems(5, size=12, num_grads=8, damping=damping)
        previous = np.zeros(NUM_PROBLEMS)
        for size in (1, 2, 3, 4, 6, 12):
            group = list(range(size))
            scores, chosen = group_scores(weights, fisher, group), weights[:, group]
            low = 0.5 * damping * np.sum(chosen**2, axis=1)
            high = 0.5 * np.einsum("ni,nij,nj->n", chosen, fisher[:, :size, :size], chosen)
            assert (low * (1 - 1e-9) <= scores).all() and (scores <= high * (1 + 1e-9)).all()
            assert (scores >= previous * (1 - 1e-9)).all()
            previous = scores


def test_gradient_order_sign_and_scale() -> None:
    with jax.enable_x64(True):
        weights, g, _ = problems(6, size=4, num_grads=8, damping=0.1)

        def scores(gradients: np.ndarray, damping: float) -> np.ndarray:
            blocks = jnp.asarray(gradients)
            found, _ = saliency(jnp.asarray(weights), gram(blocks), blocks.shape[1], damping)
            return np.asarray(found)

        base = scores(g, 0.1)
        for name, same in {
            "order": scores(g[:, ::-1], 0.1),
            "sign": scores(-g, 0.1),
            "duplication": scores(np.concatenate([g] * 2, axis=1), 0.1),
            "scale": scores(3 * g, 0.9) / 9,
        }.items():
            np.testing.assert_allclose(same, base, rtol=FLOAT64_TOLERANCE, err_msg=name)


def test_zero_gradients_score_by_magnitude() -> None:
    with jax.enable_x64(True):
        weights, g, _ = problems(7, size=3, num_grads=5, damping=0.5)
        scores, _ = saliency(jnp.asarray(weights), gram(jnp.asarray(0 * g)), 5, 0.5)
        np.testing.assert_allclose(scores, 0.25 * weights**2, rtol=FLOAT64_TOLERANCE)
    relative = woodfisher.relative_damping(jnp.float32(0), 5, 0.1, 3)
    assert float(relative) > 0


def test_nan_gradient_poisons_its_block_only() -> None:
    gradients = np.random.default_rng(7).normal(size=(2, 4, 3)).astype(np.float32)
    gradients[0, 1, 2] = np.nan
    scores, _ = saliency(jnp.ones((2, 3)), gram(jnp.asarray(gradients)), 4, 0.1)
    assert jnp.isnan(scores[0]).any()
    assert jnp.isfinite(scores[1]).all()


def test_relative_damping_is_a_share_of_the_mean_square() -> None:
    assert float(woodfisher.relative_damping(jnp.float32(6.0), 2, 0.1, 3)) == pytest.approx(0.1)


@pytest.mark.parametrize(("num_grads", "size"), [(1, 8), (5, 8), (20, 36)])
def test_dual_form_equals_the_gram_form(num_grads: int, size: int) -> None:
    rng = np.random.default_rng(num_grads)
    gradients = jnp.asarray(rng.normal(size=(70, num_grads, size)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(70, size)), jnp.float32)
    gram_form, _ = saliency(weights, gram(gradients), num_grads, 0.1)
    dual_form, _ = dual_saliency(*of_kernel(weights, gradients), 0.1, size)
    np.testing.assert_allclose(dual_form, gram_form, rtol=1e-4)


def of_kernel(weights: jax.Array, gradients: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Blocks as the columns of a kernel, and their gradients as a list."""
    return weights.T, [gradient.T for gradient in jnp.moveaxis(gradients, 1, 0)]


@pytest.mark.parametrize("shape", [(8, 3), (11, 40), (4, 16)])
def test_outer_products_add_up_in_tiles(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(10)
    gradients = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(5)]
    blocks = jnp.stack([woodfisher.to_blocks(g, 4) for g in gradients], axis=1)
    start = jnp.ones((blocks.shape[0], 4, 4))
    np.testing.assert_allclose(add_gram(start, gradients), 1 + gram(blocks), rtol=1e-5)
    weights = gradients[0]
    expected = dual_saliency(*of_kernel(woodfisher.to_blocks(weights, 4), blocks), 0.1, 4)
    tiled = dual_saliency(weights, gradients, 0.1, 4)
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
        dual = jax.jit(woodfisher.dual_saliency, static_argnums=3)
        scores, estimates = dual(*of_kernel(ones, jnp.asarray(gradients)), damping, size)
    else:
        grams = jax.jit(woodfisher.gram)(jnp.asarray(gradients))
        scores, estimates = jax.jit(woodfisher.saliency)(ones, grams, num_grads, damping)
    errors, is_trusted = np.abs(2 * exact * np.asarray(scores) - 1).max(axis=1), estimates <= woodfisher.LARGEST_ERROR
    assert errors[is_trusted].max() < woodfisher.LARGEST_ERROR
    assert is_trusted[: 2 * num].all(), "small gradients are no reason for doubt"
    assert (rank is None and num_grads > size) or not is_trusted.all()
    by_qr = np.asarray(jax.jit(woodfisher.qr_saliency)(ones, jnp.asarray(gradients), damping))
    assert (by_qr > 0).all() and np.abs(2 * exact * by_qr - 1).max() < woodfisher.LARGEST_ERROR


@pytest.mark.parametrize(("num_grads", "size"), [(3, 8), (12, 8), (28, 26)])
def test_the_three_forms_are_numpys_inverse(num_grads: int, size: int) -> None:
    with jax.enable_x64(True):
        _, gradients, fisher = problems(9, size, num_grads, damping=0.3)
        leaves, expected = jnp.asarray(gradients), np.linalg.inv(fisher)
        grams = gram(leaves)
        for column, unit in enumerate(np.eye(size)):
            units = jnp.asarray(np.broadcast_to(unit, (NUM_PROBLEMS, size)))
            forms = {
                "gram": saliency(units, grams, num_grads, 0.3, column_of_inverse)[0],
                "dual": dual_saliency(*of_kernel(units, leaves), 0.3, size, column_of_inverse)[0],
                "qr": qr_saliency(units, leaves, 0.3, column_of_inverse),
            }
            for name, got in forms.items():
                wanted = expected[:, :, column]
                np.testing.assert_allclose(got, wanted, rtol=1e-7, atol=FLOAT64_TOLERANCE, err_msg=name)


def column_of_inverse(weights: jax.Array, inverses: jax.Array) -> jax.Array:
    """In place of scores, F⁻¹ times the weights: of unit vectors, its columns."""
    return jnp.einsum("sbc,sc->sb", inverses, weights)


def test_all_pairs_of_a_small_block_against_the_schur_complement() -> None:
    with jax.enable_x64(True):
        weights, _, fisher = problems(8, size=6, num_grads=9, damping=0.2)
        for pair in itertools.combinations(range(6), 2):
            group, rest = list(pair), [i for i in range(6) if i not in pair]
            coupling = fisher[:, group][:, :, rest]
            solved = np.linalg.solve(fisher[:, rest][:, :, rest], np.swapaxes(coupling, 1, 2))
            schur = fisher[:, group][:, :, group] - coupling @ solved
            expected = 0.5 * np.einsum("ni,nij,nj->n", weights[:, group], schur, weights[:, group])
            np.testing.assert_allclose(group_scores(weights, fisher, group), expected, rtol=1e-8)


def test_bad_block_size_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size is 0"):
        woodfisher.to_blocks(jnp.ones((2, 2)), 0)


def test_damping_is_of_kernels_of_any_size() -> None:
    """Four billion squares: their number does not fit 32 bits."""
    found = woodfisher.relative_damping(jnp.float32(2.0**32), 128, 0.1, 2**25)
    np.testing.assert_allclose(found, 0.1)
