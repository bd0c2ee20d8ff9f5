"""From scores to masks: exact counts over the tree, a kernel or an output unit; shared among concepts or their own.

Reference: Tan et al. 2024, 'Concept-Induced Sparsity Mining', which leaves open how the concepts' sparsities differ
('various concepts necessitate differing proportions of neurons') and names sharing as a way to train less.
"""

import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparsecbm_jax.config.run_config import SparsityConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.masks import Masks
from sparsecbm_jax.core.selection import count_true, exact_count, select_smallest, select_smallest_in_rows
from sparsecbm_jax.pruning import patterns
from sparsecbm_jax.pruning.gradients import ConceptMask, Kernels
from sparsecbm_jax.pruning.patterns import Unit

# (concept, its scores, its mask before the cut and after it) → another mask of the same sparsity.
Refine = Callable[[int, Kernels, ConceptMask, ConceptMask], ConceptMask]

# Weights whose scores are read by the host to allot sparsities.
_SAMPLED = 1_000_000


def pinned_paths(paths: Iterable[str], pinned: Sequence[str]) -> set[str]:
    """Finds the paths that some pattern of `config.sparsity.pinned` names.

    Raises:
        ValueError: naming a pattern that names no kernel.
    """
    found: set[str] = set()
    for pattern in pinned:
        named = set(fnmatch.filter(paths, pattern))
        if not named:
            raise ValueError(
                f"config.sparsity.pinned has {pattern!r}, which names no kernel; there are {', '.join(sorted(paths))}"
            )
        found |= named
    return found


@functools.partial(jax.jit, static_argnums=(4,))
def prune_lowest(
    mask: ConceptMask, scores: Kernels, count: Array, eligible: ConceptMask, unit: Unit
) -> dict[str, Bool[Array, "..."]]:
    """Prunes `count` units: of the eligible groups, those of lowest score."""
    lowest, whole = _by_unit(scores, eligible, unit)
    return _without(mask, scores, select_smallest(lowest, count, whole), unit)


@functools.partial(jax.jit, static_argnums=(4,))
def _prune_lowest_in_rows(
    mask: ConceptMask, scores: Kernels, target: Array, eligible: ConceptMask, unit: Unit
) -> dict[str, Bool[Array, "..."]]:
    """Prunes units of each output unit until a share `target` of its groups has been cut."""
    lowest, whole = _by_unit(scores, eligible, unit)
    chosen = {}
    for path, groups in whole.items():
        cut = jnp.round(target * groups.shape[-2]).astype(jnp.int32)
        done = jnp.sum(~groups, axis=-2, dtype=jnp.int32)
        chosen[path] = select_smallest_in_rows(lowest[path], jnp.maximum(cut - done, 0).astype(jnp.uint32), groups)
    return _without(mask, scores, chosen, unit)


def _by_unit(scores: Kernels, eligible: ConceptMask, unit: Unit) -> tuple[Kernels, ConceptMask]:
    """Returns the score of every group, and whether all of it may still go."""
    if unit.group == 1:
        return scores, eligible
    grouped = {path: patterns.to_groups(path, leaf, unit.group) for path, leaf in scores.items()}
    whole = {path: patterns.to_groups(path, leaf, unit.group).all(axis=-2) for path, leaf in eligible.items()}
    return {path: leaf.min(axis=-2) for path, leaf in grouped.items()}, whole


def _without(mask: ConceptMask, scores: Kernels, chosen: ConceptMask, unit: Unit) -> dict[str, Bool[Array, "..."]]:
    if unit.group == 1:
        return {path: mask[path] & ~chosen[path] for path in mask}
    grouped = {path: patterns.to_groups(path, leaf, unit.group) for path, leaf in scores.items()}
    gone = {path: chosen[path][..., None, :] & (leaf < jnp.inf) for path, leaf in grouped.items()}
    return {path: mask[path] & ~gone[path].reshape(mask[path].shape) for path in mask}


