"""Ways to take in a correction: each repairs what it can, and changes what it says it changes and nothing else."""

import chex
import jax
import numpy as np
import pytest
from tiny_model import TEXTS, tiny_model

from sparsecbm_jax import arms, artifact, cbm
from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.arms import Arm, State
from sparsecbm_jax.artifact import SparseCBM
from sparsecbm_jax.data.batches import Batch

CONCEPT = 1
MASKS, HEADS, PARAMS = "masks", "heads", "params"
ARMS: dict[str, tuple[Arm, str, bool]] = {
    "minimal": (arms.minimal(max_pairs=64), MASKS, True),
    "magnitude": (arms.fixed_share("magnitude", 0.02, num_steps=2), MASKS, False),
    "random": (arms.random_share(0.05), MASKS, False),
    "projector_sgd": (arms.projector_sgd(0.05), HEADS, True),
    "fine_tune": (arms.fine_tune(1e-3), PARAMS, True),
}


@pytest.fixture(scope="module")
def model() -> SparseCBM:
    return tiny_model(num_layers=1)


@pytest.fixture(scope="module")
def batch(model: SparseCBM) -> Batch:
    return next(artifact.text_batches(model, TEXTS[:1], batch_size=2))


def logits(model: SparseCBM, state: State, batch: Batch) -> np.ndarray:
    out = cbm.forward(model.config, state.params, state.masks, state.heads, batch)
    return np.asarray(out.concept_logits[0])


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_changes_what_it_says(model: SparseCBM, batch: Batch, name: str) -> None:
    arm, part, repairs = ARMS[name]
    assert model.masks is not None
    state = State(model.params, model.masks, model.heads)
    before = logits(model, state, batch)
    target = int(np.argsort(before[CONCEPT])[-2])
    outcome = arm(model.config, state, batch, CONCEPT, target)
    after = logits(model, outcome.state, batch)
    assert outcome.is_repaired == (after[CONCEPT].argmax() == target)
    assert outcome.is_repaired or not repairs
    for other in {MASKS, HEADS, PARAMS} - {part}:
        chex.assert_trees_all_equal(getattr(outcome.state, other), getattr(state, other))
    old, new = jax.tree.leaves(getattr(state, part)), jax.tree.leaves(getattr(outcome.state, part))
    changed = sum(int(np.sum(np.asarray(a) != np.asarray(b))) for a, b in zip(old, new, strict=True))
    assert 0 < changed <= outcome.num_changed
    np.testing.assert_array_equal(masks_lib.num_kept(outcome.state.masks), masks_lib.num_kept(model.masks))
    if part != PARAMS:
        others = [0, 2]
        np.testing.assert_allclose(after[others], before[others], atol=1e-5)


def test_what_was_corrected_is_corrected_again(model: SparseCBM) -> None:
    assert model.masks is not None
    state = State(model.params, model.masks, model.heads)
    texts = [next(artifact.text_batches(model, [text], batch_size=1)) for text in TEXTS[:2]]
    targets = [int(np.argsort(logits(model, state, text)[CONCEPT])[-2]) for text in texts]
    arm = arms.rehearsed(margin=0.01, max_pairs=64)
    for text, target in zip(texts, targets, strict=True):
        outcome = arm(model.config, state, text, CONCEPT, target)
        state = outcome.state
    assert outcome.is_repaired
    assert [logits(model, state, text)[CONCEPT].argmax() for text in texts] == targets


def test_a_wrong_label_is_the_next_class(model: SparseCBM, batch: Batch) -> None:
    assert model.masks is not None
    state = State(model.params, model.masks, model.heads)
    outcome = arms.wrong_label(arms.minimal(max_pairs=64))(model.config, state, batch, CONCEPT, 2)
    assert outcome.is_repaired and logits(model, outcome.state, batch)[CONCEPT].argmax() == 0
