"""A sequence of corrections: counts that can be followed by hand, and edits that stay where they belong."""

from collections.abc import Sequence

import numpy as np
import pytest

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.data.batches import Tokenized, batch_of, tokenize
from sparsecbm_jax.data.schema import Examples
from sparsecbm_jax.evaluation.editing.baselines import no_correction
from sparsecbm_jax.evaluation.editing.sequential import _siblings, median_warm, run_sequence, split_by_group
from sparsecbm_jax.evaluation.editing.subject import Cell, Subject, predict_split
from sparsecbm_jax.intervention.editors import minimal
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection, MaskEdit
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM

from tests.support.tiny_model import TEXTS, tiny_model

GROUPS = ["a", "a", "b", "b", "c", "c", "d", "d"]


@pytest.fixture(scope="module")
def model() -> SparseCBM:
    return tiny_model(num_layers=1)


@pytest.fixture(scope="module")
def split(model: SparseCBM) -> Tokenized:
    texts = tuple(TEXTS) + tuple(f"{text} great" for text in TEXTS)
    rng = np.random.default_rng(0)
    concepts = rng.integers(0, 3, (len(texts), 3))
    concepts[0, 0] = -1
    labels = rng.integers(0, 2, len(texts))
    return tokenize(Examples(texts, concepts, labels, tuple(GROUPS), np.arange(len(texts))), model.tokenizer, 24)


def subject_of(model: SparseCBM, split: Tokenized, groups: Sequence[str] = GROUPS) -> Subject:
    return Subject(model.config, model.arrays, split, groups, model.class_activations)


def test_predictions_are_those_of_the_model_in_the_order_asked(model: SparseCBM, split: Tokenized) -> None:
    rows = [5, 0, 7]
    found = predict_split(model.config, model.arrays, split, rows)
    for n, row in enumerate(rows):
        output = make_forward(model.config)(model.arrays, batch_of(split, [row]))
        np.testing.assert_array_equal(found.concepts[n], np.asarray(output.concept_logits)[0].argmax(-1))
        assert found.labels[n] == np.asarray(output.label_logits)[0].argmax()


def test_without_correcting_nothing_moves(model: SparseCBM, split: Tokenized) -> None:
    arrays, report = run_sequence(subject_of(model, split), no_correction, max_edits=100, split_seed=1)
    streamed, _ = split_by_group(GROUPS, 1)
    found = predict_split(model.config, arrays, split, streamed).concepts
    gold = split.concepts[streamed]
    wrong = (found != gold) & (gold >= 0)
    assert (report.num_reviews, report.num_edits) == (4, wrong.sum())
    assert report.prequential == report.without == pytest.approx(1 - wrong.sum() / (gold >= 0).sum())
    assert report.held_out_before == report.held_out_after and report.label_before == report.label_after
    assert (report.repaired, report.retained, report.others_changed) == (0, 0, 0)
    assert report.to_dict()["changed"] == 0


def test_minimal_edits_repair_and_leave_other_concepts_alone(model: SparseCBM, split: Tokenized) -> None:
    start = model.arrays
    state, report = run_sequence(subject_of(model, split), minimal(), max_edits=3)
    assert report.num_edits >= 3 and report.repaired > 0.5 and report.changed > 0
    assert report.num_reviews < 4 or report.num_edits < 6
    np.testing.assert_array_equal(masks_lib.num_kept(state.masks), masks_lib.num_kept(start.masks))
    assert state.params is start.params and state.heads is start.heads


def test_an_editor_is_given_the_corrections_before(model: SparseCBM, split: Tokenized) -> None:
    given: list[int] = []

    def counting(config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection) -> tuple[ModelArrays, MaskEdit]:
        given.append(len(correction.earlier))
        return no_correction(config, arrays, correction)

    _, report = run_sequence(subject_of(model, split), counting, max_edits=4)
    assert given == list(range(report.num_edits)) and len(given) >= 4


def test_what_compiles_is_not_timed() -> None:
    assert median_warm([(24, 9.0), (24, 1.0), (32, 8.0), (24, 3.0), (32, 2.0)]) == 2.0
    assert np.isnan(median_warm([(24, 9.0), (32, 8.0)]))


def test_siblings_share_a_group_and_no_correction() -> None:
    gold = np.array([[0, 1], [0, 2], [1, 2], [-1, 1], [0, 1]])
    same, other = _siblings([Cell(0, 0), Cell(1, 1)], gold, ["a", "a", "a", "a", "b"])
    assert same == [Cell(1, 0), Cell(2, 1)]
    assert other == [Cell(2, 0), Cell(0, 1), Cell(3, 1)]


def test_groups_that_do_not_fit_are_refused(model: SparseCBM, split: Tokenized) -> None:
    with pytest.raises(ValueError, match="there are 2 groups, but 8 rows"):
        run_sequence(subject_of(model, split, ["a", "b"]), no_correction, max_edits=1)
    with pytest.raises(ValueError, match="all rows are of one group"):
        run_sequence(subject_of(model, split, ["a"] * 8), no_correction, max_edits=1)
    with pytest.raises(ValueError, match="0 rows do not make a batch of 4"):
        batch_of(split, [], batch_size=4)
