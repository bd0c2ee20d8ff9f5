"""Corrections that last: their file, and each new one made together with those before it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import chex
import pytest

from sparsecbm_jax.core import masks
from sparsecbm_jax.correction.corrections import concept_correction, correct
from sparsecbm_jax.correction.report import EditorDescription
from sparsecbm_jax.correction.request_file import CorrectionRequest, RequestFile
from sparsecbm_jax.evaluation.editing.named_editors import EDITORS, EditorContext
from sparsecbm_jax.intervention import editors
from sparsecbm_jax.intervention.edit_log import EditLog
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection, MaskEdit, edit_of
from sparsecbm_jax.intervention.stored_edit import StoredEdit
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.predictions import predict
from sparsecbm_jax.model.sparse_cbm import ModelArrays

from tests.support.tiny_model import TEXTS
from tests.support.tiny_session import anchors, asked_otherwise, model

REQUESTS = (CorrectionRequest("the soup\nwas “cold”", "food", "Negative"), CorrectionRequest("", "service", "unknown"))


def written(request: CorrectionRequest) -> dict[str, str]:
    return {name: value for name, value in request._asdict().items() if value is not None}


def continual_editor(**settings: Any) -> editors.Continual:
    return editors.continual(anchors(), original=model().arrays, **settings)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    kept = RequestFile(tmp_path / "a folder to be made" / "requests.jsonl")
    for request in REQUESTS:
        kept.add(request)
    assert kept.requests == RequestFile(kept.path).requests == list(REQUESTS)
    by_hand = json.dumps(written(REQUESTS[0]))
    kept.path.write_text(by_hand)
    kept = RequestFile(kept.path)
    kept.add(REQUESTS[1])
    assert RequestFile(kept.path).requests == list(REQUESTS) and kept.path.read_text().startswith(f"{by_hand}\n")


@pytest.mark.parametrize("length", [1, 20, 60])
def test_a_torn_line_is_left_out_and_written_over(tmp_path: Path, length: int) -> None:
    kept = RequestFile(tmp_path / "requests.jsonl")
    kept.add(REQUESTS[0])
    whole = kept.path.read_bytes()
    kept.path.write_bytes(whole + whole[:length])
    kept = RequestFile(kept.path)
    assert kept.requests == [REQUESTS[0]]
    kept.add(REQUESTS[1])
    assert RequestFile(kept.path).requests == list(REQUESTS)


@pytest.mark.parametrize("line", ["{}", "[1]", "{", '{"text": "a", "concept": 1, "target": "b"}', ""])
def test_another_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(written(REQUESTS[0])) + f"\n{line}\n")
    with pytest.raises(ValueError, match=r"requests\.jsonl: line 2.*expected a JSON object"):
        RequestFile(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="line 1: expected"):
        RequestFile(path)


def test_each_correction_keeps_those_before_it() -> None:
    gradients: list[int] = []
    editor = continual_editor(on_gradient=lambda: gradients.append(1))
    first, second = asked_otherwise(TEXTS[0], "ambiance"), asked_otherwise(TEXTS[2], "ambiance", 2)
    once, one = correct(model(), first, editor=editor)
    twice, two = correct(once, second, editor=editor, earlier=[first])
    assert one.is_repaired and two.is_repaired and len(gradients) == len(anchors())
    read = predict(twice, [first.text, second.text]).concepts[:, 1]
    assert [model().schema.classes[index] for index in read] == [first.target, second.target]
    # What was asked in between changes no answer, and neither does another editor of the same settings.
    assert correct(once, second, editor=editor, earlier=[first])[1].stored().id == two.stored().id
    assert correct(model(), first, editor=continual_editor())[1].stored().id == one.stored().id
    assert one.editor.name == "continual" and one.editor.settings["strength"] == 2.0
    with pytest.raises(ValueError, match=r"there is no concept .foot."):
        correct(model(), first._replace(concept="foot"), editor=editor)


def test_people_get_the_edits_that_the_suite_measures() -> None:
    original = model()
    named = EDITORS["continual"].make(
        EditorContext(original.config, original.arrays, anchors(), original.class_activations), 0
    )
    editor, corrected, arrays = continual_editor(), original, original.arrays
    kept: list[CorrectionRequest] = []
    asked: list[ConceptCorrection] = []
    for text, concept in ((TEXTS[0], "ambiance"), (TEXTS[1], "food"), (TEXTS[2], "ambiance")):
        request = asked_otherwise(text, concept)
        correction = concept_correction(original, request)
        arrays, _ = named(original.config, arrays, correction._replace(earlier=tuple(asked)))
        corrected, _ = correct(corrected, request, editor=editor, earlier=kept)
        chex.assert_trees_all_equal(corrected.masks, arrays.masks)
        kept.append(request)
        asked.append(correction)
    assert masks.fingerprint(arrays.masks) != masks.fingerprint(original.masks)


def test_the_requests_of_edits_are_found_by_what_was_asked(tmp_path: Path) -> None:
    kept = RequestFile(tmp_path / "requests.jsonl")
    first, second = asked_otherwise(TEXTS[0], "ambiance"), asked_otherwise(TEXTS[2], "ambiance", 2)
    editor = continual_editor()
    edits: list[StoredEdit] = [correct(model(), one, editor=editor)[1].stored() for one in (first, second)]
    kept.add(second)
    assert kept.of_edits(edits) == [second]
    kept.add(first)
    assert kept.of_edits(edits) == [first, second] and kept.of_edits(edits[1:]) == [second]


def test_what_was_undone_does_not_stand(tmp_path: Path) -> None:
    kept, original = RequestFile(tmp_path / "requests.jsonl"), model()
    assert original.masks is not None
    asked = asked_otherwise(TEXTS[0], "ambiance")
    kept.add(REQUESTS[0])
    kept.add(asked)
    corrected, report = correct(original, asked, editor=continual_editor())
    assert corrected.masks is not None
    with EditLog(tmp_path / "edits.log", original.masks, original.schema.concepts) as log:
        edit_id = log.append(report.stored())
        assert kept.standing(log) == [REQUESTS[0], asked] and not log.undone
        log.undo(corrected.masks, edit_id)
        assert kept.standing(log) == [REQUESTS[0]] and log.undone == (report.stored(),)
        log.append(report.stored())
        assert kept.standing(log) == [REQUESTS[0], asked] and not log.undone


def test_a_label_is_kept_where_one_was_asked(tmp_path: Path) -> None:
    kept = RequestFile(tmp_path / "requests.jsonl")
    kept.add(CorrectionRequest("a", "food", "Negative", "fine"))
    assert RequestFile(kept.path).requests == kept.requests and "fine" in kept.path.read_text()


def test_what_is_no_request_is_refused() -> None:
    with pytest.raises(TypeError, match="the request is a str; expected CorrectionRequest"):
        correct(model(), "the soup was cold")  # type: ignore[arg-type]


def test_an_editor_of_ones_own_goes_the_same_way() -> None:
    """It trains the projector's bias: the report says what came of it, and that no mask changed."""

    def by_bias(config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection) -> tuple[ModelArrays, MaskEdit]:
        projector = dict(arrays.heads["projector"])
        projector["bias"] = projector["bias"].at[correction.concept, correction.target].add(1e3)
        new = arrays._replace(heads={**arrays.heads, "projector": projector})
        return new, edit_of(config, arrays, new, correction)

    request = asked_otherwise(TEXTS[0], "food")
    corrected, report = correct(model(), request, editor=by_bias)
    assert report.is_repaired and (report.num_dropped, report.num_grown) == (0, 0)
    assert report.editor == EditorDescription("by_bias", {})
    found = predict(corrected, [request.text]).concepts[0, 0]
    assert model().schema.classes[found] == request.target


def test_a_dense_model_is_refused() -> None:
    dense = dataclasses.replace(model(), masks=None)
    with pytest.raises(ValueError, match="the model has no masks"):
        correct(dense, asked_otherwise(TEXTS[0], "food"))
