"""Corrections that stay in force: their file, and each new one with those before it in view."""

import dataclasses
import json
from pathlib import Path

import chex
import pytest

from sparsecbm_jax.core import masks
from sparsecbm_jax.correction.corrector import ContinualCorrector
from sparsecbm_jax.correction.request_file import CorrectionRequest, RequestFile
from sparsecbm_jax.evaluation.editing.named_editors import EDITORS, EditorContext
from sparsecbm_jax.intervention.edit_log import EditLog
from sparsecbm_jax.intervention.stored_edit import StoredEdit
from sparsecbm_jax.model.predictions import predict, text_batches
from sparsecbm_jax.model.sparse_cbm import ModelArrays

from tests.support.tiny_model import TEXTS
from tests.support.tiny_session import anchors, asked_otherwise, model

CASES = (CorrectionRequest("the soup\nwas “cold”", "food", "Negative"), CorrectionRequest("", "service", "unknown"))


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    kept = RequestFile(tmp_path / "a folder to be made" / "cases.jsonl")
    for case in CASES:
        kept.add(case)
    assert kept.cases == RequestFile(kept.path).cases == list(CASES)
    by_hand = json.dumps(CASES[0]._asdict())
    kept.path.write_text(by_hand)
    kept = RequestFile(kept.path)
    kept.add(CASES[1])
    assert RequestFile(kept.path).cases == list(CASES) and kept.path.read_text().startswith(f"{by_hand}\n")


@pytest.mark.parametrize("length", [1, 20, 60])
def test_a_torn_line_is_left_out_and_written_over(tmp_path: Path, length: int) -> None:
    kept = RequestFile(tmp_path / "cases.jsonl")
    kept.add(CASES[0])
    whole = kept.path.read_bytes()
    kept.path.write_bytes(whole + whole[:length])
    kept = RequestFile(kept.path)
    assert kept.cases == [CASES[0]]
    kept.add(CASES[1])
    assert RequestFile(kept.path).cases == list(CASES)


@pytest.mark.parametrize("line", ["{}", "[1]", "{", '{"text": "a", "concept": 1, "target": "b"}', ""])
def test_another_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(CASES[0]._asdict()) + f"\n{line}\n")
    with pytest.raises(ValueError, match=r"cases\.jsonl: line 2.*expected a JSON object"):
        RequestFile(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="line 1: expected"):
        RequestFile(path)


def test_each_correction_keeps_those_before_it() -> None:
    gradients: list[int] = []
    keeper = ContinualCorrector(model(), anchors(), on_gradient=lambda: gradients.append(1))
    first, second = asked_otherwise(TEXTS[0], "ambiance"), asked_otherwise(TEXTS[2], "ambiance", 2)
    once, one = keeper.correct(model(), first, [])
    twice, two = keeper.correct(once, second, [first])
    assert one.is_repaired and two.is_repaired and len(gradients) == len(anchors())
    read = predict(twice, [first.text, second.text]).concepts[:, 1]
    assert [model().schema.classes[index] for index in read] == [first.target, second.target]
    # What was asked in between changes no answer, and neither does another keeper.
    assert keeper.correct(once, second, [first])[1].stored().id == two.stored().id
    assert ContinualCorrector(model(), anchors()).correct(model(), first, [])[1].stored().id == one.stored().id
    with pytest.raises(ValueError, match=r"there is no concept .foot."):
        keeper.correct(model(), first._replace(concept="foot"), [])


def test_a_keeper_makes_the_edits_that_streams_measure() -> None:
    original = model()
    assert original.masks is not None
    start = ModelArrays(original.params, original.masks, original.heads)
    arm = EDITORS["lasting"].make(EditorContext(original.config, start, anchors()), 0)
    keeper, kept, corrected, state = ContinualCorrector(original, anchors()), [], original, start
    for text, concept in ((TEXTS[0], "ambiance"), (TEXTS[1], "food"), (TEXTS[2], "ambiance")):
        case = asked_otherwise(text, concept)
        index, target = original.schema.concepts.index(concept), original.schema.classes.index(case.target)
        (batch,) = text_batches(original, [text], batch_size=1)
        state = arm(original.config, state, batch, index, target).state
        corrected, _ = keeper.correct(corrected, case, kept)
        chex.assert_trees_all_equal(corrected.masks, state.masks)
        kept.append(case)
    assert masks.fingerprint(state.masks) != masks.fingerprint(original.masks)


def test_the_cases_of_edits_are_found_by_what_was_asked(tmp_path: Path) -> None:
    kept = RequestFile(tmp_path / "cases.jsonl")
    first, second = asked_otherwise(TEXTS[0], "ambiance"), asked_otherwise(TEXTS[2], "ambiance", 2)
    keeper = ContinualCorrector(model(), anchors())
    edits: list[StoredEdit] = [keeper.correct(model(), case, [])[1].stored() for case in (first, second)]
    kept.add(second)
    assert kept.of_edits(edits) == [second]
    kept.add(first)
    assert kept.of_edits(edits) == [first, second] and kept.of_edits(edits[1:]) == [second]


def test_what_was_undone_does_not_stand(tmp_path: Path) -> None:
    kept, original = RequestFile(tmp_path / "cases.jsonl"), model()
    assert original.masks is not None
    asked = asked_otherwise(TEXTS[0], "ambiance")
    kept.add(CASES[0])
    kept.add(asked)
    corrected, report = ContinualCorrector(original, anchors()).correct(original, asked, [])
    assert corrected.masks is not None
    with EditLog(tmp_path / "edits.log", original.masks, original.schema.concepts) as log:
        edit_id = log.append(report.stored())
        assert kept.standing(log) == [CASES[0], asked] and not log.undone
        log.undo(corrected.masks, edit_id)
        assert kept.standing(log) == [CASES[0]] and log.undone == (report.stored(),)
        log.append(report.stored())
        assert kept.standing(log) == [CASES[0], asked] and not log.undone


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="masks"):
        ContinualCorrector(dataclasses.replace(model(), masks=None), anchors())
