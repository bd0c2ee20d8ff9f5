"""From scores to masks: when to prune, how much, by which criterion.

A criterion is one function from a concept's weights and a stream of its gradients to scores, lowest pruned first.
`woodfisher_scores` is the paper's; any other of that shape takes its place.

Reference: Tan et al. 2024, 'Concept-Induced Sparsity Mining'; schedules: Kurtic et al. 2022 (cubic), and the linear
one of the authors' code. Deviation: masks alone are learnt. Eq. 10 moves the surviving weights, and those are shared
by K subnetworks.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparsecbm_jax import fisher, woodfisher
from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.cbm import CBMConfig, Heads, make_forward
from sparsecbm_jax.config import PrunerConfig, SparsityConfig
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.masks import Masks, Params
from sparsecbm_jax.selection import select_smallest

Kernels = Mapping[str, Float[Array, "..."]]
Criterion = Callable[[Kernels, Iterator[Kernels]], Kernels]


class PruningEvent(NamedTuple):
    """When masks are re-scored: before step `step` of epoch `epoch`, up to `sparsity`."""

    epoch: int
    step: int
    sparsity: float


def default_sparsity(num_concepts: int) -> float:
    """s = 1 − 1/K: a subnetwork holds at most a K-th of the backbone.

    >>> default_sparsity(4)
    0.75
    """
    return 1 - 1 / num_concepts


def schedule(config: SparsityConfig, num_concepts: int, steps_per_epoch: int) -> list[PruningEvent]:
    """The run's pruning events in order; the last has the final sparsity, at the start of `end_epoch`.

    linear: s_0 + (s_f − s_0) x; cubic: s_f − (s_f − s_0)(1 − x)³; oneshot: one event at `start_epoch`.

    Raises:
      ValueError: if an epoch has fewer steps than events.
    """
    final = default_sparsity(num_concepts) if config.final is None else config.final
    if config.schedule == "oneshot":
        return [PruningEvent(config.start_epoch, 0, final)]
    if config.events_per_epoch > steps_per_epoch:
        raise ValueError(
            f"sparsity.events_per_epoch is {config.events_per_epoch}, but an epoch has {steps_per_epoch} steps"
        )
    initial = min(config.initial, final)
    total = (config.end_epoch - config.start_epoch) * config.events_per_epoch
    events = []
    for i in range(total + 1):
        x = i / total
        ramp = x if config.schedule == "linear" else 1 - (1 - x) ** 3
        epoch, part = divmod(i, config.events_per_epoch)
        step = part * steps_per_epoch // config.events_per_epoch
        events.append(PruningEvent(config.start_epoch + epoch, step, initial + (final - initial) * ramp))
    return events


@functools.partial(jax.jit, static_argnums=(4, 5))
def _scores_from_gram(
    kernel: Float[Array, "..."],
    grams: Float[Array, "N b b"],
    num_grads: Float[Array, ""],
    damping: Float[Array, ""],
    is_relative: bool,
    block_size: int,
) -> Float[Array, "..."]:
    squares = jnp.trace(grams, axis1=1, axis2=2).sum()
    zeta = woodfisher.relative_damping(squares, num_grads, damping, kernel.size) if is_relative else damping
    scores = woodfisher.saliency(woodfisher.to_blocks(kernel, block_size), grams, num_grads, zeta)
    return woodfisher.from_blocks(scores, kernel.shape)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _scores_from_gradients(
    kernel: Float[Array, "..."],
    gradients: list[Float[Array, "..."]],
    damping: Float[Array, ""],
    is_relative: bool,
    block_size: int,
) -> Float[Array, "..."]:
    squares = sum((jnp.sum(gradient**2) for gradient in gradients), jnp.float32(0))
    zeta = woodfisher.relative_damping(squares, len(gradients), damping, kernel.size) if is_relative else damping
    blocks = fisher.stacked(gradients, block_size)
    scores = woodfisher.dual_saliency(woodfisher.to_blocks(kernel, block_size), blocks, zeta)
    return woodfisher.from_blocks(scores, kernel.shape)


def woodfisher_scores(kernels: Kernels, gradients: Iterator[Kernels], *, config: PrunerConfig) -> Kernels:
    """ρ_Q of every single weight from the block-wise empirical Fisher (Eq. 11).

    ζ is relative to the mean over all layers of a kernel. With fewer gradients than a block has weights (m < b) the
    gradients are kept and m × m systems solved, at 4·m bytes a weight; else their outer products are summed, at 4·b.

    Args:
      kernels: θ_k on the maskable kernels.
      gradients: ∇L_k, consumed whole; how many there really are is the m that divides.
      config: block size and damping.

    Raises:
      FloatingPointError: naming the kernel, if a score is not finite (a NaN gradient, or damping too small).
      ValueError: if there are no gradients.
    """
    is_relative, damping = config.damping_mode == "relative", jnp.float32(config.damping)
    kept: list[Kernels] = []
    blocks = None
    if config.num_grads < config.block_size:
        kept = list(gradients)
        if not kept:
            raise ValueError("no gradients were given to estimate the Fisher from")
    else:
        blocks = fisher.accumulate(gradients, config.block_size)
    scores = {}
    for path, kernel in kernels.items():
        if blocks is None:
            own = [gradient[path] for gradient in kept]
            scores[path] = _scores_from_gradients(kernel, own, damping, is_relative, config.block_size)
        else:
            grams, count = blocks.grams.pop(path), jnp.float32(blocks.num_grads)
            scores[path] = _scores_from_gram(kernel, grams, count, damping, is_relative, config.block_size)
        if not bool(jnp.isfinite(scores[path]).all()):
            raise FloatingPointError(
                f"the WoodFisher scores of {path} are not finite: a gradient was NaN or Inf, or damping "
                f"({config.damping_mode} {config.damping}) is too small for float32"
            )
    return scores


def magnitude_scores(kernels: Kernels, gradients: Iterator[Kernels]) -> Kernels:
    """|w|: no gradient is taken, since the stream is never read."""
    return {path: jnp.abs(kernel) for path, kernel in kernels.items()}


@jax.jit
def _prune_lowest(
    mask: Mapping[str, Bool[Array, "..."]], scores: Kernels, count: Array, eligible: Mapping[str, Bool[Array, "..."]]
) -> dict[str, Bool[Array, "..."]]:
    chosen = select_smallest(scores, count, eligible)
    return {path: mask[path] & ~chosen[path] for path in mask}


def prune_concept(
    mask: Mapping[str, Bool[Array, "..."]],
    scores: Kernels,
    sparsity: float,
    *,
    scope: str = "global",
    regrow: bool = False,
) -> dict[str, Bool[Array, "..."]]:
    """One concept's mask cut to a sparsity: exactly round(s · n) weights pruned, those of lowest score.

    Args:
      mask: the mask as it is.
      scores: lowest goes first.
      sparsity: pruned fraction s, of the whole tree ('global') or of every kernel ('per_kernel').
      scope: what weights compete with.
      regrow: pruned weights may come back; else they stay pruned, and a mask sparser than s is left as it is.
    """
    if scope == "per_kernel":
        return {path: _prune_kernels(path, mask[path], scores[path], sparsity, regrow) for path in mask}
    total = sum(kept.size for kept in mask.values())
    target = round(sparsity * total)
    if regrow:
        everything = {path: jnp.ones_like(kept) for path, kept in mask.items()}
        return _prune_lowest(everything, scores, jnp.uint32(target), everything)
    pruned = total - sum(int(jnp.sum(kept, dtype=jnp.uint32)) for kept in mask.values())
    if target <= pruned:
        return dict(mask)
    return _prune_lowest(mask, scores, jnp.uint32(target - pruned), mask)


def _prune_kernels(
    path: str, mask: Bool[Array, "..."], scores: Float[Array, "..."], sparsity: float, regrow: bool
) -> Bool[Array, "..."]:
    """Cuts each kernel of a leaf by itself: a leaf of the layers stacks one for each of them."""
    if not path.startswith("layers/"):
        return prune_concept({path: mask}, {path: scores}, sparsity, regrow=regrow)[path]
    cut = [
        prune_concept({path: of_layer}, {path: score}, sparsity, regrow=regrow)[path]
        for of_layer, score in zip(mask, scores, strict=True)
    ]
    return jnp.stack(cut)


def prune(
    config: CBMConfig,
    params: Params,
    masks: Masks,
    heads: Heads,
    batches: Sequence[Batch],
    sparsity: float,
    *,
    pruner: PrunerConfig,
    scope: str = "global",
    regrow: bool = False,
    criterion: Criterion | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda concepts: concepts,
) -> Masks:
    """Scores every concept's subnetwork and cuts its mask to `sparsity`.

    Args:
      batches: where the gradients come from: pruner.num_grads minibatches, or as many rows with `per_example`.
      criterion: the score; `woodfisher_scores` by default.
      progress: wraps the loop over concepts.

    Returns:
      New masks.
    """
    if criterion is None:
        criterion = functools.partial(woodfisher_scores, config=pruner)
    forward = make_forward(config)
    packed = jax.jit(masks_lib.pack)(masks)
    pairs = [(batch, forward(params, packed, heads, batch).activations) for batch in batches]
    new = dict(masks)
    for k in progress(range(config.num_concepts)):
        mask = masks_lib.concept(new, k)
        if regrow:
            mask = {path: jnp.ones_like(kept) for path, kept in mask.items()}
        kernels = {path: jnp.where(kept, masks_lib.leaf_at(params, path), 0) for path, kept in mask.items()}
        stream = fisher.gradients(config, params, mask, heads, pairs, k, per_example=pruner.per_example)
        stream = itertools.islice(stream, pruner.num_grads)
        scores = criterion(kernels, stream)
        cut = prune_concept(mask, scores, sparsity, scope=scope, regrow=regrow)
        new = masks_lib.replace_concept(new, k, cut)
    return new


def num_fisher_batches(config: PrunerConfig) -> int:
    """Minibatches that hold `num_grads` gradients."""
    return int(np.ceil(config.num_grads / config.grad_batch_size)) if config.per_example else config.num_grads
