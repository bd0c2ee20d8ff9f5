"""The inverse of many small symmetric positive-definite blocks, from their Cholesky factors, in plain XLA."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Blocks taken at a time on CPU (at b = 64 in float32 a megabyte, which stays in a core's cache) and elsewhere.
SLICE, WIDE_SLICE = 64, 4096
# The platform that programs are traced for, where it is not the one that this process has.
_platform: str | None = None
# Blocks up to this size are eliminated, so many pivots at a time.
_ELIMINATED, _PIVOTS = 24, 2


@contextlib.contextmanager
def compiling_for(platform: str | None) -> Iterator[None]:
    """Cuts programs that are traced inside for this platform; where it is None, for the one that this process has."""
    global _platform
    before, _platform = _platform, platform
    try:
        yield
    finally:
        _platform = before


def is_for_cpu() -> bool:
    """Says whether what is traced now will run on a CPU."""
    return (_platform or jax.default_backend()) == "cpu"


def inverse(matrices: Float[Array, "N b b"]) -> Float[Array, "N b b"]:
    """Inverts symmetric positive-definite blocks in plain XLA, in cache-sized slices.

    A = L Lᵀ and A⁻¹ = L⁻ᵀ L⁻¹, with ones on the diagonal of A to start with. Larger blocks are taken by halves, whose
    Schur complements are products of small matrices; smaller ones are eliminated. Eliminating the pivots P, with
    A_PP = R Rᵀ, turns the rows below into A_i − A_iP R⁻ᵀ R⁻¹ A_P and those of P into R⁻¹ A_P, while the columns that
    are done with come to hold L⁻¹. With Rᵀ + R⁻¹ as the columns P of the right factor R⁻¹ A_P, and Rᵀ − I as the rows
    P of the left one, all of it is a single fused update.

    The error grows with the condition, where explicit inverses of the halves would make it grow with its square. A
    library call would run multi-threaded BLAS on each small block, whose speed depends on what else the machine does.

    >>> import jax.numpy as jnp
    >>> inverse(jnp.array([[[2.0, 0.0], [0.0, 4.0]]]))[0].round(6).tolist()
    [[0.5, 0.0], [0.0, 0.25]]
    """
    return map_slices(invert, matrices)


def root(blocks: Float[Array, "S b b"]) -> Float[Array, "S b b"]:
    """Computes L⁻¹ of symmetric positive-definite blocks A = L Lᵀ, so that A⁻¹ = L⁻ᵀ L⁻¹; NaN where there is none."""
    scaled, scale = _scaled(blocks)
    return _joined(_root_parts(scaled)) * scale[:, None, :]


def invert(blocks: Float[Array, "S b b"]) -> Float[Array, "S b b"]:
    """Computes A⁻¹ of a slice of blocks; see `inverse` for many."""
    lower = root(blocks)
    return product("ski,skj->sij", lower, lower)


def inverse_diagonal(blocks: Float[Array, "S b b"]) -> Float[Array, "S b"]:
    """Computes diag A⁻¹ alone: the sums of squares of the columns of L⁻¹."""
    scaled, scale = _scaled(blocks)
    sums = [jnp.sum(part**2, axis=1) for part in _root_parts(scaled)]
    return (sums[0] if len(sums) == 1 else jnp.concatenate([sums[0] + sums[1], sums[2]], axis=1)) * scale**2


def _scaled(blocks: Float[Array, "S b b"]) -> tuple[Float[Array, "S b b"], Float[Array, "S b"]]:
    """Scales blocks to ones on their diagonal, about as well conditioned as can be; returns the scale, too."""
    scale = jax.lax.rsqrt(jnp.diagonal(blocks, axis1=1, axis2=2))
    return blocks * scale[:, :, None] * scale[:, None, :], scale


def _root_parts(blocks: Float[Array, "S b b"]) -> list[Float[Array, "S i j"]]:
    """Computes L⁻¹ whole (small blocks), or its upper left, lower left and lower right part, by halves."""
    size = blocks.shape[-1]
    if size <= _ELIMINATED:
        # Blocks on the last axis, so that every step is a long vector operation.
        return [jnp.moveaxis(_eliminate(jnp.moveaxis(blocks, 0, -1)), -1, 0)]
    half = size // 2
    head, below, tail = blocks[:, :half, :half], blocks[:, half:, :half], blocks[:, half:, half:]
    first = _joined(_root_parts(head))
    factor = product("skj,sij->ski", below, first)
    second = _joined(_root_parts(tail - product("ski,sli->skl", factor, factor)))
    return [first, -product("sij,sjk->sik", second, product("ski,sij->skj", factor, first)), second]


def _joined(parts: list[Float[Array, "S i j"]]) -> Float[Array, "S b b"]:
    if len(parts) == 1:
        return parts[0]
    first, below, second = parts
    top = jnp.concatenate([first, jnp.zeros_like(jnp.swapaxes(below, 1, 2))], axis=2)
    return jnp.concatenate([top, jnp.concatenate([below, second], axis=2)], axis=1)


def _eliminate(work: Float[Array, "n n S"]) -> Float[Array, "n n S"]:
    """Computes L⁻¹ by Gaussian elimination of [A, I], `_PIVOTS` at a time and in place; see `inverse`."""
    size = work.shape[0]
    # Static pivots, since a traced one costs ten times as much on CPU.
    for start in range(0, size, _PIVOTS):
        own = slice(start, min(start + _PIVOTS, size))
        rows = work[own]
        factor, root, rows = jax.lax.optimization_barrier((*_factor(rows[:, own]), rows))
        solved = sum(root[:, k, None] * rows[k][None] for k in range(root.shape[0]))
        one = jnp.eye(root.shape[0], dtype=work.dtype)[:, :, None]
        lefts, rights = jax.lax.optimization_barrier(
            (solved.at[:, :start].set(0).at[:, own].set(factor - one), solved.at[:, own].set(factor + root))
        )
        for left, right in zip(lefts, rights, strict=True):
            work = work - left[:, None] * right[None]
        work = work.at[own, own].set(root)
    return work * jnp.tril(jnp.ones((size, size), work.dtype))[:, :, None]


def _factor(square: Float[Array, "p p S"]) -> tuple[Float[Array, "p p S"], Float[Array, "p p S"]]:
    """Computes Rᵀ and R⁻¹ of the pivots themselves, one by one; zero to the bit where they are triangular."""
    size = square.shape[0]
    unit = jnp.broadcast_to(jnp.eye(size, dtype=square.dtype)[:, :, None], square.shape)
    both = jnp.concatenate([square, unit], axis=1)
    for pivot in range(size):
        row = both[pivot] / jnp.sqrt(both[pivot, pivot])[None]
        left = row[:size].at[: pivot + 1].set(0)
        both = (both - left[:, None] * row[None]).at[pivot].set(row)
    return both[:, :size] * jnp.triu(jnp.ones((size, size), square.dtype))[:, :, None], both[:, size:]


def product(subscripts: str, *leaves: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes an einsum at full precision on every accelerator."""
    return jnp.einsum(subscripts, *leaves, precision=jax.lax.Precision.HIGHEST)


def map_slices(function: Callable[..., Float[Array, "S ..."]], *leaves: Float[Array, "N ..."]) -> Float[Array, "N ..."]:
    """Applies `function` to cache-sized slices of blocks, all of one size."""
    num = leaves[0].shape[0]
    width = min(SLICE if is_for_cpu() else WIDE_SLICE, num)
    count = -(-num // width)

    def of_slice(number: Int[Array, ""]) -> Float[Array, "S ..."]:
        first = jnp.minimum(number * width, num - width)
        return function(*(jax.lax.dynamic_slice_in_dim(leaf, first, width) for leaf in leaves))

    mapped = jax.lax.map(of_slice, jnp.arange(count))
    # The last slice begins where it still is a whole one.
    rest = mapped[-1, count * width - num :]
    return jnp.concatenate([mapped[:-1].reshape(-1, *mapped.shape[2:]), rest])
