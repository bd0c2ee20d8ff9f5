"""From scores to masks: when to prune, how much, by which criterion.

Reference: Tan et al. 2024, 'Concept-Induced Sparsity Mining'; schedules: Kurtic et al. 2022 (cubic), and the linear
one of the authors' code. Deviation: masks alone are learnt. Eq. 10 moves the surviving weights, and those are shared
by K subnetworks.
"""

import functools
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparsecbm_jax import fisher, patterns
from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.cbm import CBMConfig, Heads, make_forward
from sparsecbm_jax.config import PrunerConfig, SparsityConfig
from sparsecbm_jax.criteria import Criterion, Kernels, Report, make_criterion
from sparsecbm_jax.data.batches import Batch, Tokenized, train_batches
from sparsecbm_jax.masks import Masks, Params
from sparsecbm_jax.patterns import Unit
from sparsecbm_jax.selection import select_smallest

_FISHER_BUCKETS = (32, 64, 128, 256, 512)


class Bar(Protocol):
    """What shows how far pruning has come, such as tqdm's bars."""

    n: float

    def update(self, n: float, /) -> object: ...

    def close(self) -> None: ...


class _NoBar:
    n: float = 0

    def update(self, n: float, /) -> None:
        self.n += n

    def close(self) -> None:
        pass


