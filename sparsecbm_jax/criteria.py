"""Pruning criteria: one function from a concept's weights and gradients to scores, lowest pruned first.

`woodfisher_scores` is the paper's; the others are what it is compared with, and any function of that shape takes its
place. The gradients are those of L_k at θ_k and may be gone through several times; nobody who does not need them
computes any.
"""

import functools
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsecbm_jax import fisher, patterns, woodfisher
from sparsecbm_jax.config import PrunerConfig

Kernels = Mapping[str, Float[Array, "..."]]
Criterion = Callable[[Kernels, Iterable[Kernels]], Kernels]
# Filled with what a criterion did: its form, how many gradients, how large they were.
Report = dict[str, Any]

# Where no weight's mean g² reaches a tenth of ζ, F is ζ I but for little, and ρ is ½ ζ w² but for little.
_DEGENERATE = 0.1

logger = logging.getLogger(__name__)


def make_criterion(config: PrunerConfig, *, seed: int = 0, report: Report | None = None) -> Criterion:
    """The criterion that `config.criterion` names, its scores made those of units of `config.pattern`.

    Args:
      seed: of the criterion 'random'.
      report: filled with what the criterion did.
    """
    if config.criterion == "woodfisher":
        return functools.partial(woodfisher_scores, config=config, report=report)
    unit = patterns.unit_of(config.pattern, config.block_size)
    single = functools.partial(random_scores, seed=seed) if config.criterion == "random" else SCORES[config.criterion]
    return lambda kernels, gradients: patterns.spread(single(kernels, gradients), unit)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _scores_from_gram(
    kernel: Float[Array, "..."],
    grams: Float[Array, "N b b"],
    num_grads: Float[Array, ""],
    damping: Float[Array, ""],
    is_relative: bool,
    block_size: int,
    pattern: str,
) -> tuple[Float[Array, "N b"], Float[Array, " N"], Float[Array, ""], Float[Array, ""]]:
    """Scores in blocks, the blocks' errors, ζ and mean g²."""
    squares = jnp.trace(grams, axis1=1, axis2=2).sum()
    zeta, mean_square = _zeta(squares, num_grads, damping, is_relative, kernel.size)
    blocks, score = woodfisher.to_blocks(kernel, block_size), _score_fn(pattern, block_size)
    return *woodfisher.saliency(blocks, grams, num_grads, zeta, score), zeta, mean_square


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _scores_from_gradients(
    kernel: Float[Array, "..."],
    gradients: list[Float[Array, "..."]],
    damping: Float[Array, ""],
    is_relative: bool,
    block_size: int,
    pattern: str,
) -> tuple[Float[Array, "N b"], Float[Array, " N"], Float[Array, ""], Float[Array, ""]]:
    squares = sum((jnp.sum(gradient**2) for gradient in gradients), jnp.float32(0))
    zeta, mean_square = _zeta(squares, jnp.float32(len(gradients)), damping, is_relative, kernel.size)
    blocks, score = woodfisher.to_blocks(kernel, block_size), _score_fn(pattern, block_size)
    rows = fisher.stacked(gradients, block_size)
    return *woodfisher.dual_saliency(blocks, rows, zeta, score), zeta, mean_square


@functools.partial(jax.jit, static_argnums=(4, 5))
def _repaired(
    scores: Float[Array, "N b"],
    blocks: Float[Array, "F b"],
    rows: Float[Array, "F m b"],
    zeta: Float[Array, ""],
    block_size: int,
    pattern: str,
    which: Int[Array, " F"],
) -> Float[Array, "N b"]:
    fresh = woodfisher.qr_saliency(blocks, rows, zeta, _score_fn(pattern, block_size))
    return scores.at[which].set(fresh)


def _score_fn(pattern: str, block_size: int) -> woodfisher.ScoreFn | None:
    return None if pattern == patterns.SINGLE else patterns.scores_of(pattern, block_size)


