"""Ways to take in a correction: each repairs what it can, and changes what it says it changes and nothing else."""

import chex
import jax
import numpy as np
import pytest

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.evaluation.editing.baselines import (
    fine_tune,
    no_correction,
    projector_sgd,
    random_share,
    wrong_label,
)
from sparsecbm_jax.evaluation.editing.subject import measure
from sparsecbm_jax.intervention import editors
from sparsecbm_jax.intervention.editors import Editor, Rehearsed, fixed_size, minimal
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection, MaskEdit
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.predictions import text_batches
from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM

from tests.support.tiny_model import TEXTS, tiny_model

CONCEPT = 1
MASKS, HEADS, PARAMS = "masks", "heads", "params"
EDITORS: dict[str, tuple[Editor, str, bool]] = {
    "minimal": (minimal(), MASKS, True),
    "magnitude": (fixed_size(0.02, "magnitude", num_steps=2), MASKS, False),
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
    return np.asarray(make_forward(model.config)(state, batch).concept_logits[0])


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_changes_what_it_says(model: SparseCBM, batch: Batch, name: str) -> None:
    editor, part, repairs = EDITORS[name]
    state = model.arrays
    before = logits(model, state, batch)
    target = int(np.argsort(before[CONCEPT])[-2])
    outcome = measure(editor, model.config, state, ConceptCorrection(batch, CONCEPT, target))
    after = logits(model, outcome.arrays, batch)
    assert outcome.is_repaired == (after[CONCEPT].argmax() == target)
    assert outcome.is_repaired or not repairs
    for other in {MASKS, HEADS, PARAMS} - {part}:
        chex.assert_trees_all_equal(getattr(outcome.arrays, other), getattr(state, other))
    old, new = jax.tree.leaves(getattr(state, part)), jax.tree.leaves(getattr(outcome.arrays, part))
    changed = sum(int(np.sum(np.asarray(a) != np.asarray(b))) for a, b in zip(old, new, strict=True))
    assert 0 < changed == outcome.num_changed
    np.testing.assert_array_equal(masks_lib.num_kept(outcome.arrays.masks), masks_lib.num_kept(model.masks))
    if part != PARAMS:
        others = [0, 2]
        np.testing.assert_allclose(after[others], before[others], atol=1e-5)


def test_what_was_corrected_is_corrected_again(model: SparseCBM, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Margins of texts are scripted: what the second correction breaks is edited once more, and nothing after that."""
    edited: list[int] = []

    def noted(config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection) -> tuple[ModelArrays, MaskEdit]:
        edited.append(int(correction.target))
        return minimal()(config, arrays, correction)

    margins = iter([0.5, -0.5, 0.5, 0.1, 0.2, 0.3, 0.3, -1.0, 0.3, -1.0])
    monkeypatch.setattr(editors, "_margin", lambda *args: next(margins))
    editor = Rehearsed(noted, max_rounds=2)  # type: ignore[arg-type]
    asked: list[ConceptCorrection] = []
    # Another concept has no past; and two rounds are the most.
    for concept, target, expected in ((CONCEPT, 0, [0]), (CONCEPT, 1, [1, 0]), (0, 2, [2]), (0, 1, [1, 1])):
        correction = ConceptCorrection(batch, concept, target)
        editor(model.config, model.arrays, correction._replace(earlier=tuple(asked)))
        asked.append(correction)
        assert edited == expected
        edited.clear()
    assert next(margins, None) is None


def test_a_wrong_label_is_the_next_class(model: SparseCBM, batch: Batch) -> None:
    arrays, edit = wrong_label(minimal())(model.config, model.arrays, ConceptCorrection(batch, CONCEPT, 2))
    assert int(edit.target[0]) == 0 and logits(model, arrays, batch)[CONCEPT].argmax() == 0


def test_an_editor_says_what_it_is() -> None:
    assert editors.describe(fixed_size(0.02, "magnitude")) == (
        "fixed_size",
        {"drop_fraction": 0.02, "saliency": "magnitude", "num_steps": 1},
    )
    assert editors.describe(Rehearsed(minimal(margin=1.0), 3)) == (
        "rehearsed",
        {"minimal": {"name": "minimal", "margin": 1.0, "max_pairs": 4096}, "max_rounds": 3},
    )
    assert editors.describe(no_correction) == ("no_correction", {})
