"""The intervention suite: figures that can be worked out by hand, editors that are what they are called."""

from typing import Any

import numpy as np
import pytest

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.data.batches import batch_of, tokenize
from sparsecbm_jax.data.schema import Examples
from sparsecbm_jax.evaluation.editing.baselines import no_correction
from sparsecbm_jax.evaluation.editing.named_editors import EDITORS, NAMED_EDITORS, RANKINGS, VARIANTS, EditorContext
from sparsecbm_jax.evaluation.editing.subject import Cell, Subject, measure, predict_split
from sparsecbm_jax.evaluation.editing.suite import (
    _task,
    minimal_edits,
    oracle,
    single_edits,
    summarise_minimal,
)
from sparsecbm_jax.intervention import editors
from sparsecbm_jax.intervention.continual_edit import ReplayedTexts
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection, MaskEdit, edit_of
from sparsecbm_jax.intervention.ranking import EditCosts
from sparsecbm_jax.model.config import CBMConfig, CBMOutput
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM

from tests.support.tiny_model import TEXTS, tiny_model

pytestmark = pytest.mark.long

CLASS_ACTIVATIONS = np.random.default_rng(3).normal(size=(3, 3, 3))
GROUPS = ("a", "a", "b", "b", "c", "c", "d", "d")


@pytest.fixture(scope="module")
def model() -> SparseCBM:
    return tiny_model(num_layers=1)


@pytest.fixture(scope="module")
def subject(model: SparseCBM) -> Subject:
    """Eight rows of random classes; the last is right in all its cells, and a cell and a label are missing."""
    texts = tuple(TEXTS) + tuple(f"{text} great" for text in TEXTS)
    rng = np.random.default_rng(0)
    concepts, labels = rng.integers(0, 3, (8, 3)), rng.integers(0, 2, 8)
    concepts[0, 0] = labels[1] = -1
    split = tokenize(Examples(texts, concepts, labels, GROUPS, np.arange(8)), model.tokenizer, 40)
    split.concepts[7] = predict_split(model.config, model.arrays, split, [7]).concepts[0]
    return Subject(model.config, model.arrays, split, GROUPS, CLASS_ACTIVATIONS)


def forward(subject: Subject, arrays: ModelArrays, row: int) -> CBMOutput:
    return make_forward(subject.config)(arrays, batch_of(subject.split, [row]))


def accuracies(subject: Subject) -> tuple[float, float]:
    gold, labels = subject.split.concepts, subject.split.labels
    found, is_cell, is_label = subject.predictions, gold >= 0, labels >= 0
    return float(np.mean((found.concepts == gold)[is_cell])), float(np.mean((found.labels == labels)[is_label]))


def test_rows_are_drawn_by_their_wrong_cells(subject: Subject) -> None:
    everything = subject.draw(0, seed=0)
    assert sorted(everything) == [row for row in range(8) if subject.wrong_of(row)] and 7 not in everything
    assert subject.draw(0, seed=1) != everything
    for most in (1, 4, 6):
        rows = subject.draw(most, seed=0)
        counts = [len(subject.wrong_of(row)) for row in everything]
        assert rows == everything[: len(rows)]
        assert len(rows) == 1 or sum(counts[: len(rows)]) <= most
        assert sum(counts[: len(rows) + 1]) > most
    assert subject.draw_held_out([0, 2], 0, seed=0) == [4, 5, 6, 7]
    assert len(subject.draw_held_out([0], 3, seed=0)) == 3
    perfect = subject.split._replace(concepts=subject.predictions.concepts)
    with pytest.raises(ValueError, match="there is nothing to correct"):
        Subject(subject.config, subject.arrays, perfect, GROUPS, CLASS_ACTIVATIONS).draw(0, seed=0)


