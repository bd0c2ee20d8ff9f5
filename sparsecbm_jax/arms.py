"""Ways to take in one correction, behind one type, so that they can be compared at equal numbers of corrections.

Each is a function of the model's arrays, one text, a concept and the class that it should have. Some edit the concept's
mask, some train what is left; all are to make the model read the text as asked, and what else they do is what
`streams` measures.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsecbm_jax import cbm, intervention
from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.cbm import CBMConfig, Heads
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention import Guard
from sparsecbm_jax.lasting import MARGIN, MAX_ROUNDS, STRENGTH, Replay, concept_logits, lasting_edit
from sparsecbm_jax.masks import Masks, Params
from sparsecbm_jax.minimal import least_margin, minimal_edit


class State(NamedTuple):
    """What a correction may change."""

    params: Params
    masks: Masks
    heads: Heads


class Outcome(NamedTuple):
    """What one correction did.

    Attributes:
      state: the model's arrays now.
      num_changed: numbers of the model that changed: booleans of the masks, or trained weights.
      is_repaired: whether the text has the asked class now.
    """

    state: State
    num_changed: int
    is_repaired: bool


Arm = Callable[[CBMConfig, State, Batch, int, int], Outcome]
"""(config, state, batch of the one text, concept, class that it should have) → what came of it."""


def minimal(guards: Mapping[int, Guard] | None = None, *, margin: float = 0.0, max_pairs: int = 4096) -> Arm:
    """The smallest edit of the mask that repairs, with a guard for each concept or none; see `minimal.minimal_edit`."""

    def correct(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> Outcome:
        masks, found = minimal_edit(
            config,
            state.params,
            state.masks,
            state.heads,
            batch,
            concept,
            target,
            margin=margin,
            guard=None if guards is None else guards[concept],
            max_pairs=max_pairs,
        )
        return Outcome(state._replace(masks=masks), 2 * int(found.num_pairs), bool(found.is_repaired))

    return correct


def rehearsed(
    guards: Mapping[int, Guard] | None = None, *, margin: float = 0.0, max_rounds: int = 8, max_pairs: int = 4096
) -> Arm:
    """`minimal`, and then again for the corrected text that is read worst, until all are read as they were asked to be.

    An arm remembers the texts that it has corrected: it is for one stream. Where `max_rounds` edits do not do, the one
    that is worst then stays wrong.
    """
    correct_one = minimal(guards, margin=margin, max_pairs=max_pairs)
    remembered: dict[int, list[tuple[Batch, int]]] = {}

    def correct(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> Outcome:
        cells = remembered.setdefault(concept, [])
        cells.append((batch, target))
        num_changed, worst = 0, len(cells) - 1
        for _ in range(max_rounds):
            outcome = correct_one(config, state, cells[worst][0], concept, cells[worst][1])
            state, num_changed = outcome.state, num_changed + outcome.num_changed
            margins = [_margin(config, state, text, concept, asked) for text, asked in cells]
            worst = min(range(len(cells)), key=margins.__getitem__)
            if margins[worst] > 0:
                break
        return Outcome(state, num_changed, margins[-1] > 0)

    return correct


def lasting(
    guards: Mapping[int, Guard] | None,
    anchors: Sequence[Batch],
    *,
    margin: float = MARGIN,
    strength: float = STRENGTH,
    max_rounds: int = MAX_ROUNDS,
    num_rows: int = 64,
    seed: int = 0,
) -> Arm:
    """One edit for all corrected texts of the concept and for anchors; see `lasting.lasting_edit` and `Replay`.

    An arm remembers the texts that it has corrected: it is for one stream.
    """
    replay = Replay(anchors, num_rows=num_rows, seed=seed)

    def correct(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> Outcome:
        replay.hold(concept, lambda texts: concept_logits(config, *state, texts, concept))
        replay.add(concept, batch, target)
        rows, targets, logits = replay.batch(concept)
        masks, found = lasting_edit(
            config,
            state.params,
            state.masks,
            state.heads,
            rows,
            concept,
            targets,
            logits,
            guard=None if guards is None else guards[concept],
            margin=margin,
            strength=strength,
            max_rounds=max_rounds,
        )
        return Outcome(state._replace(masks=masks), int(found.num_changed), bool(found.margins[0] > 0))

    return correct


def fixed_share(saliency: str, drop_fraction: float, num_steps: int = 1) -> Arm:
    """An edit of a share of the backbone given beforehand, as the paper's; see `intervention.intervene`."""

    def correct(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> Outcome:
        masks, edit = intervention.intervene(
            config,
            state.params,
            state.masks,
            state.heads,
            batch,
            concept,
            target,
            drop_fraction,
            saliency=saliency,
            num_steps=num_steps,
        )
        after = edit.concept_logits_after[:, concept]
        return Outcome(
            state._replace(masks=masks),
            2 * int(edit.num_per_step) * num_steps,
            _is_read_as(after, target, batch),
        )

    return correct


def random_share(drop_fraction: float, seed: int = 0) -> Arm:
    """Drops and grows weights by lot: what changing so many does by itself."""
    keys = iter(jax.random.split(jax.random.key(seed), 2**16))

    def correct(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> Outcome:
        count = round(drop_fraction * masks_lib.num_weights(state.masks))
        mask = _random_edit(masks_lib.concept(state.masks, concept), jnp.uint32(count), next(keys))
        new = state._replace(masks=masks_lib.replace_concept(state.masks, concept, mask))
        return Outcome(new, 2 * count, _is_read_as(concept_logits(config, *new, batch, concept), target, batch))

    return correct


def projector_sgd(learning_rate: float, max_steps: int = 100) -> Arm:
    """Gradient steps on the concept's projector ψ_k and β_k alone, until the text is read as asked."""

    def correct(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> Outcome:
        heads = _projector_sgd(config, state, batch, concept, target, learning_rate, max_steps)
        new = state._replace(heads=heads)
        kernel = state.heads["projector"]["kernel"]
        changed = (kernel.shape[1] + 1) * kernel.shape[2]
        return Outcome(new, changed, _is_read_as(concept_logits(config, *new, batch, concept), target, batch))

    return correct


def fine_tune(learning_rate: float, max_steps: int = 100) -> Arm:
    """Gradient steps on the whole backbone, through the concept's subnetwork, until the text is read as asked."""

    def correct(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> Outcome:
        params = _fine_tune(config, state, batch, concept, target, learning_rate, max_steps)
        new = state._replace(params=params)
        changed = sum(leaf.size for leaf in jax.tree.leaves(params))
        return Outcome(new, changed, _is_read_as(concept_logits(config, *new, batch, concept), target, batch))

    return correct


def wrong_label(arm: Arm) -> Arm:
    """Another arm that is given the next class instead of the right one: a person's slip."""

    def correct(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> Outcome:
        return arm(config, state, batch, concept, (target + 1) % config.num_classes)

    return correct


def _kernels(state: State, concept: int | Int[Array, ""]) -> dict[str, Float[Array, "1 ..."]]:
    mask = masks_lib.concept(state.masks, concept)
    return {path: kernel[None] for path, kernel in masks_lib.kernels_of(state.params, mask).items()}


def _project(heads: Heads, z: Float[Array, "B 1 D"], concept: int | Int[Array, ""]) -> Float[Array, "B C"]:
    own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, concept, 0), heads["projector"])
    return cbm.project({"projector": own}, z)[:, 0]


def _margin(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> float:
    logits = concept_logits(config, *state, batch, concept)
    return float(least_margin(logits, jnp.full(logits.shape[0], target), batch.example_weight))


def _is_read_as(logits: Float[Array, "B C"], target: int, batch: Batch) -> bool:
    wanted = jnp.full(logits.shape[0], target)
    return bool(least_margin(logits, wanted, batch.example_weight) > 0)


@jax.jit
def _random_edit(mask: dict[str, Array], count: Array, key: Array) -> dict[str, Array]:
    keys = jax.random.split(key, len(mask))
    scores = {path: jax.random.uniform(k, mask[path].shape) for k, path in zip(keys, sorted(mask), strict=True)}
    return masks_lib.drop_and_grow(mask, scores, scores, count).mask


def _descend(
    loss_and_margin: Callable[[Params], tuple[Array, Array]], start: Params, learning_rate: Array, max_steps: Array
) -> Params:
    """Plain gradient steps while the least margin is not above zero."""

    def step(carry: tuple[Params, Array, Array]) -> tuple[Params, Array, Array]:
        tree, _, number = carry
        grads = jax.grad(lambda leaves: loss_and_margin(leaves)[0])(tree)
        tree = jax.tree.map(lambda leaf, grad: leaf - learning_rate * grad, tree, grads)
        return tree, loss_and_margin(tree)[1], number + 1

    def goes_on(carry: tuple[Params, Array, Array]) -> Array:
        return (carry[1] <= 0) & (carry[2] < max_steps)

    return jax.lax.while_loop(goes_on, step, (start, loss_and_margin(start)[1], jnp.int32(0)))[0]


def _entropy_and_margin(logits: Float[Array, "B C"], target: Array, batch: Batch) -> tuple[Array, Array]:
    weights = jnp.asarray(batch.example_weight)
    entropy = -jax.nn.log_softmax(logits)[:, target]
    wanted = jnp.broadcast_to(target, logits.shape[:1])
    return jnp.sum(weights * entropy) / jnp.sum(weights), least_margin(logits, wanted, weights)


@functools.partial(jax.jit, static_argnums=0)
def _projector_sgd(
    config: CBMConfig, state: State, batch: Batch, concept: Array, target: Array, rate: Array, max_steps: Array
) -> Heads:
    z = cbm.encode(config, state.params, batch, kernels=_kernels(state, concept))

    def loss_and_margin(projector: Params) -> tuple[Array, Array]:
        return _entropy_and_margin(_project({"projector": projector}, z, concept), target, batch)

    # Rows of the other concepts get no gradient.
    trained = _descend(loss_and_margin, dict(state.heads["projector"]), rate, max_steps)
    return {**state.heads, "projector": trained}


@functools.partial(jax.jit, static_argnums=0)
def _fine_tune(
    config: CBMConfig, state: State, batch: Batch, concept: Array, target: Array, rate: Array, max_steps: Array
) -> Params:
    def loss_and_margin(params: Params) -> tuple[Array, Array]:
        z = cbm.encode(config, params, batch, kernels=_kernels(state._replace(params=params), concept))
        return _entropy_and_margin(_project(state.heads, z, concept), target, batch)

    return _descend(loss_and_margin, state.params, rate, max_steps)
