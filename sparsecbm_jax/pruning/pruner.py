"""Pruning a model: gradients, scores and masks, concept by concept, in one cut or in several.

Reference: Tan et al. 2024, 'Concept-Induced Sparsity Mining'; schedules: Kurtic et al. 2022 (cubic), and the linear
one of the authors' code.
Deviation: masks alone are learnt. Eq. 10 moves the surviving weights, and those are shared by K subnetworks.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsecbm_jax.config.run_config import PrunerConfig, RunConfig, SparsityConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import Masks
from sparsecbm_jax.core.sharding import in_turn
from sparsecbm_jax.core.trees import Params, leaf_at, with_leaf
from sparsecbm_jax.data.batches import Batch, Tokenized, fisher_batches
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM, whole_masks
from sparsecbm_jax.model.strategies import JOINTLY_TRAINED
from sparsecbm_jax.pruning import fisher, patterns, swaps
from sparsecbm_jax.pruning.criteria import Criterion, make_criterion
from sparsecbm_jax.pruning.gradients import ConceptMask, Kernels, Subnetwork, SubnetworkGradients
from sparsecbm_jax.pruning.masks_from_scores import MaskMaker
from sparsecbm_jax.pruning.schedule import final_sparsity
from sparsecbm_jax.pruning.score_store import ScoreStore
from sparsecbm_jax.pruning.woodfisher_scores import ScoreReport, updated_kernels


class Bar(Protocol):
    """Shows how far pruning has come, as tqdm's bars do."""

    n: float

    def update(self, n: float, /) -> object:
        """Counts n more."""

    def close(self) -> None:
        """Ends the bar."""


class _NoBar:
    n: float = 0

    def update(self, n: float, /) -> None:
        self.n += n

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class PruningOptions:
    """Says how weights are scored, and how masks are made from the scores.

    Attributes:
        pruner: how weights are scored.
        cutting: of it `scope`, `regrow`, `reestimations` (cuts on the way from the present sparsity, equally far apart,
            with new scores for each), `allotment`, `shared_fraction` and `pinned` count.
        criterion: a score of one's own; by default the one that `pruner.criterion` names.
        seed: of the criterion 'random'.
    """

    pruner: PrunerConfig
    cutting: SparsityConfig = SparsityConfig()
    criterion: Criterion | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class PruningHooks:
    """Watches pruning while it goes on, and keeps its scores.

    Attributes:
        reports: gets what the criterion did, cut by cut and concept by concept.
        make_bar: called with `total=`, how many gradients there are to be, makes the bar that shows them.
        on_gradient: called after each gradient; may raise to stop.
        store: gives scores that were made before, and gets those made now.
    """

    reports: list[ScoreReport] | None = None
    make_bar: Callable[..., Bar] | None = None
    on_gradient: Callable[[], object] = lambda: None
    store: ScoreStore | None = None


def prune(
    config: CBMConfig,
    arrays: ModelArrays,
    batches: Sequence[Batch],
    sparsity: float | Sequence[float],
    options: PruningOptions,
    hooks: PruningHooks = PruningHooks(),
) -> Masks:
    """Scores every concept's subnetwork and cuts its mask to `sparsity`.

    Args:
        config: the model.
        arrays: parameters, masks and heads.
        batches: where the gradients come from: pruner.num_grads minibatches, or as many rows with `per_example`.
        sparsity: pruned fraction, one for all or one for each concept.
        options: how weights are scored and cut.
        hooks: what watches it, and keeps its scores.

    Returns:
        New masks.

    Raises:
        ValueError: if the sparsity cannot be reached, naming what stands in its way.
        AssertionError: if a mask, or a score of one's own, has another shape than its kernel; named.
    """
    for path, mask in arrays.concept_masks.items():
        expected = (config.num_concepts, *leaf_at(arrays.params, path).shape)
        chex.assert_shape(mask, expected, custom_message=f"the masks of {path}")
    scorer = _Scorer(config, arrays, batches, options, hooks)
    unit = patterns.unit_of(options.pruner.pattern, options.pruner.block_size)
    swaps_weights = options.criterion is None and options.pruner.criterion == "combinatorial"
    maker = MaskMaker(options.cutting, unit, scorer.swapped if swaps_weights else None)
    masks = arrays.concept_masks
    for cut, reached in enumerate(_sparsities(masks, sparsity, options.cutting.reestimations), start=1):
        masks = maker.cut(masks, scorer.scores_of_cut(cut, masks), reached)
    scorer.bar.close()
    return masks


