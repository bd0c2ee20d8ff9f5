"""Ways to take in a correction: each repairs what it can, and changes what it says it changes and nothing else."""

import chex
import jax
import numpy as np
import pytest

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.evaluation.editing.baselines import fine_tune, projector_sgd, random_share, wrong_label
from sparsecbm_jax.intervention import editors
from sparsecbm_jax.intervention.editors import Editor, Outcome, fixed_size, minimal, rehearsed
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.predictions import text_batches
from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM

from tests.support.tiny_model import TEXTS, tiny_model

CONCEPT = 1
MASKS, HEADS, PARAMS = "masks", "heads", "params"
ARMS: dict[str, tuple[Editor, str, bool]] = {
    "minimal": (minimal(), MASKS, True),
    "magnitude": (fixed_size("magnitude", 0.02, num_steps=2), MASKS, False),
    "random": (random_share(0.05), MASKS, False),
    "projector_sgd": (projector_sgd(0.05), HEADS, True),
    "fine_tune": (fine_tune(1e-3), PARAMS, True),
}


@pytest.fixture(scope="module")
def model() -> SparseCBM:
    return tiny_model(num_layers=1)


@pytest.fixture(scope="module")
def batch(model: SparseCBM) -> Batch:
    return next(text_batches(model, TEXTS[:1], batch_size=1))


def logits(model: SparseCBM, state: ModelArrays, batch: Batch) -> np.ndarray:
    out = make_forward(model.config)(state.params, state.masks, state.heads, batch)
    return np.asarray(out.concept_logits[0])


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_changes_what_it_says(model: SparseCBM, batch: Batch, name: str) -> None:
    arm, part, repairs = ARMS[name]
    assert model.masks is not None
    state = ModelArrays(model.params, model.masks, model.heads)
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


def test_what_was_corrected_is_corrected_again(model: SparseCBM, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts' margins are scripted: what the second correction breaks is edited once more, and nothing after that."""
    assert model.masks is not None
    state = ModelArrays(model.params, model.masks, model.heads)
    edited: list[int] = []

    def correct(config: CBMConfig, state: ModelArrays, batch: Batch, concept: int, target: int) -> Outcome:
        edited.append(target)
        return Outcome(state, 10, True)

    margins = iter([0.5, -0.5, 0.5, 0.1, 0.2, 0.3, 0.3, -1.0, 0.3, -1.0])
    monkeypatch.setattr(editors, "minimal", lambda guards, **kwargs: correct)
    monkeypatch.setattr(editors, "_margin", lambda *args: next(margins))
    arm = rehearsed(max_rounds=2)
    outcomes = [arm(model.config, state, batch, CONCEPT, target) for target in (0, 1)]
    assert edited == [0, 1, 0] and [outcome.num_changed for outcome in outcomes] == [10, 20]
    assert all(outcome.is_repaired for outcome in outcomes)
    # Another concept has no past; and what two rounds do not do is said.
    assert arm(model.config, state, batch, 0, 2).is_repaired
    assert not arm(model.config, state, batch, 0, 1).is_repaired
    assert next(margins, None) is None


def test_a_wrong_label_is_the_next_class(model: SparseCBM, batch: Batch) -> None:
    assert model.masks is not None
    state = ModelArrays(model.params, model.masks, model.heads)
    outcome = wrong_label(minimal())(model.config, state, batch, CONCEPT, 2)
    assert outcome.is_repaired and logits(model, outcome.state, batch)[CONCEPT].argmax() == 0