def prune_concept(
    mask: ConceptMask,
    scores: Kernels,
    sparsity: float,
    *,
    scope: str = "global",
    regrow: bool = False,
    unit: Unit = patterns.SINGLE_WEIGHT,
    pinned: Sequence[str] = (),
) -> dict[str, Bool[Array, "..."]]:
    """Cuts one concept's mask to a sparsity: exactly round(s · n) weights are pruned, those of lowest score.

    Args:
        mask: the mask as it is.
        scores: lowest goes first.
        sparsity: pruned fraction s, of the whole tree ('global'), of every kernel of every layer ('per_kernel') or of
            every output unit ('per_row').
        scope: what weights compete with.
        regrow: pruned weights may come back; else they stay pruned, and a mask sparser than s is left as it is.
        unit: what is pruned together, as `patterns.unit_of` gives it; the count is then a multiple of it.
        pinned: kernels that stay whole (`pinned_paths`); with scope 'global' the others make up for them.

    Raises:
        ValueError: if more would have to go than the pattern and the pinned kernels leave.
        AssertionError: if the scores have other paths or shapes than the mask.
    """
    chex.assert_trees_all_equal_shapes(dict(mask), dict(scores), custom_message="a mask and its scores")
    whole = pinned_paths(mask, pinned)
    everything = {path: jnp.ones_like(kept) for path, kept in mask.items()}
    start = everything if regrow else dict(mask)
    free = {path: kept for path, kept in start.items() if path not in whole}
    free_scores = {path: scores[path] for path in free}
    if scope == "per_kernel":
        cut = {path: _prune_kernels(path, free[path], scores[path], sparsity, unit) for path in free}
    elif scope == "per_row":
        _check_pattern(sparsity, sparsity, 1, unit)
        _check_rows(free, unit)
        cut = _prune_lowest_in_rows(free, free_scores, jnp.float32(sparsity * unit.group / unit.pruned), free, unit)
    else:
        total = sum(kept.size for kept in mask.values())
        cut = _prune_tree(free, free_scores, sparsity, total, unit, sum(_num_pruned(start[path]) for path in whole))
    return {**start, **cut}


def _check_pattern(sparsity: float, target: float, total: int, unit: Unit) -> None:
    if target > total * unit.pruned / unit.group:
        raise ValueError(
            f"a sparsity of {sparsity:g} is more than {unit.pruned} of {unit.group} weights, the pattern, can give"
        )


def _check_rows(mask: ConceptMask, unit: Unit) -> None:
    for path, kept in mask.items():
        parts = patterns.to_groups(path, kept, unit.group).sum(axis=-2)
        if bool(((parts != unit.group) & (parts != unit.group - unit.pruned)).any()):
            raise ValueError(f"{path}: the mask was made with another pattern; regrow, or start from a dense model")


def _num_pruned(mask: Bool[Array, "..."]) -> int:
    return mask.size - count_true({"mask": mask})