def _sparsities(masks: Masks, final: float | Sequence[float], num_cuts: int) -> list[Float[np.ndarray, " K"]]:
    """Lists the sparsities that each cut reaches, equally far apart from the present ones to the final ones."""
    start = 1 - masks_lib.total_density(masks)
    finals = np.broadcast_to(np.asarray(final, float), start.shape)
    return [start + (finals - start) * cut / num_cuts for cut in range(1, num_cuts)] + [finals]


class _Scorer:
    """Scores the subnetworks of one cut after the other, and shows how far it has come."""

    def __init__(
        self,
        config: CBMConfig,
        arrays: ModelArrays,
        batches: Sequence[Batch],
        options: PruningOptions,
        hooks: PruningHooks,
    ) -> None:
        self._config, self._arrays, self._batches = config, arrays, batches
        self._options, self._hooks = options, hooks
        self._reports: dict[int, ScoreReport] = {}
        pruner, num_cuts = options.pruner, options.cutting.reestimations
        self._unit = patterns.unit_of(pruner.pattern, pruner.block_size)
        self._per_concept = pruner.num_grads
        if options.criterion is None:
            self._per_concept = num_gradients(arrays.params, arrays.concept_masks, pruner)
        total = config.num_concepts * num_cuts * self._per_concept
        self.bar: Bar = _NoBar() if hooks.make_bar is None else hooks.make_bar(total=total)

    def scores_of_cut(self, cut: int, masks: Masks) -> Iterator[Kernels]:
        """Yields the scores of one concept after the other, at masks as they were before the cut.

        A concept is scored only when its scores are asked for, so that one's need be in memory at a time.
        """
        config, store, arrays = self._config, self._hooks.store, self._arrays._replace(masks=masks)
        # For all concepts, and only where one of them is scored.
        pairs = functools.cache(functools.partial(_with_activations, config, arrays, self._batches))
        for k in range(config.num_concepts):
            subnetwork = Subnetwork(config, arrays.params, self._candidates(masks, k), arrays.heads, k)
            kernels = subnetwork.kernels
            scores = None if store is None else store.get(cut, k, kernels)
            report = self._reports[k] = ScoreReport(is_stored=scores is not None)
            if scores is None:
                scores = self._score(kernels, self._gradients(subnetwork, pairs()), report)
                if store is not None:
                    store.put(cut, k, scores)
            if self._hooks.reports is not None:
                self._hooks.reports.append(report)
            yield scores
            # A criterion may take fewer gradients than were expected, or none.
            expected = ((cut - 1) * config.num_concepts + k + 1) * self._per_concept
            self.bar.update(max(0, expected - self.bar.n))

    def swapped(self, k: int, scores: Kernels, start: ConceptMask, cut: ConceptMask) -> ConceptMask:
        """Exchanges weights that concept k's cut prunes for others; `start` is what it may keep (`swaps.swap`)."""
        subnetwork = Subnetwork(self._config, self._arrays.params, start, self._arrays.heads, k)
        # Inputs do not depend on labels or activations.
        pairs = [(batch, jnp.zeros(())) for batch in self._batches]
        inputs = SubnetworkGradients(subnetwork, pairs, on_gradient=self._hooks.on_gradient)
        products = inputs.input_products(self._options.pruner.block_size)
        found = swaps.swap(subnetwork.kernels, scores, products, start, cut)
        self._reports[k] |= {"loss_of_cut": found.before, "loss_after_swaps": found.after}
        return found.mask

    def _candidates(self, masks: Masks, k: int) -> dict[str, Array]:
        """Says which weights concept k may keep: what it has, or all of them where weights may come back."""
        mask = masks_lib.concept(masks, k)
        return {path: jnp.ones_like(kept) for path, kept in mask.items()} if self._options.cutting.regrow else mask

    def _gradients(
        self, subnetwork: Subnetwork, pairs: Sequence[tuple[Batch, Float[Array, "B K C"]]]
    ) -> SubnetworkGradients:
        def count() -> None:
            self.bar.update(1)
            self._hooks.on_gradient()

        pruner = self._options.pruner
        return SubnetworkGradients(
            subnetwork, pairs, per_example=pruner.per_example, limit=pruner.num_grads, on_gradient=count
        )

    def _score(self, kernels: Kernels, gradients: SubnetworkGradients, report: ScoreReport) -> Kernels:
        options = self._options
        if options.criterion is None:
            return make_criterion(options.pruner, seed=options.seed, report=report)(kernels, gradients)
        scores = options.criterion(kernels, gradients)
        chex.assert_trees_all_equal_shapes(dict(kernels), dict(scores), custom_message="kernels and their scores")
        return patterns.spread(scores, self._unit)


def _with_activations(
    config: CBMConfig, arrays: ModelArrays, batches: Sequence[Batch]
) -> list[tuple[Batch, Float[Array, "B K C"]]]:
    """Pairs each batch with σ(u) of all concepts."""
    forward, packed = make_forward(config), arrays._replace(masks=jax.jit(masks_lib.pack)(arrays.concept_masks))
    return [(batch, in_turn(forward(packed, batch).activations)) for batch in batches]