def _zeta(
    squares: Float[Array, ""], num_grads: Float[Array, ""], damping: Float[Array, ""], is_relative: bool, size: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    mean_square = squares / (num_grads * size)
    return woodfisher.relative_damping(squares, num_grads, damping, size) if is_relative else damping, mean_square


def woodfisher_scores(
    kernels: Kernels, gradients: Iterable[Kernels], *, config: PrunerConfig, report: Report | None = None
) -> Kernels:
    """ρ_Q of every unit from the block-wise empirical Fisher (Eq. 11).

    ζ is relative to the mean over all layers of a kernel. With fewer gradients than a block has weights (m < b) the
    gradients are kept and m × m systems solved, at 4·m bytes a weight; else their outer products are summed, at 4·b.
    Blocks that float32 cannot invert either way are done again by QR, from a second pass over the gradients.

    Args:
      kernels: θ_k on the maskable kernels.
      gradients: ∇L_k; how many there really are is the m that divides.
      config: block size, damping and pattern.
      report: gets 'form', 'num_grads', 'qr_blocks' and, for every kernel, 'mean_square_over_damping'.

    Raises:
      FloatingPointError: naming the kernel, if a score is NaN, or none is finite: a gradient was NaN or Inf.
      ValueError: if there are no gradients, or a kernel's inputs do not divide into the pattern's groups.
    """
    is_relative, damping = config.damping_mode == "relative", jnp.float32(config.damping)
    size, pattern = config.block_size, config.pattern
    unit = patterns.unit_of(pattern, size)
    for path, kernel in kernels.items():
        patterns.to_groups(path, kernel, unit.group)
    form = woodfisher.form(config.num_grads, size)
    kept: list[Kernels] = []
    grams: dict[str, Float[Array, "N b b"]] = {}
    if form == "dual":
        kept = list(gradients)
        if not kept:
            raise ValueError("no gradients were given to estimate the Fisher from")
        num_grads = len(kept)
    else:
        grams, num_grads = fisher.accumulate(gradients, size)
    in_blocks: dict[str, Float[Array, "N b"]] = {}
    zetas, ratios = {}, {}
    doubtful: dict[str, Int[Array, " F"]] = {}
    for path, kernel in kernels.items():
        if form == "dual":
            own = [gradient[path] for gradient in kept]
            found = _scores_from_gradients(kernel, own, damping, is_relative, size, pattern)
        else:
            count = jnp.float32(num_grads)
            found = _scores_from_gram(kernel, grams.pop(path), count, damping, is_relative, size, pattern)
        in_blocks[path], error, zetas[path], mean_square = found
        if not bool(jnp.isfinite(mean_square)):
            raise FloatingPointError(f"{path}: {_first_bad(path, gradients)}; no score can be made of that")
        ratios[path] = float(mean_square / zetas[path])
        if bool(jnp.max(error) > woodfisher.LARGEST_ERROR):
            doubtful[path] = jnp.flatnonzero(error > woodfisher.LARGEST_ERROR)
    for path, rows in _rows_of(doubtful, kept or gradients, size).items():
        which = doubtful[path]
        blocks = woodfisher.to_blocks(kernels[path], size)[which]
        in_blocks[path] = _repaired(in_blocks[path], blocks, rows, zetas[path], size, pattern, which)
    scores = {path: woodfisher.from_blocks(blocks, kernels[path].shape) for path, blocks in in_blocks.items()}
    for path, leaf in scores.items():
        if bool(jnp.isnan(leaf).any()):
            raise FloatingPointError(
                f"the WoodFisher scores of {path} are not finite: damping ({config.damping_mode} {config.damping}) "
                "is too small for float32"
            )
    if not is_relative:
        _warn_where_degenerate(ratios, config.damping)
    if report is not None:
        report |= {
            "form": form,
            "num_grads": num_grads,
            "qr_blocks": {path: len(which) for path, which in doubtful.items()},
            "mean_square_over_damping": ratios,
        }
    return scores


def _first_bad(path: str, gradients: Iterable[Kernels]) -> str:
    """Which gradient is not finite, by going through them again."""
    for number, gradient in enumerate(gradients):
        if not bool(jnp.isfinite(gradient[path]).all()):
            return f"gradient {number} (counted from 0) is NaN or Inf"
    return "the squares of its gradients overflow float32"


def _rows_of(
    doubtful: Mapping[str, Int[Array, " F"]], gradients: Iterable[Kernels], block_size: int
) -> dict[str, Float[Array, "F m b"]]:
    """The gradients of some blocks."""
    if not doubtful:
        return {}
    rows: dict[str, list[Float[Array, "F b"]]] = {path: [] for path in doubtful}
    for gradient in gradients:
        for path, which in doubtful.items():
            rows[path].append(woodfisher.to_blocks(gradient[path], block_size)[which])
    return {path: jnp.stack(leaves, axis=1) for path, leaves in rows.items()}


def _warn_where_degenerate(ratios: Mapping[str, float], damping: float) -> None:
    weak = {path: ratio for path, ratio in ratios.items() if ratio < _DEGENERATE}
    if weak:
        shown = ", ".join(f"{path} {ratio:.1e}" for path, ratio in weak.items())
        logger.warning(
            "with pruner.damping = %g these scores are little but magnitude, since mean g² / ζ is %s: "
            "lower it, or set pruner.damping_mode to 'relative'",
            damping,
            shown,
        )


def magnitude_scores(kernels: Kernels, gradients: Iterable[Kernels]) -> Kernels:
    """|w|: no gradient is taken, since the stream is never read."""
    return {path: jnp.abs(kernel) for path, kernel in kernels.items()}


def random_scores(kernels: Kernels, gradients: Iterable[Kernels], *, seed: int = 0) -> Kernels:
    """Uniform noise, its own for every concept and kernel."""
    key = jax.random.fold_in(jax.random.key(seed), getattr(gradients, "concept", 0))
    return {
        path: jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path.encode())), kernel.shape)
        for path, kernel in kernels.items()
    }


