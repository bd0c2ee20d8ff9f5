"""Pruning events: when, how much, by which criterion; scored and cut concept by concept.

Reference: Tan et al. 2024, 'Concept-Induced Sparsity Mining'; schedules: Kurtic et al. 2022 (cubic), and the linear
one of the authors' code. Deviation: masks alone are learnt. Eq. 10 moves the surviving weights, and those are shared
by K subnetworks.
"""

import json
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsecbm_jax import fisher, patterns
from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.artifact import SparseCBM
from sparsecbm_jax.backbones import maskable_paths
from sparsecbm_jax.blockwise import Report, updated_kernels
from sparsecbm_jax.cbm import CBMConfig, Heads, make_forward
from sparsecbm_jax.checkpoint import Checkpointer
from sparsecbm_jax.config import PrunerConfig, RunConfig, SparsityConfig
from sparsecbm_jax.criteria import Criterion, make_criterion
from sparsecbm_jax.cutting import ConceptMask, allot, prune_concept, prune_in_common
from sparsecbm_jax.data.batches import Batch, Tokenized, train_batches
from sparsecbm_jax.fisher import Kernels
from sparsecbm_jax.masks import Masks, Params
from sparsecbm_jax.patterns import Unit
from sparsecbm_jax.sharding import in_turn

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


class StoredScores:
    """A `ScoreStore` on disk: a checkpoint for each cut and concept, at four bytes a weight."""

    def __init__(
        self, checkpoints: Checkpointer, num_concepts: int, about: Mapping[str, Any], *, discards_others: bool = False
    ) -> None:
        """Keeps scores in `checkpoints`.

        Args:
          about: JSON that says what the scores are of.
          discards_others: scores of something else are deleted; else asking for them is an error.
        """
        self._checkpoints, self._num_concepts = checkpoints, num_concepts
        self._about = json.loads(json.dumps(about))
        if discards_others and any(checkpoints.read_meta(step) != self._about for step in checkpoints.steps()):
            checkpoints.clear()

    def __len__(self) -> int:
        return len(self._checkpoints.steps())

    def clear(self) -> None:
        """Deletes all scores."""
        self._checkpoints.clear()

    def _step(self, cut: int, concept: int) -> int:
        return (cut - 1) * self._num_concepts + concept

    def get(self, cut: int, concept: int, like: Kernels) -> Kernels | None:
        """See `ScoreStore`.

        Raises:
          ValueError: if the scores there are of something else.
          CheckpointError: if they are damaged.
        """
        step = self._step(cut, concept)
        if step not in self._checkpoints.steps():
            return None
        if (found := self._checkpoints.read_meta(step)) != self._about:
            keys = [key for key in {**found, **self._about} if found.get(key) != self._about.get(key)]
            shown = "; ".join(f"{key}: saved {found.get(key)}, current {self._about.get(key)}" for key in keys)
            raise ValueError(f"the scores that are stored are of something else: {shown}")
        return self._checkpoints.restore(step, dict(like))

    def put(self, cut: int, concept: int, scores: Kernels) -> None:
        """See `ScoreStore`."""
        self._checkpoints.save(self._step(cut, concept), dict(scores), self._about)


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