class PruningEvent(NamedTuple):
    """When masks are re-scored: before step `step` of epoch `epoch`, up to the `sparsity` of each concept."""

    epoch: int
    step: int
    sparsity: tuple[float, ...]

    def __str__(self) -> str:
        return " / ".join(f"{value:.2f}" for value in dict.fromkeys(self.sparsity))


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
      ValueError: if an epoch has fewer steps than events, or not every concept has a sparsity.
    """
    finals = final_sparsity(config, num_concepts)
    if config.schedule == "oneshot":
        return [PruningEvent(config.start_epoch, 0, finals)]
    if config.events_per_epoch > steps_per_epoch:
        raise ValueError(
            f"sparsity.events_per_epoch is {config.events_per_epoch}, but an epoch has {steps_per_epoch} steps"
        )
    total = (config.end_epoch - config.start_epoch) * config.events_per_epoch
    events = []
    for i in range(total + 1):
        x = i / total
        ramp = x if config.schedule == "linear" else 1 - (1 - x) ** 3
        epoch, part = divmod(i, config.events_per_epoch)
        step = part * steps_per_epoch // config.events_per_epoch
        reached = tuple(min(config.initial, final) + (final - min(config.initial, final)) * ramp for final in finals)
        events.append(PruningEvent(config.start_epoch + epoch, step, reached))
    return events


def final_sparsity(config: SparsityConfig, num_concepts: int) -> tuple[float, ...]:
    """The pruned fraction that each concept ends with.

    Raises:
      ValueError: if `config.per_concept` names more or fewer than there are concepts.
    """
    if config.per_concept:
        if len(config.per_concept) != num_concepts:
            raise ValueError(
                f"config.sparsity.per_concept has {len(config.per_concept)} fractions {config.per_concept}, but there "
                f"are {num_concepts} concepts; expected one for each"
            )
        return config.per_concept
    return (default_sparsity(num_concepts) if config.final is None else config.final,) * num_concepts


@functools.partial(jax.jit, static_argnums=(4,))
def _prune_lowest(
    mask: Mapping[str, Bool[Array, "..."]],
    scores: Kernels,
    count: Array,
    eligible: Mapping[str, Bool[Array, "..."]],
    unit: Unit,
) -> dict[str, Bool[Array, "..."]]:
    """Prunes `count` units: of the eligible groups, those of lowest score."""
    if unit.group == 1:
        chosen = select_smallest(scores, count, eligible)
        return {path: mask[path] & ~chosen[path] for path in mask}
    grouped = {path: patterns.to_groups(path, leaf, unit.group) for path, leaf in scores.items()}
    whole = {path: patterns.to_groups(path, leaf, unit.group).all(axis=-2) for path, leaf in eligible.items()}
    chosen = select_smallest({path: leaf.min(axis=-2) for path, leaf in grouped.items()}, count, whole)
    gone = {path: chosen[path][..., None, :] & (leaf < jnp.inf) for path, leaf in grouped.items()}
    return {path: mask[path] & ~gone[path].reshape(mask[path].shape) for path in mask}


def prune_concept(
    mask: Mapping[str, Bool[Array, "..."]],
    scores: Kernels,
    sparsity: float,
    *,
    scope: str = "global",
    regrow: bool = False,
    unit: Unit = patterns.SINGLE_WEIGHT,
) -> dict[str, Bool[Array, "..."]]:
    """One concept's mask cut to a sparsity: exactly round(s · n) weights pruned, those of lowest score.

    Args:
      mask: the mask as it is.
      scores: lowest goes first.
      sparsity: pruned fraction s, of the whole tree ('global') or of every kernel ('per_kernel').
      scope: what weights compete with.
      regrow: pruned weights may come back; else they stay pruned, and a mask sparser than s is left as it is.
      unit: what is pruned together, as `patterns.unit_of` gives it; the count is then a multiple of it.

    Raises:
      ValueError: if more than N of M would have to go.
    """
    if scope == "per_kernel":
        return {path: _prune_kernels(path, mask[path], scores[path], sparsity, regrow, unit) for path in mask}
    total = sum(kept.size for kept in mask.values())
    target = round(sparsity * total / unit.pruned) * unit.pruned
    if target > total * unit.pruned // unit.group:
        raise ValueError(
            f"a sparsity of {sparsity:g} is more than {unit.pruned} of {unit.group} weights, the pattern, can give"
        )
    everything = {path: jnp.ones_like(kept) for path, kept in mask.items()}
    pruned = 0 if regrow else total - sum(int(jnp.sum(kept, dtype=jnp.uint32)) for kept in mask.values())
    if target <= pruned:
        return dict(everything if regrow else mask)
    start = everything if regrow else mask
    return _prune_lowest(start, scores, jnp.uint32(-(-(target - pruned) // unit.pruned)), start, unit)


def _prune_kernels(
    path: str, mask: Bool[Array, "..."], scores: Float[Array, "..."], sparsity: float, regrow: bool, unit: Unit
) -> Bool[Array, "..."]:
    """Cuts each kernel of a leaf by itself: a leaf of the layers stacks one for each of them."""
    if not path.startswith("layers/"):
        return prune_concept({path: mask}, {path: scores}, sparsity, regrow=regrow, unit=unit)[path]
    cut = [
        prune_concept({path: of_layer}, {path: score}, sparsity, regrow=regrow, unit=unit)[path]
        for of_layer, score in zip(mask, scores, strict=True)
    ]
    return jnp.stack(cut)


def prune(
    config: CBMConfig,
    params: Params,
    masks: Masks,
    heads: Heads,
    batches: Sequence[Batch],
    sparsity: float | Sequence[float],
    *,
    pruner: PrunerConfig,
    scope: str = "global",
    regrow: bool = False,
    reestimations: int = 1,
    criterion: Criterion | None = None,
    seed: int = 0,
    reports: list[Report] | None = None,
    make_bar: Callable[..., Bar] | None = None,
) -> Masks:
    """Scores every concept's subnetwork and cuts its mask to `sparsity`.

    Args:
      batches: where the gradients come from: pruner.num_grads minibatches, or as many rows with `per_example`.
      sparsity: pruned fraction, one for all or one for each concept.
      pruner: how weights are scored.
      scope: what weights compete with, 'global' or 'per_kernel'.
      regrow: pruned weights may come back.
      reestimations: cuts on the way from the present sparsity to `sparsity`, equally far apart, each scored anew.
      criterion: a score of one's own; by default the one that `pruner.criterion` names.
      seed: of the criterion 'random'.
      reports: gets what the criterion did, concept by concept (and cut by cut).
      make_bar: called with `total=`, how many gradients there are to be, makes the bar that shows them.

    Returns:
      New masks.
    """
    unit = patterns.unit_of(pruner.pattern, pruner.block_size)
    finals = tuple(sparsity) if isinstance(sparsity, Sequence) else (sparsity,) * config.num_concepts
    forward = make_forward(config)
    packed = jax.jit(masks_lib.pack)(masks)
    pairs = [(batch, forward(params, packed, heads, batch).activations) for batch in batches]
    new, present = dict(masks), 1 - masks_lib.total_density(masks)
    per_cut = num_gradients(params, masks, pruner) if criterion is None else pruner.num_grads
    bar = _NoBar() if make_bar is None else make_bar(total=config.num_concepts * reestimations * per_cut)
    for k in range(config.num_concepts):
        mask = masks_lib.concept(new, k)
        for cut in range(1, reestimations + 1):
            candidates = {path: jnp.ones_like(kept) for path, kept in mask.items()} if regrow else mask
            kernels = {path: jnp.where(kept, masks_lib.leaf_at(params, path), 0) for path, kept in candidates.items()}
            gradients = fisher.SubnetworkGradients(
                config,
                params,
                candidates,
                heads,
                pairs,
                k,
                per_example=pruner.per_example,
                limit=pruner.num_grads,
                on_gradient=functools.partial(bar.update, 1),
            )
            report: Report = {}
            if criterion is None:
                scores = make_criterion(pruner, seed=seed, report=report)(kernels, gradients)
            else:
                scores = patterns.spread(criterion(kernels, gradients), unit)
            if reports is not None:
                reports.append(report)
            is_last = cut == reestimations
            reached = finals[k] if is_last else float(present[k] + (finals[k] - present[k]) * cut / reestimations)
            mask = prune_concept(candidates, scores, reached, scope=scope, regrow=regrow, unit=unit)
            # A criterion may take fewer gradients than were expected, or none.
            bar.update(max(0, (k * reestimations + cut) * per_cut - bar.n))
        new = masks_lib.replace_concept(new, k, mask)
    bar.close()
    return new


def num_gradients(params: Params, masks: Masks, pruner: PrunerConfig) -> int:
    """How many gradients a concept's scores take, all passes together."""
    if pruner.criterion in ("magnitude", "random"):
        return 1
    if pruner.criterion != "woodfisher":
        return pruner.num_grads
    kernels = {path: masks_lib.leaf_at(params, path) for path in masks}
    return pruner.num_grads * len(fisher.plan_passes(kernels, pruner))