def _mean(kernels: Kernels, gradients: Iterable[Kernels], power: int) -> dict[str, Array]:
    """Mean of g or of g² over the stream."""
    total, count = {path: jnp.zeros_like(kernel) for path, kernel in kernels.items()}, 0
    for gradient in gradients:
        total, count = _add_power(total, {path: gradient[path] for path in total}, power), count + 1
    if not count:
        raise ValueError("no gradients were given to score by")
    return {path: leaf / count for path, leaf in total.items()}


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _add_power(total: dict[str, Array], gradient: dict[str, Array], power: int) -> dict[str, Array]:
    return {path: leaf + gradient[path] ** power for path, leaf in total.items()}


def snip_scores(kernels: Kernels, gradients: Iterable[Kernels]) -> Kernels:
    """|w · mean g|: what the loss would change by, to first order. Reference: Lee et al. 2019 (SNIP)."""
    mean = _mean(kernels, gradients, 1)
    return {path: jnp.abs(kernel * mean[path]) for path, kernel in kernels.items()}


def movement_scores(kernels: Kernels, gradients: Iterable[Kernels]) -> Kernels:
    """−w · mean g: how far descent would move a weight away from zero. Reference: Sanh et al. 2020.

    Deviation: their score is summed over training steps, this one over gradients at the weights as they are.
    """
    mean = _mean(kernels, gradients, 1)
    return {path: -kernel * mean[path] for path, kernel in kernels.items()}


def taylor_scores(kernels: Kernels, gradients: Iterable[Kernels]) -> Kernels:
    """Mean of (w g)² over the gradients. Reference: Molchanov et al. 2019."""
    mean = _mean(kernels, gradients, 2)
    return {path: kernel**2 * mean[path] for path, kernel in kernels.items()}


def diagonal_fisher_scores(kernels: Kernels, gradients: Iterable[Kernels]) -> Kernels:
    """½ w² (mean g² + ζ), ζ a tenth of a kernel's mean: WoodFisher with blocks of one. Reference: Theis et al. 2018."""
    mean = _mean(kernels, gradients, 2)
    return {path: 0.5 * kernel**2 * (mean[path] + 0.1 * mean[path].mean()) for path, kernel in kernels.items()}


SCORES: dict[str, Criterion] = {
    "magnitude": magnitude_scores,
    "snip": snip_scores,
    "movement": movement_scores,
    "taylor": taylor_scores,
    "diagonal_fisher": diagonal_fisher_scores,
}
