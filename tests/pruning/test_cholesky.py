"""Inverses of many small blocks against dense float64 algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.pruning import cholesky

from tests.support.compiling import quick_jit

pytestmark = pytest.mark.well_compiled

INVERSE_TOLERANCE = 1e-5
# The error of diag A⁻¹ in units of float32's rounding times the condition, as `woodfisher.GRAM_ERROR` has it: measured
# up to 10, and 22 at b = 128, where explicit inverses of halves come to a million.
MOST_ROUNDINGS = 25


# Of the same shapes in both tests, so that one program does.
NUM_BLOCKS = 70
INVERSE = jax.jit(cholesky.inverse)
# Within half of their bound, whichever way they are compiled.
DIAGONAL = quick_jit(lambda blocks: cholesky.map_slices(cholesky.inverse_diagonal, blocks))
QUICK_INVERSE = quick_jit(cholesky.inverse)


@pytest.mark.parametrize(
    ("size", "num_blocks"), [(1, 70), (3, 1), (16, 70), (20, NUM_BLOCKS), (50, 1), (64, NUM_BLOCKS)]
)
def test_inverse_equals_dense_float64(size: int, num_blocks: int) -> None:
    rng = np.random.default_rng(size)
    gradients = rng.normal(size=(num_blocks, 2 * size, size)) * np.exp(rng.normal(size=(num_blocks, 1, size)))
    blocks = 0.1 * np.eye(size) + np.swapaxes(gradients, 1, 2) @ gradients / (2 * size)
    invert = INVERSE if size in (20, 64) else QUICK_INVERSE
    got = np.asarray(invert(jnp.asarray(blocks, jnp.float32)), np.float64)
    expected = np.linalg.inv(blocks)
    scale = np.abs(expected).max(axis=(1, 2), keepdims=True)
    np.testing.assert_array_less(np.abs(got - expected) / scale, INVERSE_TOLERANCE)


@pytest.mark.parametrize("size", [20, 64, 128])
def test_the_error_grows_with_the_condition_and_not_its_square(size: int) -> None:
    rng = np.random.default_rng(size)
    num = NUM_BLOCKS
    # A few gradients that are much larger than the others, and alike.
    gradients = rng.normal(size=(num, 12, 3)) @ rng.normal(size=(num, 3, size)) + 0.1 * rng.normal(size=(num, 12, size))
    gradients *= np.exp(2 * rng.normal(size=(num, 12, 1)))
    blocks = 0.1 * np.eye(size) + np.swapaxes(gradients, 1, 2) @ gradients / 12
    blocks = blocks.astype(np.float32).astype(np.float64)
    exact = np.diagonal(np.linalg.inv(blocks), axis1=1, axis2=2)
    condition = (np.diagonal(blocks, axis1=1, axis2=2) * exact).max(axis=1)
    within = condition < 1e4  # float32 has no digits left at 1e7
    assert np.median(condition) > 1e3 and within.mean() > 0.4
    leaves = jnp.asarray(blocks, jnp.float32)
    diagonals = {"diagonal": DIAGONAL(leaves)}
    if size < 128:  # where its program takes half a minute to compile, and holds the same factor
        diagonals["inverse"] = jnp.diagonal(INVERSE(leaves), axis1=1, axis2=2)
    for name, got in diagonals.items():
        error = np.abs(np.asarray(got) / exact - 1).max(axis=1)
        assert (error / (np.finfo(np.float32).eps / 2 * condition))[within].max() < MOST_ROUNDINGS, name


def test_what_is_not_positive_definite_has_no_inverse() -> None:
    blocks = jnp.asarray([[[1.0, 2.0], [2.0, 1.0]], [[2.0, 0.0], [0.0, 4.0]]])
    got = QUICK_INVERSE(blocks)
    assert jnp.isnan(got[0]).any()
    np.testing.assert_allclose(got[1], [[0.5, 0.0], [0.0, 0.25]], rtol=1e-6)
