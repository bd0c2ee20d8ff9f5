"""Pruning criteria: one function from a concept's weights and gradients to scores, lowest pruned first.

`woodfisher_scores` is the paper's; the others are its baselines, and any function of that shape takes its place. The
gradients are those of L_k at θ_k and may be iterated over several times; a criterion that needs none computes none.
"""

import functools
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsecbm_jax.config.run_config import PrunerConfig
from sparsecbm_jax.core.trees import add_power
from sparsecbm_jax.pruning import cholesky, patterns, woodfisher
from sparsecbm_jax.pruning.gradients import Kernels
from sparsecbm_jax.pruning.woodfisher_scores import ScoreReport, woodfisher_scores

Criterion = Callable[[Kernels, Iterable[Kernels]], Kernels]


def make_criterion(config: PrunerConfig, *, seed: int = 0, report: ScoreReport | None = None) -> Criterion:
    """Makes the criterion that `config.criterion` names; its scores are those of units of `config.pattern`.

    Args:
        config: how weights are scored.
        seed: of the criterion 'random'.
        report: filled with what the criterion did.

    Returns:
        A function (kernels, gradients) → scores of the kernels' shapes.
    """
    if config.criterion == "woodfisher":
        return functools.partial(woodfisher_scores, config=config, report=report)
    unit = patterns.unit_of(config.pattern, config.block_size)
    single = functools.partial(random_scores, seed=seed) if config.criterion == "random" else SCORES[config.criterion]
    return lambda kernels, gradients: patterns.spread(single(kernels, gradients), unit)


def magnitude_scores(kernels: Kernels, gradients: Iterable[Kernels]) -> Kernels:
    """Scores by |w|; no gradient is taken, since none is asked for."""
    return {path: jnp.abs(kernel) for path, kernel in kernels.items()}


def random_scores(kernels: Kernels, gradients: Iterable[Kernels], *, seed: int = 0) -> Kernels:
    """Scores by uniform noise, its own for every concept and kernel."""
    key = jax.random.fold_in(jax.random.key(seed), getattr(gradients, "concept", 0))
    return {
        path: jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path.encode())), kernel.shape)
        for path, kernel in kernels.items()
    }


def _mean(kernels: Kernels, gradients: Iterable[Kernels], power: int) -> dict[str, Array]:
    """Averages g or g² over the gradients."""
    total, count = {path: jnp.zeros_like(kernel) for path, kernel in kernels.items()}, 0
    for gradient in gradients:
        total, count = add_power(total, {path: gradient[path] for path in total}, power), count + 1
    if not count:
        raise ValueError("no gradients were given to score by")
    return {path: leaf / count for path, leaf in total.items()}


def snip_scores(kernels: Kernels, gradients: Iterable[Kernels]) -> Kernels:
    """Scores by |w · mean g|, what the loss would change by to first order.

    Reference: Lee et al. 2019 (SNIP).
    """
    mean = _mean(kernels, gradients, 1)
    return {path: jnp.abs(kernel * mean[path]) for path, kernel in kernels.items()}


def movement_scores(kernels: Kernels, gradients: Iterable[Kernels]) -> Kernels:
    """Scores by −w · mean g, how far descent would move a weight away from zero.

    Reference: Sanh et al. 2020.
    Deviation: their score is summed over training steps, this one over gradients at the weights as they are.
    """
    mean = _mean(kernels, gradients, 1)
    return {path: -kernel * mean[path] for path, kernel in kernels.items()}


def taylor_scores(kernels: Kernels, gradients: Iterable[Kernels]) -> Kernels:
    """Scores by the mean of (w g)² over the gradients.

    Reference: Molchanov et al. 2019.
    """
    mean = _mean(kernels, gradients, 2)
    return {path: kernel**2 * mean[path] for path, kernel in kernels.items()}


def diagonal_fisher_scores(kernels: Kernels, gradients: Iterable[Kernels]) -> Kernels:
    """Scores by ½ w² (mean g² + ζ), ζ a tenth of a kernel's mean: WoodFisher with blocks of one.

    Reference: Theis et al. 2018.
    """
    mean = _mean(kernels, gradients, 2)
    return {path: 0.5 * kernel**2 * (mean[path] + 0.1 * mean[path].mean()) for path, kernel in kernels.items()}


def combinatorial_scores(kernels: Kernels, gradients: Iterable[Kernels]) -> Kernels:
    """Scores by the diagonal Fisher: where criterion 'combinatorial' starts from; `pruning.swaps` has the rest.

    Raises:
        FloatingPointError: naming the kernel, if a gradient is NaN or Inf.
    """
    scores = diagonal_fisher_scores(kernels, gradients)
    for path, leaf in scores.items():
        if not bool(jnp.isfinite(leaf).all()):
            raise FloatingPointError(f"{path}: a gradient is NaN or Inf; no score can be made of that")
    return scores


def wanda_scores(kernels: Kernels, gradients: Any) -> Kernels:
    """Scores by |w_ij| ‖x_i‖₂, with the inputs x of the subnetwork; no gradient is taken.

    They compare within an output unit: config.sparsity.scope = 'per_row'.

    Reference: Sun et al. 2023 (Wanda).

    Args:
        kernels: θ_k on the maskable kernels.
        gradients: a `SubnetworkGradients`, of which only `input_norms` is called.
    """
    norms = gradients.input_norms()
    return {path: jnp.abs(kernel) * norms[path][..., None] for path, kernel in kernels.items()}


def m_fac_scores(kernels: Kernels, gradients: Iterable[Kernels]) -> Kernels:
    """Scores by ρ of single weights with all kernels as one block, by m × m algebra; ζ is a tenth of mean g².

    The m gradients stay in memory: 4·m bytes a weight.

    Reference: Frantar, Kurtic & Alistarh 2021 (M-FAC).
    """
    rows = list(gradients)
    if not rows:
        raise ValueError("no gradients were given to score by")
    stacks = {path: [gradient[path] for gradient in rows] for path in kernels}
    outer = functools.reduce(jnp.add, (_outer(leaves) for leaves in stacks.values()))
    size = sum(kernel.size for kernel in kernels.values())
    zeta = woodfisher.relative_damping(jnp.trace(outer), len(rows), 0.1, size)
    solver = cholesky.inverse((outer + len(rows) * zeta * jnp.eye(len(rows)))[None])[0]
    return {path: _one_block(kernel, stacks[path], solver, zeta) for path, kernel in kernels.items()}


@jax.jit
def _outer(gradients: list[Float[Array, "..."]]) -> Float[Array, "m m"]:
    flat = jnp.stack(gradients).reshape(len(gradients), -1)
    return jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _one_block(
    kernel: Float[Array, "..."],
    gradients: list[Float[Array, "..."]],
    solver: Float[Array, "m m"],
    zeta: Float[Array, ""],
) -> Float[Array, "..."]:
    stacked = jnp.stack(gradients)
    solved = jnp.tensordot(solver, stacked, 1, precision=jax.lax.Precision.HIGHEST)
    return kernel**2 * zeta / (2 * (1 - jnp.sum(stacked * solved, axis=0)))


SCORES: dict[str, Criterion] = {
    "magnitude": magnitude_scores,
    "snip": snip_scores,
    "movement": movement_scores,
    "taylor": taylor_scores,
    "diagonal_fisher": diagonal_fisher_scores,
    "combinatorial": combinatorial_scores,
    "wanda": wanda_scores,
    "m_fac": m_fac_scores,
}
