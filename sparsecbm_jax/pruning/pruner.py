"""Pruning events: when, how much, by which criterion; scored and cut concept by concept.

Reference: Tan et al. 2024, 'Concept-Induced Sparsity Mining'; schedules: Kurtic et al. 2022 (cubic), and the linear
one of the authors' code. Deviation: masks alone are learnt. Eq. 10 moves the surviving weights, and those are shared
by K subnetworks.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

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
from sparsecbm_jax.model.config import CBMConfig, Heads
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM, whole_masks
from sparsecbm_jax.model.strategies import JOINTLY_TRAINED
from sparsecbm_jax.pruning import fisher, patterns
from sparsecbm_jax.pruning.criteria import Criterion, make_criterion
from sparsecbm_jax.pruning.gradients import Kernels, SubnetworkGradients
from sparsecbm_jax.pruning.masks_from_scores import MaskMaker
from sparsecbm_jax.pruning.schedule import final_sparsity
from sparsecbm_jax.pruning.score_store import ScoreStore
from sparsecbm_jax.pruning.woodfisher_scores import ScoreReport, updated_kernels


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


def prune(
    config: CBMConfig,
    params: Params,
    masks: Masks,
    heads: Heads,
    batches: Sequence[Batch],
    sparsity: float | Sequence[float],
    *,
    pruner: PrunerConfig,
    cutting: SparsityConfig | None = None,
    criterion: Criterion | None = None,
    seed: int = 0,
    reports: list[ScoreReport] | None = None,
    make_bar: Callable[..., Bar] | None = None,
    on_gradient: Callable[[], object] = lambda: None,
    store: ScoreStore | None = None,
) -> Masks:
    """Scores every concept's subnetwork and cuts its mask to `sparsity`.

    Args:
        batches: where the gradients come from: pruner.num_grads minibatches, or as many rows with `per_example`.
        sparsity: pruned fraction, one for all or one for each concept.
        pruner: how weights are scored.
        cutting: of it `scope`, `regrow`, `reestimations` (cuts on the way from the present sparsity, equally far apart,
            each scored anew), `allotment`, `shared_fraction` and `pinned` count.
        criterion: a score of one's own; by default the one that `pruner.criterion` names.
        seed: of the criterion 'random'.
        reports: gets what the criterion did, cut by cut and concept by concept.
        make_bar: called with `total=`, how many gradients there are to be, makes the bar that shows them.
        on_gradient: called after each gradient; may raise to stop.
        store: gives scores that were made before, and gets those made now.

    Returns:
        New masks.
    """
    cutting = SparsityConfig() if cutting is None else cutting
    finals = np.broadcast_to(np.asarray(sparsity, float), (config.num_concepts,))
    start, cuts = 1 - masks_lib.total_density(masks), cutting.reestimations
    per_cut = num_gradients(params, masks, pruner) if criterion is None else pruner.num_grads
    bar = _NoBar() if make_bar is None else make_bar(total=config.num_concepts * cuts * per_cut)
    cutter = MaskMaker(cutting, patterns.unit_of(pruner.pattern, pruner.block_size))

    def count_gradient() -> None:
        bar.update(1)
        on_gradient()

    for cut in range(1, cuts + 1):
        pairs: list[tuple[Batch, Array]] = []
        collected: list[Kernels] = []
        reached = finals if cut == cuts else start + (finals - start) * cut / cuts
        before = masks
        for k in range(config.num_concepts):
            mask = masks_lib.concept(before, k)
            candidates = {path: jnp.ones_like(kept) for path, kept in mask.items()} if cutting.regrow else mask
            kernels = masks_lib.kernels_of(params, candidates)
            scores = None if store is None else store.get(cut, k, kernels)
            report: ScoreReport = {"is_stored": scores is not None}
            if scores is None:
                pairs = pairs or _with_activations(config, params, before, heads, batches)
                gradients = SubnetworkGradients(
                    config,
                    params,
                    candidates,
                    heads,
                    pairs,
                    k,
                    per_example=pruner.per_example,
                    limit=pruner.num_grads,
                    on_gradient=count_gradient,
                )
                if criterion is None:
                    scores = make_criterion(pruner, seed=seed, report=report)(kernels, gradients)
                else:
                    scores = patterns.spread(criterion(kernels, gradients), cutter.unit)
                if store is not None:
                    store.put(cut, k, scores)
            if reports is not None:
                reports.append(report)
            if cutter.needs_all:
                collected.append(scores)
            else:
                masks = masks_lib.replace_concept(masks, k, cutter.cut_one(mask, scores, float(reached[k])))
            # A criterion may take fewer gradients than were expected, or none.
            bar.update(max(0, ((cut - 1) * config.num_concepts + k + 1) * per_cut - bar.n))
        if cutter.needs_all:
            masks = cutter.cut_all(masks, collected, reached)
    bar.close()
    return masks


def _with_activations(
    config: CBMConfig, params: Params, masks: Masks, heads: Heads, batches: Sequence[Batch]
) -> list[tuple[Batch, Float[Array, "B K C"]]]:
    forward, arrays = make_forward(config), ModelArrays(params, jax.jit(masks_lib.pack)(masks), heads)
    return [(batch, in_turn(forward(arrays, batch).activations)) for batch in batches]


def optimal_update(
    config: CBMConfig,
    params: Params,
    before: Masks,
    after: Masks,
    heads: Heads,
    batches: Sequence[Batch],
    *,
    pruner: PrunerConfig,
) -> Params:
    """Parameters in which what `after` keeps has moved to its optimum for what was pruned since `before` (Eq. 10).

    Raises:
        ValueError: if there is more than one mask: the weights that would move are shared by all subnetworks.
    """
    if config.num_concepts != 1:
        raise ValueError(
            f"the optimal update moves surviving weights, which {config.num_concepts} subnetworks share; it is for a "
            "model of one concept"
        )
    mask, kept = masks_lib.concept(before, 0), masks_lib.concept(after, 0)
    kernels = masks_lib.kernels_of(params, mask)
    pairs = _with_activations(config, params, before, heads, batches)
    gradients = SubnetworkGradients(
        config, params, mask, heads, pairs, 0, per_example=pruner.per_example, limit=pruner.num_grads
    )
    moved = updated_kernels(kernels, gradients, kept, pruner)
    for path, leaf in moved.items():
        new = jnp.where(mask[path] & kept[path], leaf, leaf_at(params, path))
        params = with_leaf(params, path, new)
    return params


def prune_model(
    model: SparseCBM,
    split: Tokenized,
    run: RunConfig,
    *,
    make_bar: Callable[..., Bar] | None = None,
    store: ScoreStore | None = None,
) -> Masks:
    """Masks of a saved model, pruned to the run's final sparsity with gradients of `split`; a dense one starts whole.

    Args:
        run: of it `pruner`, `sparsity` and `seed` count.
        make_bar, store: see `prune`.

    Raises:
        ValueError: if the model has no concepts to prune for.
    """
    if model.strategy not in JOINTLY_TRAINED:
        expected = " or ".join(map(repr, JOINTLY_TRAINED))
        raise ValueError(f"the model was trained by strategy {model.strategy!r}; expected {expected}")
    return prune(
        model.config,
        model.params,
        whole_masks(model) if model.masks is None else model.masks,
        model.heads,
        fisher_batches(split, run.pruner, seed=run.seed),
        final_sparsity(run.sparsity, model.config.num_concepts),
        pruner=run.pruner,
        cutting=run.sparsity,
        seed=run.seed,
        make_bar=make_bar,
        store=store,
    )


def num_gradients(params: Params, masks: Masks, pruner: PrunerConfig) -> int:
    """How many gradients a concept's scores take, all passes together."""
    if pruner.criterion in ("magnitude", "random"):
        return 1
    if pruner.criterion != "woodfisher":
        return pruner.num_grads
    kernels = {path: leaf_at(params, path) for path in masks}
    return pruner.num_grads * len(fisher.plan_passes(kernels, pruner))


def describe_plan(params: Params, masks: Masks, pruner: PrunerConfig) -> str:
    """What scoring will do, and in how much memory, in a sentence."""
    if pruner.criterion != "woodfisher":
        return f"criterion {pruner.criterion}"
    return "WoodFisher, " + fisher.describe_plan({path: leaf_at(params, path) for path in masks}, pruner)


def try_gradients(model: SparseCBM, split: Tokenized, run: RunConfig) -> None:
    """Takes one gradient of every width: what memory is in use afterwards is the model's and its activations'."""
    masks = whole_masks(model) if model.masks is None else model.masks
    by_width = {batch.input_ids.shape[1]: batch for batch in fisher_batches(split, run.pruner, seed=run.seed)}
    pairs = _with_activations(model.config, model.params, masks, model.heads, list(by_width.values()))
    mask = masks_lib.concept(masks, 0)
    for gradient in SubnetworkGradients(
        model.config, model.params, mask, model.heads, pairs, 0, per_example=run.pruner.per_example
    ):
        jax.block_until_ready(gradient)
