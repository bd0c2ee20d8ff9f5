"""Scores of a whole subnetwork by block-wise WoodFisher: piece by piece within a stated memory, on one device or many.

`woodfisher` has the algebra of blocks and `fisher` the sums over gradients; here a form of the inverse is chosen for
every block and checked: where float32 does badly, another form takes its place.
"""

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.config.run_config import PrunerConfig
from sparsecbm_jax.core import sharding
from sparsecbm_jax.pruning import cholesky, fisher, patterns, woodfisher
from sparsecbm_jax.pruning.fisher import Piece
from sparsecbm_jax.pruning.gradients import Kernels

# Filled with what a criterion did: its form, how many gradients, how large they were.
ScoreReport = dict[str, Any]

# Where no weight's mean g² reaches a tenth of ζ, F is ζ I but for little, and ρ is ½ ζ w² but for little.
_DEGENERATE = 0.1
# Another pass over the gradients is for blocks whose estimated error is beyond this: the true ones are a third of it,
# and with m gradients the Fisher itself is uncertain by √(2/m). Where the gradients are kept, LARGEST_ERROR counts.
_WORTH_A_PASS = 1e-2
# What the gradients of blocks that are scored again may take, where no limit is set.
_REPAIR_MEMORY = 2**30

logger = logging.getLogger(__name__)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def score_grams(
    kernel: Float[Array, "inputs U"],
    grams: Float[Array, "I U b b"],
    num_grads: Float[Array, ""],
    zeta: Float[Array, ""],
    block_size: int,
    pattern: str,
    mesh: Mesh | None,
) -> tuple[Float[Array, "I U b"], Float[Array, "I U"]]:
    """Scores the blocks of a piece from their summed outer products, and estimates their errors."""

    def score(kernel: Array, grams: Array, num_grads: Array, zeta: Array) -> tuple[Array, Array]:
        blocks = woodfisher.to_blocks(kernel, block_size)
        by_block = grams.reshape(-1, *grams.shape[2:])
        found = woodfisher.saliency(blocks, by_block, num_grads, zeta, _score_fn(pattern, block_size))
        return _by_unit(found, kernel.shape[1])

    return sharding.by_units(score, mesh)(kernel, grams, num_grads, zeta)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def score_rows(
    kernel: Float[Array, "inputs U"],
    gradients: list[Float[Array, "inputs U"]],
    zeta: Float[Array, ""],
    block_size: int,
    pattern: str,
    mesh: Mesh | None,
) -> tuple[Float[Array, "I U b"], Float[Array, "I U"]]:
    """Scores the blocks of a piece from its gradients, and estimates their errors."""

    def score(kernel: Array, gradients: list[Array], zeta: Array) -> tuple[Array, Array]:
        found = woodfisher.dual_saliency(kernel, gradients, zeta, block_size, _score_fn(pattern, block_size))
        return _by_unit(found, kernel.shape[1])

    return sharding.by_units(score, mesh)(kernel, gradients, zeta)


def _by_unit(
    found: tuple[Float[Array, "N b"], Float[Array, " N"]], units: int
) -> tuple[Float[Array, "I u b"], Float[Array, "I u"]]:
    """Turns blocks in the order of `woodfisher.to_blocks` to blocks by inputs and units."""
    scores, error = found
    return scores.reshape(-1, units, scores.shape[1]), error.reshape(-1, units)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _score_blocks(
    weights: Float[Array, "F b"],
    gradients: list[Float[Array, "F b"]],
    zeta: Float[Array, ""],
    form: str,
    block_size: int,
    pattern: str,
) -> tuple[Float[Array, "F b"], Float[Array, " F"]]:
    """Scores some blocks by another form, and estimates their errors."""
    rows, score = jnp.stack(gradients, axis=1), _score_fn(pattern, block_size)
    if form == "gram":
        return woodfisher.saliency(weights, woodfisher.gram(rows), rows.shape[1], zeta, score)
    return woodfisher.qr_saliency(weights, rows, zeta, score), jnp.zeros(rows.shape[0])


