"""Ways to take in one correction, behind one type, so that they can be compared at equal numbers of corrections.

Each is a function of the model's arrays, one text, a concept and the class that it should have. Some edit the concept's
mask, some train what is left; all are to make the model read the text as asked, and what else they do is what
`streams` measures.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.continual_edit import MARGIN, MAX_ROUNDS, STRENGTH, continual_edit
from sparsecbm_jax.intervention.fixed_size_edit import intervene
from sparsecbm_jax.intervention.minimal_edit import minimal_edit
from sparsecbm_jax.intervention.ranking import EditCosts
from sparsecbm_jax.intervention.replay import Replay
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import concept_logits
from sparsecbm_jax.model.losses import least_margin
from sparsecbm_jax.model.sparse_cbm import ModelArrays


class Outcome(NamedTuple):
    """What one correction did.

    Attributes:
        state: the model's arrays now.
        num_changed: numbers of the model that changed: booleans of the masks, or trained weights.
        is_repaired: whether the text has the asked class now.
    """

    state: ModelArrays
    num_changed: int
    is_repaired: bool


Editor = Callable[[CBMConfig, ModelArrays, Batch, int, int], Outcome]
"""(config, state, batch of the one text, concept, class that it should have) → what came of it."""


def minimal(guards: Mapping[int, EditCosts] | None = None, *, margin: float = 0.0, max_pairs: int = 4096) -> Editor:
    """The smallest edit of the mask that repairs, with a guard for each concept or none; see `minimal.minimal_edit`."""

    def correct(config: CBMConfig, state: ModelArrays, batch: Batch, concept: int, target: int) -> Outcome:
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
    guards: Mapping[int, EditCosts] | None = None, *, margin: float = 0.0, max_rounds: int = 8, max_pairs: int = 4096
) -> Editor:
    """`minimal`, and then again for the corrected text that is read worst, until all are read as they were asked to be.

    An arm remembers the texts that it has corrected: it is for one stream. Where `max_rounds` edits do not do, the one
    that is worst then stays wrong.
    """
    correct_one = minimal(guards, margin=margin, max_pairs=max_pairs)
    remembered: dict[int, list[tuple[Batch, int]]] = {}

    def correct(config: CBMConfig, state: ModelArrays, batch: Batch, concept: int, target: int) -> Outcome:
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


def continual(
    guards: Mapping[int, EditCosts] | None,
    anchors: Sequence[Batch],
    *,
    margin: float = MARGIN,
    strength: float = STRENGTH,
    max_rounds: int = MAX_ROUNDS,
    num_rows: int = 64,
    seed: int = 0,
) -> Editor:
    """One edit for all corrected texts of the concept and for anchors; see `lasting.lasting_edit` and `Replay`.

    An arm remembers the texts that it has corrected: it is for one stream.
    """
    replay = Replay(anchors, num_rows=num_rows, seed=seed)

    def correct(config: CBMConfig, state: ModelArrays, batch: Batch, concept: int, target: int) -> Outcome:
        replay.hold(concept, lambda texts: concept_logits(config, *state, texts, concept))
        replay.add(concept, batch, target)
        rows, targets, logits = replay.batch(concept)
        masks, found = continual_edit(
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


def fixed_size(saliency: str, drop_fraction: float, num_steps: int = 1) -> Editor:
    """An edit of a share of the backbone given beforehand, as the paper's; see `intervention.intervene`."""

    def correct(config: CBMConfig, state: ModelArrays, batch: Batch, concept: int, target: int) -> Outcome:
        masks, edit = intervene(
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
            is_predicted_as(after, target, batch),
        )

    return correct


def _margin(config: CBMConfig, state: ModelArrays, batch: Batch, concept: int, target: int) -> float:
    logits = concept_logits(config, *state, batch, concept)
    return float(least_margin(logits, jnp.full(logits.shape[0], target), batch.example_weight))


def is_predicted_as(logits: Float[Array, "B C"], target: int, batch: Batch) -> bool:
    wanted = jnp.full(logits.shape[0], target)
    return bool(least_margin(logits, wanted, batch.example_weight) > 0)