def test_without_an_edit_the_figure_is_the_models_own(subject: Subject) -> None:
    rows = subject.draw(4, seed=0)
    found = single_edits(subject, no_correction, rows, subject.draw_held_out(rows[:1], 0, 0), num_side_edits=1)
    assert (found["concept"], found["task"]) == pytest.approx(accuracies(subject))
    assert (found["repaired"], found["changed"], len(found["side"])) == (0, 0, 1)
    (side,) = found["side"]
    assert side["concept_before"] == side["concept_after"] and side["task_before"] == side["task_after"]


def by_bias(config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection) -> tuple[ModelArrays, MaskEdit]:
    """Repairs for sure, and at any price: every text is predicted as the target then."""
    projector = dict(arrays.heads["projector"])
    projector["bias"] = projector["bias"].at[correction.concept, correction.target].add(1e3)
    new = arrays._replace(heads={**arrays.heads, "projector": projector})
    return new, edit_of(config, arrays, new, correction)


def test_each_row_is_corrected_by_itself_and_the_price_is_seen(subject: Subject) -> None:
    split, rows, calls = subject.split, subject.draw(0, seed=0), []
    everywhere = list(range(8))
    found = single_edits(subject, by_bias, rows, everywhere, num_side_edits=2, on_edit=lambda: calls.append(None))
    assert found["num_cells"] == len(calls) == subject.wrong.sum()
    assert (found["repaired"], found["concept"], found["changed"], len(found["side"])) == (1, 1, 1, 2)
    for side, row in zip(found["side"], rows, strict=False):
        k = subject.wrong_of(row)[0]
        gold = split.concepts[:, k]
        assert side["concept_after"] == pytest.approx(np.mean(gold[gold >= 0] == gold[row]))
        assert side["concept_before"] == pytest.approx(np.mean((subject.predictions.concepts[:, k] == gold)[gold >= 0]))
    labels = subject.predictions.labels.copy()
    for row in rows:
        arrays = subject.arrays
        for k in subject.wrong_of(row):
            correction = ConceptCorrection(batch_of(split, [row]), k, int(split.concepts[row, k]))
            arrays, _ = by_bias(subject.config, arrays, correction)
        output = forward(subject, arrays, row)
        labels[row] = np.asarray(output.label_logits)[0].argmax()
    assert found["task"] == pytest.approx(np.mean((labels == split.labels)[split.labels >= 0]))


def test_rows_that_were_not_drawn_fare_as_those_that_were(subject: Subject) -> None:
    before, labelled = accuracies(subject)[1], np.flatnonzero(subject.split.labels >= 0)
    rows = [row for row in labelled if subject.wrong_of(row)]
    was = {row: bool(subject.predictions.labels[row] == subject.split.labels[row]) for row in rows}
    first_wrong = next(row for row in rows if not was[row])
    assert _task(subject, {}) == _task(subject, {first_wrong: False}) == pytest.approx(before)
    gained = sum(not right for right in was.values()) / len(labelled)
    assert _task(subject, {first_wrong: True}) == pytest.approx(before + gained)


def test_the_oracle_sets_activations(subject: Subject) -> None:
    split, heads, right = subject.split, subject.arrays.heads, []
    for row in np.flatnonzero(split.labels >= 0):
        activations = np.asarray(forward(subject, subject.arrays, row).activations).copy()
        for k in subject.wrong_of(row):
            activations[0, k] = CLASS_ACTIVATIONS[k, split.concepts[row, k]]
        logits = np.einsum("kc,kcy->y", activations[0], heads["predictor"]["kernel"]) + heads["predictor"]["bias"]
        right.append(logits.argmax() == split.labels[row])
    assert oracle(subject, subject.draw(0, seed=0))["task"] == pytest.approx(np.mean(right))


def test_smallest_edits_are_seen_to_be_smallest(subject: Subject) -> None:
    # Of one row, whose program other tests compile as well.
    cells = [Cell(1, k) for k in subject.wrong_of(1)]
    found = dict(minimal_edits(subject, cells, max_pairs=4096))
    assert list(found) == cells
    repaired = [one for one in found.values() if one["is_repaired"]]
    assert repaired
    for one in repaired:
        assert one["margin"] > 0 >= one["margin_below"] and one["changed"] % 2 == 0 < one["changed"]
    assert next(iter(found.values()))["seconds"] is None