def optimal_update(
    config: CBMConfig, arrays: ModelArrays, after: Masks, batches: Sequence[Batch], *, pruner: PrunerConfig
) -> Params:
    """Moves what `after` keeps to its optimum for what was pruned since `arrays.masks` (Eq. 10).

    Args:
        config: a model of one concept.
        arrays: parameters, masks and heads as they were before the cut.
        after: the mask since.
        batches: as for `prune`.
        pruner: of it the Fisher's settings count.

    Returns:
        New parameters.

    Raises:
        ValueError: if there is more than one mask: the weights that would move are shared by all subnetworks.
    """
    if config.num_concepts != 1:
        raise ValueError(
            f"the optimal update moves surviving weights, which {config.num_concepts} subnetworks share; it is for a "
            "model of one concept"
        )
    chex.assert_trees_all_equal_shapes(dict(arrays.concept_masks), dict(after), custom_message="masks before and after")
    subnetwork = Subnetwork(config, arrays.params, masks_lib.concept(arrays.concept_masks, 0), arrays.heads, 0)
    mask, kept = subnetwork.mask, masks_lib.concept(after, 0)
    pairs = _with_activations(config, arrays, batches)
    gradients = SubnetworkGradients(subnetwork, pairs, per_example=pruner.per_example, limit=pruner.num_grads)
    params = arrays.params
    for path, leaf in updated_kernels(subnetwork.kernels, gradients, kept, pruner).items():
        params = with_leaf(params, path, jnp.where(mask[path] & kept[path], leaf, leaf_at(params, path)))
    return params


def prune_model(
    model: SparseCBM,
    split: Tokenized,
    run: RunConfig,
    *,
    make_bar: Callable[..., Bar] | None = None,
    store: ScoreStore | None = None,
) -> Masks:
    """Prunes a saved model to the run's final sparsity with gradients of `split`; a dense one starts whole.

    Args:
        model: what is pruned; it stays as it is.
        split: texts and labels that gradients are taken on.
        run: of it `pruner`, `sparsity` and `seed` count.
        make_bar: as in `PruningHooks`.
        store: as in `PruningHooks`.

    Returns:
        New masks.

    Raises:
        ValueError: if the model has no concepts to prune for.
    """
    if model.strategy not in JOINTLY_TRAINED:
        expected = " or ".join(map(repr, JOINTLY_TRAINED))
        raise ValueError(f"the model was trained by strategy {model.strategy!r}; expected {expected}")
    return prune(
        model.config,
        _arrays_with_masks(model),
        fisher_batches(split, run.pruner, seed=run.seed),
        final_sparsity(run.sparsity, model.config.num_concepts),
        PruningOptions(run.pruner, run.sparsity, seed=run.seed),
        PruningHooks(make_bar=make_bar, store=store),
    )


def _arrays_with_masks(model: SparseCBM) -> ModelArrays:
    """Returns the model's arrays, with masks that prune nothing where it is dense."""
    return ModelArrays(model.params, whole_masks(model) if model.masks is None else model.masks, model.heads)


def num_gradients(params: Params, masks: Masks, pruner: PrunerConfig) -> int:
    """Counts the gradients that a concept's scores take, all passes together."""
    if pruner.criterion in ("magnitude", "random"):
        return 1
    if pruner.criterion != "woodfisher":
        return pruner.num_grads
    kernels = {path: leaf_at(params, path) for path in masks}
    return pruner.num_grads * len(fisher.plan_passes(kernels, pruner))


def describe_plan(params: Params, masks: Masks, pruner: PrunerConfig) -> str:
    """Says in a sentence what scoring will do, and in how much memory."""
    if pruner.criterion != "woodfisher":
        return f"criterion {pruner.criterion}"
    return "WoodFisher, " + fisher.describe_plan({path: leaf_at(params, path) for path in masks}, pruner)


def try_gradients(model: SparseCBM, split: Tokenized, run: RunConfig) -> None:
    """Takes one gradient of every width: what memory is in use afterwards is the model's and its activations'."""
    arrays = _arrays_with_masks(model)
    by_width = {batch.input_ids.shape[1]: batch for batch in fisher_batches(split, run.pruner, seed=run.seed)}
    pairs = _with_activations(model.config, arrays, list(by_width.values()))
    subnetwork = Subnetwork(model.config, arrays.params, masks_lib.concept(arrays.concept_masks, 0), arrays.heads, 0)
    for gradient in SubnetworkGradients(subnetwork, pairs, per_example=run.pruner.per_example):
        jax.block_until_ready(gradient)