def _prune_tree(
    mask: ConceptMask, scores: Kernels, sparsity: float, total: int, unit: Unit, elsewhere: int = 0
) -> dict[str, Bool[Array, "..."]]:
    """Prunes round(s · total) weights of a tree, of which some may be pruned already, and `elsewhere` others are."""
    target = round(sparsity * total / unit.pruned) * unit.pruned
    free = sum(kept.size for kept in mask.values())
    _check_pattern(sparsity, target, total, unit)
    if target > free * unit.pruned // unit.group:
        raise ValueError(
            f"a sparsity of {sparsity:g} prunes {target} weights, but only {free} of {total} are not pinned"
        )
    pruned = elsewhere + sum(_num_pruned(kept) for kept in mask.values())
    if target <= pruned:
        return dict(mask)
    count = -(-(target - pruned) // unit.pruned)
    left = count_true(_by_unit(scores, mask, unit)[1])
    if left < count:
        raise ValueError(
            f"a sparsity of {sparsity:g} wants {count} more groups of {unit.group} weights cut, but only {left} are "
            "whole: the mask was made with another pattern; regrow, or start from a dense model"
        )
    return prune_lowest(mask, scores, exact_count(count), mask, unit)


def _prune_kernels(
    path: str, mask: Bool[Array, "..."], scores: Float[Array, "..."], sparsity: float, unit: Unit
) -> Bool[Array, "..."]:
    """Cuts each kernel of a leaf by itself: a leaf of the layers stacks one for each of them."""
    if not path.startswith("layers/"):
        return _prune_tree({path: mask}, {path: scores}, sparsity, mask.size, unit)[path]
    cut = [
        _prune_tree({path: of_layer}, {path: score}, sparsity, of_layer.size, unit)[path]
        for of_layer, score in zip(mask, scores, strict=True)
    ]
    return jnp.stack(cut)


def prune_in_common(
    masks: Masks, scores: Sequence[Kernels], sparsity: float, unit: Unit, pinned: Sequence[str] = ()
) -> Masks:
    """Cuts the weights of lowest summed score from all masks, until a share `sparsity` is pruned in each of them.

    It saves no time: every concept is scored all the same. What it gives is subnetworks that differ less.

    Args:
        masks: of all K concepts.
        scores: of each concept.
        sparsity: the fraction that is to be pruned in all masks.
        unit: what is pruned together.
        pinned: kernels that stay whole, as in `prune_concept`.

    Returns:
        New masks.
    """
    summed = {path: functools.reduce(jnp.add, [of[path] for of in scores]) for path in masks}
    anywhere = {path: mask.any(axis=0) for path, mask in masks.items()}
    common = prune_concept(anywhere, summed, sparsity, unit=unit, pinned=pinned)
    return {path: mask & common[path][None] for path, mask in masks.items()}


def allot(scores: Sequence[Kernels], total: float) -> tuple[float, ...]:
    """Finds a sparsity for each concept, `total` on average, at which the summed scores of what they prune are equal.

    The summed score is the loss increase that is predicted, weights taken one by one; a negative one counts as none.
    Read from a sample of some million weights of each concept.

    >>> import jax.numpy as jnp
    >>> cheap, dear = {"w": jnp.ones((4, 4))}, {"w": 3 * jnp.ones((4, 4))}
    >>> allot([cheap, dear], 0.5)
    (0.75, 0.25)
    """
    sums = []
    for of_concept in scores:
        stride = math.ceil(math.sqrt(sum(leaf.size for leaf in of_concept.values()) / _SAMPLED))
        sampled = [sharding.to_host(leaf[..., ::stride, ::stride]).ravel() for leaf in of_concept.values()]
        # What a pattern keeps in any case scores infinity.
        ordered = np.sort(np.maximum(np.concatenate(sampled).astype(np.float64), 0))
        sums.append(np.cumsum(ordered / len(ordered)))
    low, high = 0.0, max(float(total[np.isfinite(total)][-1]) for total in sums)
    for _ in range(100):
        level = (low + high) / 2
        shares = [np.searchsorted(of_concept, level, side="right") / len(of_concept) for of_concept in sums]
        low, high = (level, high) if np.mean(shares) < total else (low, level)
    shares = [np.searchsorted(of_concept, high, side="right") / len(of_concept) for of_concept in sums]
    # Ties move all at once: what is too much or too little goes to all concepts alike, as far as each can take it.
    low, high = -1.0, 1.0
    for _ in range(60):
        shift = (low + high) / 2
        low, high = (shift, high) if np.clip(np.add(shares, shift), 0, 1).mean() < total else (low, shift)
    return tuple(round(float(share), 9) for share in np.clip(np.add(shares, high), 0, 1))


class MaskMaker:
    """Makes masks from scores, as the settings say.

    Args:
        config: of it `scope`, `regrow`, `pinned`, `allotment` and `shared_fraction` count.
        unit: what is pruned together.
        refine: called after each concept's cut for the mask that takes its place.

    Raises:
        ValueError: if weights are to be cut in common, but a pattern of N of M or exchanges go with no such cut.
    """

    def __init__(self, config: SparsityConfig, unit: Unit, refine: Refine | None = None) -> None:
        if config.shared_fraction and unit.pruned < unit.group:
            raise ValueError("config.sparsity.shared_fraction goes with no N:M pattern: concepts choose other weights")
        if config.shared_fraction and refine is not None:
            raise ValueError(
                "config.sparsity.shared_fraction does not go with config.pruner.criterion='combinatorial', which "
                "exchanges the weights of each concept by itself"
            )
        self._config, self._unit, self._refine = config, unit, refine

    def cut(self, masks: Masks, scores: Iterable[Kernels], sparsity: Float[np.ndarray, " K"]) -> Masks:
        """Cuts the masks of all concepts.

        Args:
            masks: the masks as they are.
            scores: of one concept after the other. They are taken one by one, unless sparsities are allotted by them
                or weights are cut in common.
            sparsity: pruned fraction of each concept.

        Returns:
            New masks.

        Raises:
            ValueError: if a sparsity cannot be reached.
        """
        if self._config.allotment != "loss" and not self._config.shared_fraction:
            return self._cut_each(masks, scores, sparsity, self._config.regrow)
        of_all = list(scores)
        if self._config.regrow:
            masks = {path: jnp.ones_like(mask) for path, mask in masks.items()}
        if self._config.allotment == "loss":
            sparsity = np.array(allot(of_all, float(np.mean(sparsity))))
        if self._config.shared_fraction:
            masks = self._cut_in_common(masks, of_all, sparsity)
        return self._cut_each(masks, of_all, sparsity, regrow=False)

    def _cut_in_common(self, masks: Masks, scores: Sequence[Kernels], sparsity: Float[np.ndarray, " K"]) -> Masks:
        common = self._config.shared_fraction * float(np.min(sparsity))
        masks = prune_in_common(masks, scores, common, self._unit, self._config.pinned)
        too_sparse = 1 - masks_lib.total_density(masks) > sparsity + 1e-6
        if too_sparse.any():
            raise ValueError(
                f"config.sparsity.shared_fraction is {self._config.shared_fraction:g}, but the masks differ too "
                f"much by now: concept {int(np.argmax(too_sparse))} would lose more than its sparsity asks for"
            )
        return masks

    def _cut_each(
        self, masks: Masks, scores: Iterable[Kernels], sparsity: Float[np.ndarray, " K"], regrow: bool
    ) -> Masks:
        for k, of_concept in enumerate(scores):
            before = masks_lib.concept(masks, k)
            mask: ConceptMask = prune_concept(
                before,
                of_concept,
                float(sparsity[k]),
                scope=self._config.scope,
                regrow=regrow,
                unit=self._unit,
                pinned=self._config.pinned,
            )
            if self._refine is not None:
                start = {path: jnp.ones_like(kept) for path, kept in before.items()} if regrow else before
                mask = self._refine(k, of_concept, start, mask)
            masks = masks_lib.replace_concept(masks, k, mask)
        return masks