class ScoreStore(Protocol):
    """Keeps the scores of a cut and concept, so that an event that was stopped, or a cut at another sparsity, need not
    make them again."""

    def get(self, cut: int, concept: int, like: Kernels) -> Kernels | None:
        """The scores, placed as `like` is, or None where there are none."""

    def put(self, cut: int, concept: int, scores: Kernels) -> None:
        """Keeps scores."""


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
    reports: list[Report] | None = None,
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
    cutter = _Cutter(cutting, patterns.unit_of(pruner.pattern, pruner.block_size))

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
            report: Report = {"is_stored": scores is not None}
            if scores is None:
                pairs = pairs or _with_activations(config, params, before, heads, batches)
                gradients = fisher.SubnetworkGradients(
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
    forward, packed = make_forward(config), jax.jit(masks_lib.pack)(masks)
    return [(batch, in_turn(forward(params, packed, heads, batch).activations)) for batch in batches]


class _Cutter:
    """Cuts masks as `config.sparsity` says, by the scores of one concept or of all."""

    def __init__(self, config: SparsityConfig, unit: Unit) -> None:
        if config.shared_fraction and unit.pruned < unit.group:
            raise ValueError("config.sparsity.shared_fraction goes with no N:M pattern: concepts choose other weights")
        self._config, self.unit = config, unit
        self.needs_all = config.allotment == "loss" or config.shared_fraction > 0

    def cut_one(self, mask: ConceptMask, scores: Kernels, sparsity: float, regrow: bool | None = None) -> ConceptMask:
        return prune_concept(
            mask,
            scores,
            sparsity,
            scope=self._config.scope,
            regrow=self._config.regrow if regrow is None else regrow,
            unit=self.unit,
            pinned=self._config.pinned,
        )

    def cut_all(self, masks: Masks, scores: Sequence[Kernels], sparsity: Float[np.ndarray, " K"]) -> Masks:
        if self._config.regrow:
            masks = {path: jnp.ones_like(mask) for path, mask in masks.items()}
        if self._config.allotment == "loss":
            sparsity = np.array(allot(scores, float(np.mean(sparsity))))
        if self._config.shared_fraction:
            common = self._config.shared_fraction * float(np.min(sparsity))
            masks = prune_in_common(masks, scores, common, self.unit, self._config.pinned)
            too_sparse = 1 - masks_lib.total_density(masks) > sparsity + 1e-6
            if too_sparse.any():
                raise ValueError(
                    f"config.sparsity.shared_fraction is {self._config.shared_fraction:g}, but the masks differ too "
                    f"much by now: concept {int(np.argmax(too_sparse))} would lose more than its sparsity asks for"
                )
        for k, of_concept in enumerate(scores):
            mask = self.cut_one(masks_lib.concept(masks, k), of_concept, float(sparsity[k]), regrow=False)
            masks = masks_lib.replace_concept(masks, k, mask)
        return masks


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
    gradients = fisher.SubnetworkGradients(
        config, params, mask, heads, pairs, 0, per_example=pruner.per_example, limit=pruner.num_grads
    )
    moved = updated_kernels(kernels, gradients, kept, pruner)
    for path, leaf in moved.items():
        new = jnp.where(mask[path] & kept[path], leaf, masks_lib.leaf_at(params, path))
        params = masks_lib.with_leaf(params, path, new)
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
    if model.strategy not in ("joint", "sparse"):
        raise ValueError(f"the model was trained by strategy {model.strategy!r}; expected 'joint' or 'sparse'")
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


def whole_masks(model: SparseCBM) -> Masks:
    """Masks that prune nothing."""
    return masks_lib.create(model.params, maskable_paths(model.config.backbone), model.config.num_concepts)


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


def try_gradients(model: SparseCBM, split: Tokenized, run: RunConfig) -> None:
    """Takes one gradient of every width: what memory is in use afterwards is the model's and its activations'."""
    masks = whole_masks(model) if model.masks is None else model.masks
    by_width = {batch.input_ids.shape[1]: batch for batch in fisher_batches(split, run.pruner, seed=run.seed)}
    pairs = _with_activations(model.config, model.params, masks, model.heads, list(by_width.values()))
    mask = masks_lib.concept(masks, 0)
    for gradient in fisher.SubnetworkGradients(
        model.config, model.params, mask, model.heads, pairs, 0, per_example=run.pruner.per_example
    ):
        jax.block_until_ready(gradient)


def num_fisher_batches(config: PrunerConfig) -> int:
    """Minibatches that hold `num_grads` gradients."""
    return int(np.ceil(config.num_grads / config.grad_batch_size)) if config.per_example else config.num_grads