@jax.jit
def _replaced(
    scores: Float[Array, "I U b"], which: Int[Array, " F"], new: Float[Array, "F b"]
) -> Float[Array, "I U b"]:
    units = scores.shape[1]
    return scores.at[which // units, which % units].set(new)


def _score_fn(pattern: str, block_size: int) -> woodfisher.ScoreFn | None:
    return None if pattern == patterns.SINGLE else patterns.scores_of(pattern, block_size)


def woodfisher_scores(
    kernels: Kernels, gradients: Iterable[Kernels], *, config: PrunerConfig, report: ScoreReport | None = None
) -> Kernels:
    """Computes ρ_Q of every unit from the block-wise empirical Fisher (Eq. 11).

    ζ is relative to the mean over all layers of a kernel. With fewer gradients than a block has weights (m < b) the
    gradients are kept and m × m systems solved, at 4·m bytes a weight; else their outer products are summed, at 4·b.
    What `config.fisher_memory` does not hold at once is done in several passes over the gradients, with the same
    result. Blocks that float32 does not invert well are scored again: of kept gradients by their outer products, and
    what is left by QR, for which sums of outer products take one more pass.

    Args:
        kernels: θ_k on the maskable kernels.
        gradients: ∇L_k, in the same order each time; how many there really are is the m that divides.
        config: block size, damping, pattern and memory.
        report: gets 'form', 'num_grads', 'passes', 'gram_blocks' and 'qr_blocks' (how many of which kernel were scored
            again so) and 'mean_square_over_damping' of every kernel.

    Returns:
        Scores of the kernels' shapes, placed as the kernels are.

    Raises:
        FloatingPointError: naming the kernel and the gradient, if a gradient is NaN or Inf.
        ValueError: if there are no gradients, a kernel's inputs do not divide into the pattern's groups, or
            `config.fisher_memory` is too little for one output unit.
        AssertionError: if a gradient has other paths or shapes than the kernels.
    """
    for path, kernel in kernels.items():
        patterns.to_groups(path, kernel, patterns.unit_of(config.pattern, config.block_size).group)
    scoring = _Scoring(kernels, gradients, config)
    passes = fisher.plan_passes(kernels, config)
    for pieces in passes:
        scoring.score(pieces)
    scoring.rescore_doubtful_blocks()
    if config.damping_mode == "absolute":
        _warn_where_degenerate(scoring.ratios, config.damping)
    if report is not None:
        report |= {
            "form": scoring.form,
            "num_grads": scoring.num_grads,
            "passes": len(passes),
            "gram_blocks": dict(scoring.num_rescored["gram"]),
            "qr_blocks": dict(scoring.num_rescored["qr"]),
            "mean_square_over_damping": scoring.ratios,
        }
    whole = {path: assemble(path, kernel, scoring.scores) for path, kernel in kernels.items()}
    for path, (_, is_nan) in whole.items():
        if bool(is_nan):
            raise FloatingPointError(
                f"{path}: a score is NaN; damping ({config.damping_mode} {config.damping:g}) is too small for float32"
            )
    return {path: leaf for path, (leaf, _) in whole.items()}


class _Scoring:
    """Scores the pieces of one subnetwork pass by pass, and again the blocks whose inverse float32 does badly.

    Attributes:
        form: 'gram' or 'dual'.
        num_grads: m, the gradients of a pass.
        scores: of the pieces done so far.
        ratios: mean g² / ζ of every kernel.
        num_rescored: how many blocks of which kernel were scored again, by outer products and by QR.
    """

    def __init__(self, kernels: Kernels, gradients: Iterable[Kernels], config: PrunerConfig) -> None:
        self._kernels, self._gradients, self._config = kernels, gradients, config
        self._mesh = sharding.mesh_of(next(iter(kernels.values())))
        self._zetas: dict[str, Float[Array, ""]] = {}
        self._doubtful: dict[Piece, Int[np.ndarray, " F"]] = {}
        self.form, self.num_grads = woodfisher.form(config.num_grads, config.block_size), 0
        self.scores: dict[Piece, Float[Array, "I U b"]] = {}
        self.ratios: dict[str, float] = {}
        self.num_rescored = {"gram": Counter[str](), "qr": Counter[str]()}

    def score(self, pieces: tuple[Piece, ...]) -> None:
        """Goes through the gradients once and scores some pieces by them."""
        if self.form == "dual":
            found = fisher.keep(_checked(self._gradients, self._kernels), pieces, self._mesh)
        else:
            gradients = _checked(self._gradients, self._kernels)
            found = fisher.accumulate(gradients, pieces, self._config.block_size, self._mesh)
        self.num_grads = found.num_grads
        if not self._zetas:
            self._zetas, self.ratios = _dampings(self._kernels, self._gradients, found, self._config)
        for piece in pieces:
            # Taken off, so that its memory is free once it is scored.
            if self.form == "dual":
                self._score_by_gradients(piece, found.states.pop(0))
            else:
                self._score_by_gram(piece, found.states.pop(0))

    def _score_by_gram(self, piece: Piece, grams: Float[Array, "I U b b"]) -> None:
        """Scores a piece from its summed outer products; doubtful blocks wait for another pass."""
        count, size, pattern = jnp.float32(self.num_grads), self._config.block_size, self._config.pattern
        kernel, zeta = self._kernel_of(piece), self._zetas[piece.path]
        self.scores[piece], error = score_grams(kernel, grams, count, zeta, size, pattern, self._mesh)
        which = _doubtful(error, _WORTH_A_PASS)
        if len(which):
            self._doubtful[piece] = which

    def _score_by_gradients(self, piece: Piece, gradients: list[Float[Array, "inputs U"]]) -> None:
        """Scores a piece from its gradients, and doubtful blocks again: by outer products, and what is left by QR."""
        size, pattern = self._config.block_size, self._config.pattern
        kernel, zeta = self._kernel_of(piece), self._zetas[piece.path]
        scores, error = score_rows(kernel, gradients, zeta, size, pattern, self._mesh)
        which = _doubtful(error, woodfisher.LARGEST_ERROR)
        for form in ("gram", "qr"):
            if len(which):
                self.num_rescored[form][piece.path] += len(which)
                some = _rounded_up(which)
                weights, *rows = (fisher.blocks_of(leaf, some, size) for leaf in (kernel, *gradients))
                new, error = _score_blocks(weights, rows, zeta, form, size, pattern)
                scores = _replaced(scores, some, new)
                which = which[_doubtful(error[: len(which)], woodfisher.LARGEST_ERROR)]
        self.scores[piece] = scores

    def rescore_doubtful_blocks(self) -> None:
        """Goes through the gradients again for the blocks that waited, and scores them by QR."""
        size, pattern = self._config.block_size, self._config.pattern
        for portion in _portions(self._doubtful, self.num_grads * size, self._config):
            padded = {piece: _rounded_up(which) for piece, which in portion.items()}
            for piece, rows in fisher.rows_of(self._gradients, padded, size, self._mesh).items():
                self.num_rescored["qr"][piece.path] += len(portion[piece])
                weights = fisher.blocks_of(self._kernel_of(piece), padded[piece], size)
                new, _ = _score_blocks(weights, rows, self._zetas[piece.path], "qr", size, pattern)
                self.scores[piece] = _replaced(self.scores[piece], padded[piece], new)

    def _kernel_of(self, piece: Piece) -> Float[Array, "inputs U"]:
        return piece.of(self._kernels[piece.path], self._mesh)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _move(
    kernel: Float[Array, "inputs U"],
    kept: Bool[Array, "inputs U"],
    grams: Float[Array, "I U b b"],
    num_grads: Float[Array, ""],
    zeta: Float[Array, ""],
    block_size: int,
    mesh: Mesh | None,
) -> tuple[Float[Array, "I U b"], Float[Array, "I U"]]:
    def move(kernel: Array, kept: Array, grams: Array, num_grads: Array, zeta: Array) -> tuple[Array, Array]:
        blocks, stays = woodfisher.to_blocks(kernel, block_size), woodfisher.to_blocks(kept, block_size)
        moved, error = woodfisher.joint_update(blocks, stays, grams.reshape(-1, *grams.shape[2:]), num_grads, zeta)
        is_sound = (error <= _WORTH_A_PASS)[:, None]
        return _by_unit((jnp.where(is_sound, moved, jnp.where(stays, blocks, 0)), error), kernel.shape[1])

    return sharding.by_units(move, mesh)(kernel, kept, grams, num_grads, zeta)


def updated_kernels(
    kernels: Kernels, gradients: Iterable[Kernels], kept: Mapping[str, Bool[Array, "..."]], config: PrunerConfig
) -> Kernels:
    """Sets what is not kept to zero, and the rest of each block to its optimum (Eq. 10).

    What is kept of a block that float32 does not invert well stays as it is; how many there are is logged.

    Args:
        kernels: θ_k before the cut.
        gradients: ∇L_k before the cut, in the same order each time.
        kept: the mask after the cut.
        config: block size, damping and memory.

    Returns:
        New kernels.

    Raises:
        FloatingPointError: if a gradient is NaN or Inf.
        AssertionError: if the mask or a gradient has other paths or shapes than the kernels.
    """
    chex.assert_trees_all_equal_shapes(dict(kernels), dict(kept), custom_message="kernels and the mask after the cut")
    # The sums of outer products, also where there are fewer gradients than a block has weights.
    as_gram = dataclasses.replace(config, num_grads=max(config.num_grads, config.block_size))
    zetas: dict[str, Float[Array, ""]] = {}
    moved: dict[Piece, Float[Array, "I U b"]] = {}
    num_unsound = num_blocks = 0
    mesh = sharding.mesh_of(next(iter(kernels.values())))
    for pieces in fisher.plan_passes(kernels, as_gram):
        found = fisher.accumulate(_checked(gradients, kernels), pieces, config.block_size, mesh)
        if not zetas:
            zetas, _ = _dampings(kernels, gradients, found, config)
        for piece in pieces:
            leaves = piece.of(kernels[piece.path], mesh), piece.of(kept[piece.path], mesh), found.states.pop(0)
            count, zeta = jnp.float32(found.num_grads), zetas[piece.path]
            moved[piece], error = _move(*leaves, count, zeta, config.block_size, mesh)
            num_unsound += len(_doubtful(error, _WORTH_A_PASS))
            num_blocks += error.size
    if num_unsound:
        logger.warning(
            "the kept weights of %d of %d blocks stay as they are: float32 does not invert their Fisher well enough to "
            "move weights by; more damping (now %s %g) would do",
            num_unsound,
            num_blocks,
            config.damping_mode,
            config.damping,
        )
    whole = {path: assemble(path, kernel, moved) for path, kernel in kernels.items()}
    return {path: leaf for path, (leaf, _) in whole.items()}


def _checked(gradients: Iterable[Kernels], kernels: Kernels) -> Iterator[Kernels]:
    """Yields the gradients of one pass, each with the paths and shapes of the kernels."""
    for gradient in gradients:
        chex.assert_trees_all_equal_shapes(dict(kernels), dict(gradient), custom_message="kernels and a gradient")
        yield gradient


def _dampings(
    kernels: Kernels, gradients: Iterable[Kernels], found: fisher.Accumulated, config: PrunerConfig
) -> tuple[dict[str, Float[Array, ""]], dict[str, float]]:
    """Computes ζ and mean g² / ζ of every kernel."""
    zetas, ratios = {}, {}
    for path, kernel in kernels.items():
        mean_square = found.squares[path] / float(found.num_grads * kernel.size)  # may not fit 32 bits
        if not bool(jnp.isfinite(mean_square)):
            raise FloatingPointError(f"{path}: {_first_bad(path, gradients)}; no score can be made of that")
        zetas[path] = jnp.float32(config.damping)
        if config.damping_mode == "relative":
            zetas[path] = woodfisher.relative_damping(found.squares[path], found.num_grads, config.damping, kernel.size)
        ratios[path] = float(mean_square / zetas[path])
    return zetas, ratios


def _first_bad(path: str, gradients: Iterable[Kernels]) -> str:
    """Says which gradient is not finite, by going through them again."""
    for number, gradient in enumerate(gradients):
        if not bool(_is_finite(gradient[path])):
            return f"gradient {number} (counted from 0) is NaN or Inf"
    return "the squares of its gradients overflow float32"


@jax.jit
def _is_finite(leaf: Float[Array, "..."]) -> Bool[Array, ""]:
    return jnp.isfinite(leaf).all()


def _portions(
    doubtful: Mapping[Piece, Int[np.ndarray, " F"]], floats_a_block: int, config: PrunerConfig
) -> Iterator[dict[Piece, Int[np.ndarray, " F"]]]:
    """Yields blocks to score again, as many at a time as memory allows."""
    # Their gradients, stacked, which `_rounded_up` may quadruple.
    most = max(1, (config.fisher_memory or _REPAIR_MEMORY) // (32 * floats_a_block))
    portion: dict[Piece, Int[np.ndarray, " F"]] = {}
    for piece, which in doubtful.items():
        for start in range(0, len(which), most):
            part = which[start : start + most]
            if (portion and sum(map(len, portion.values())) + len(part) > most) or piece in portion:
                yield portion
                portion = {}
            portion[piece] = part
    if portion:
        yield portion


def _rounded_up(which: Int[np.ndarray, " F"]) -> Int[np.ndarray, " G"]:
    """Repeats the first of some blocks until their number is one of few, so that few programs are compiled."""
    size = 4 * cholesky.SLICE
    while size < len(which):
        size *= 4
    return np.concatenate([which, np.full(size - len(which), which[0])])


def _doubtful(error: Float[Array, "..."], largest: float) -> Int[np.ndarray, " F"]:
    """Finds the blocks whose estimated error is larger than that, or NaN."""
    return np.flatnonzero(~(sharding.to_host(error).ravel() <= largest))


def assemble(
    path: str, kernel: Float[Array, "*layers inputs outputs"], scores: Mapping[Piece, Float[Array, "I U b"]]
) -> tuple[Float[Array, "*layers inputs outputs"], Bool[Array, ""]]:
    """Joins the scores of a leaf's pieces in the order of layers and output units, placed as the leaf is.

    Returns:
        The scores, and whether one of them is NaN.
    """
    layers: dict[int | None, list[tuple[Array, int]]] = {}
    for piece, blocks in scores.items():
        if piece.path == path:
            layers.setdefault(piece.layer, []).append((blocks, piece.stop - piece.start))
    parts = [[blocks for blocks, _ in layer] for layer in layers.values()]
    units = tuple(tuple(count for _, count in layer) for layer in layers.values())
    return _joined(parts, units, kernel.shape, None if sharding.mesh_of(kernel) is None else kernel.sharding)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _joined(
    layers: list[list[Float[Array, "I U b"]]],
    units: tuple[tuple[int, ...], ...],
    shape: tuple[int, ...],
    place: NamedSharding | None,
) -> tuple[Float[Array, "*layers inputs outputs"], Bool[Array, ""]]:
    kernels = []
    for blocks, counts in zip(layers, units, strict=True):
        columns = [jnp.swapaxes(part, 1, 2).reshape(-1, part.shape[1])[: shape[-2]] for part in blocks]
        # Without the units that spreading added.
        real = [part[:, :count] for part, count in zip(columns, counts, strict=True)]
        kernels.append(jnp.concatenate(real, axis=1))
    whole = jnp.stack(kernels) if len(shape) == 3 else kernels[0]
    is_nan = jnp.isnan(whole).any()
    return whole if place is None else jax.lax.with_sharding_constraint(whole, place), is_nan


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