def test_a_summary_counts_those_that_were_repaired() -> None:
    found = [{"is_repaired": n < 4, "changed": 2 * n + 2, "seconds": [None, 1.0, 3.0][n % 3]} for n in range(5)]
    summary = summarise_minimal(found, num_weights=1000)
    assert (summary["num_cells"], summary["repaired"], summary["seconds"]) == (5, 0.8, 1.0)
    assert summary["changed"] == {"0.1": 4, "0.25": 4, "0.5": 6, "0.75": 8, "0.9": 8, "1.0": 8}
    assert summary["share"]["0.5"] == pytest.approx(0.006)
    assert summarise_minimal([], 1000)["changed"]["0.5"] is None


@pytest.mark.parametrize("name", ["none", "oracle", "costed", "rehearsed", "wrong_label"])
def test_an_editor_is_what_it_is_called(subject: Subject, name: str) -> None:
    row, k = 1, 1
    batch = batch_of(subject.split, [row])
    context = EditorContext(subject.config, subject.arrays, [batch], CLASS_ACTIVATIONS)
    predicted = int(subject.predictions.concepts[row, k])
    correction = ConceptCorrection(batch, k, (predicted + 1) % 3)
    outcome = measure(EDITORS[name].make(context, 0), subject.config, subject.arrays, correction)
    assert vars(context).keys() & {"costs", "projected_costs"} == {
        "costed": {"costs"},
        "rehearsed": {"costs", "projected_costs"},
    }.get(name, set())
    if name in ("none", "oracle"):
        assert outcome.arrays is subject.arrays and outcome.num_changed == 0
        assert outcome.is_repaired == (name == "oracle")
        return
    after = predict_split(subject.config, outcome.arrays, subject.split, [row]).concepts[0, k]
    assert after == (predicted + (2 if name == "wrong_label" else 1)) % 3
    # A wrong label counts as repaired where the text got the class that was asked for by mistake.
    assert outcome.is_repaired


@pytest.mark.parametrize("name", ["continual", *VARIANTS])
def test_a_variant_has_the_settings_of_its_title(subject: Subject, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def edit(
        config: CBMConfig, arrays: ModelArrays, concept: int, texts: ReplayedTexts, *, costs: Any, settings: Any
    ) -> tuple[Any, None]:
        given.update(settings._asdict(), costs=costs, num_rows=texts.batch.input_ids.shape[0])
        return arrays.masks, None

    monkeypatch.setattr(editors, "continual_edit", edit)
    batch, costs = batch_of(subject.split, [1]), EditCosts({})
    context = EditorContext(subject.config, subject.arrays, [batch], CLASS_ACTIVATIONS)
    vars(context)["sharp_costs"] = {1: costs}
    editor = NAMED_EDITORS[name].make(context, 0)
    arrays, _ = editor(subject.config, subject.arrays, ConceptCorrection(batch, 1, 0))
    assert arrays == subject.arrays
    usual = {"margin": 0.5, "strength": 2.0, "max_rounds": 8, "num_rows": 64, "costs": costs}
    changed = {
        "continual_slack": {"strength": 1.0, "margin": 1.0},
        "continual_tight": {"strength": 4.0},
        "continual_free": {"strength": 0.0},
        "continual_uncosted": {"costs": None},
        "continual_short": {"max_rounds": 4},
        "continual_wide": {"num_rows": 128},
    }
    assert given == usual | changed.get(name, {})


def test_a_ranking_has_the_share_that_it_is_given(subject: Subject) -> None:
    batch = batch_of(subject.split, [1])
    total = masks_lib.num_weights(subject.arrays.masks)
    outcome = measure(RANKINGS["random"](0.1, 0), subject.config, subject.arrays, ConceptCorrection(batch, 1, 0))
    assert outcome.num_changed == 2 * round(0.1 * total)