def fisher_batches(split: Tokenized, config: PrunerConfig, *, seed: int, event: int = 0) -> list[Batch]:
    """Batches that the gradients of an event are taken from: an order of their own, a function of (seed, event).

    Rows come in few widths, so that few programs are compiled; a batch that padding fills up is left out where whole
    ones are to be had.
    """
    wanted = num_fisher_batches(config)
    batches: list[Batch] = []
    while len(batches) < wanted:
        stream = list(
            train_batches(
                split,
                batch_size=config.grad_batch_size,
                seed=seed,
                epoch=10_000 + 100 * event + len(batches),
                buckets=_FISHER_BUCKETS,
            )
        )
        whole = [batch for batch in stream if batch.example_weight.all()]
        batches += (whole or stream)[: wanted - len(batches)]
    return batches


def describe_plan(params: Params, masks: Masks, pruner: PrunerConfig) -> str:
    """What scoring will do, and in how much memory, in a sentence."""
    if pruner.criterion != "woodfisher":
        return f"criterion {pruner.criterion}"
    return "WoodFisher, " + fisher.describe_plan({path: masks_lib.leaf_at(params, path) for path in masks}, pruner)


def peak_memory() -> int:
    """Most bytes that were in use at once so far: of the first device, or on CPU of this process."""
    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return stats["peak_bytes_in_use"]


def num_fisher_batches(config: PrunerConfig) -> int:
    """Minibatches that hold `num_grads` gradients."""
    return int(np.ceil(config.num_grads / config.grad_batch_size)) if config.per_example else config.num_grads
