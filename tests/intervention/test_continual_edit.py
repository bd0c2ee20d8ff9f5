"""Edits that answer for all corrected texts of a concept and hold anchors where they were."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import Masks
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.continual_edit import (
    ANCHOR,
    ContinualEdit,
    ContinualSettings,
    ReplayedTexts,
    _continual_edit,
    continual_edit,
)
from sparsecbm_jax.intervention.editors import continual, is_repaired
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection
from sparsecbm_jax.intervention.replay import Replay
from sparsecbm_jax.model.forward import forward
from sparsecbm_jax.model.predictions import text_batches
from sparsecbm_jax.model.sparse_cbm import SparseCBM

from tests.support.tiny_model import TEXTS, tiny_model

CONCEPT = 1


@pytest.fixture(scope="module")
def model() -> SparseCBM:
    return tiny_model(num_layers=1)


@pytest.fixture(scope="module")
def batch(model: SparseCBM) -> Batch:
    """Four texts, the shortest first, and two rows of padding."""
    return next(text_batches(model, TEXTS, batch_size=6))


_forward = jax.jit(forward, static_argnums=0)


def logits_of(model: SparseCBM, masks: Masks, batch: Batch) -> np.ndarray:
    return np.asarray(_forward(model.config, model.arrays._replace(masks=masks), batch).concept_logits)


def second_best(logits: np.ndarray) -> np.ndarray:
    return np.argsort(logits, axis=-1)[..., -2]


def edited(
    model: SparseCBM, batch: Batch, targets: np.ndarray, concept: int = CONCEPT, **settings: Any
) -> tuple[Masks, ContinualEdit]:
    assert model.masks is not None
    before = logits_of(model, model.masks, batch)[:, concept]
    texts, wanted = ReplayedTexts(batch, targets, before), ContinualSettings(**settings)
    return continual_edit(model.config, model.arrays, concept, texts, settings=wanted, max_pairs=64)


def centred(moved: np.ndarray) -> np.ndarray:
    return moved - moved.mean(axis=-1, keepdims=True)


@pytest.mark.parametrize("concept", [0, CONCEPT])
def test_all_corrected_texts_are_read_as_asked(model: SparseCBM, batch: Batch, concept: int) -> None:
    assert model.masks is not None
    before = logits_of(model, model.masks, batch)
    targets = np.full(6, ANCHOR)
    targets[[0, 2]] = second_best(before[[0, 2], concept])
    masks, found = edited(model, batch, targets, concept, margin=0.2, strength=0.01)
    after = logits_of(model, masks, batch)
    np.testing.assert_array_equal(after[[0, 2], concept].argmax(-1), targets[[0, 2]])
    assert np.all(np.asarray(found.margins)[[0, 2]] > 0.1)
    assert np.all(np.isinf(np.asarray(found.margins)[[1, 3, 4, 5]]))
    np.testing.assert_array_equal(masks_lib.num_kept(masks), masks_lib.num_kept(model.masks))
    others = [k for k in range(3) if k != concept]
    chex.assert_trees_all_equal(
        {path: leaf[np.array(others)] for path, leaf in masks.items()},
        {path: leaf[np.array(others)] for path, leaf in model.masks.items()},
    )
    changed = sum(int(jnp.sum(masks[path] != model.masks[path])) for path in masks)
    assert 0 < changed <= int(found.num_changed)
    drift = np.square(centred(after - before)[[1, 3], concept]).sum(-1).mean()
    np.testing.assert_allclose(found.drift, drift, rtol=1e-3)


def test_anchors_are_held_the_more_the_stronger(model: SparseCBM, batch: Batch) -> None:
    assert model.masks is not None
    targets = np.full(6, ANCHOR)
    targets[0] = second_best(logits_of(model, model.masks, batch)[0, CONCEPT])
    free, held = (edited(model, batch, targets, strength=strength)[1] for strength in (0.0, 100.0))
    assert float(held.drift) < 0.5 * float(free.drift)


def test_what_is_right_already_is_left_alone(model: SparseCBM, batch: Batch) -> None:
    assert model.masks is not None
    targets = np.full(6, ANCHOR)
    targets[0] = logits_of(model, model.masks, batch)[0, CONCEPT].argmax()
    masks, found = edited(model, batch, targets, margin=1e-4)
    chex.assert_trees_all_equal(masks, model.masks)
    assert int(found.num_changed) == int(found.num_rounds) == 0 and float(found.drift) < 1e-9


def test_concepts_targets_and_strengths_share_a_program(model: SparseCBM, batch: Batch) -> None:
    edited(model, batch, np.array([0, ANCHOR, ANCHOR, ANCHOR, 0, 0]))
    size = _continual_edit._cache_size()
    edited(model, batch, np.array([ANCHOR, 1, 2, ANCHOR, 0, 0]), concept=2, margin=0.3, strength=7.0)
    assert _continual_edit._cache_size() == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": np.zeros(5, int)}, r"shapes \(5,\) and \(6, 3\); expected \(6,\) and \(6, 3\)"),
        ({"logits": np.zeros((6, 2))}, r"expected \(6,\) and \(6, 3\) for a batch of 6 rows and 3 classes"),
        ({"targets": np.full(6, 3)}, r"targets is .*; expected an integer in \[-1, 2\]"),
        ({"concept": 3}, "concept is 3"),
        ({"max_pairs": 0}, "max_pairs is 0; expected at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(model: SparseCBM, batch: Batch, change: dict[str, object], message: str) -> None:
    given: dict[str, Any] = {"concept": CONCEPT, "targets": np.zeros(6, int), "logits": np.zeros((6, 3))} | change
    texts = ReplayedTexts(batch, given.pop("targets"), given.pop("logits"))
    with pytest.raises(ValueError, match=message):
        continual_edit(model.config, model.arrays, given.pop("concept"), texts, **given)


def one_text(model: SparseCBM, text: str) -> Batch:
    return next(text_batches(model, [text], batch_size=1))


def test_a_replay_brings_corrections_and_anchors_together(model: SparseCBM, batch: Batch) -> None:
    assert model.masks is not None
    replay = Replay([batch], num_rows=8)
    before = logits_of(model, model.masks, batch)[:, CONCEPT]
    for text, target in ((TEXTS[3], 2), (TEXTS[0], 1)):
        replay.add(CONCEPT, one_text(model, text), target)
    replay.hold(CONCEPT, lambda texts: logits_of(model, model.masks, texts)[:, CONCEPT])  # type: ignore[arg-type]
    replay.hold(CONCEPT, lambda texts: pytest.fail("anchors are asked once"))  # type: ignore[arg-type]
    rows, targets, logits = replay.texts(CONCEPT)
    assert rows.input_ids.shape[0] == 8 and rows.example_weight.tolist() == [1] * 6 + [0] * 2
    assert targets[:2].tolist() == [1, 2] and np.all(targets[2:] == ANCHOR)
    found = logits_of(model, model.masks, rows)[:, CONCEPT]
    np.testing.assert_allclose(found[2:6], logits[2:6], atol=1e-5)
    of_text = {int(n): before[row] for row, n in enumerate(batch.row_ids)}
    np.testing.assert_allclose(found[:2], [of_text[0], of_text[3]], atol=1e-5)
    np.testing.assert_allclose(np.sort(logits[2:6], axis=0), np.sort(before[:4], axis=0), atol=1e-5)


def test_many_corrections_leave_room_for_anchors(model: SparseCBM, batch: Batch) -> None:
    replay = Replay([batch], num_rows=4)
    replay.hold(0, lambda texts: jnp.zeros((6, 3)))
    for n, text in enumerate(TEXTS):
        replay.add(0, one_text(model, text), n % 3)
    rows, targets, _ = replay.texts(0)
    assert np.sum(targets != ANCHOR) == 2 and targets[0] == 0 and rows.example_weight.sum() == 4


def test_draws_go_on_and_are_the_same_again(model: SparseCBM, batch: Batch) -> None:
    """Anchors that an edit does not see are let go, so each is to see others; made anew, it is to see the same."""
    replay = Replay([batch], num_rows=4)
    for concept in (0, 1):
        replay.hold(concept, lambda texts: jnp.arange(18.0).reshape(6, 3))
    asked = [(concept, one_text(model, text)) for text in 3 * TEXTS for concept in (0, 1)]
    drawn = []
    for count, (concept, text) in enumerate(asked, 1):
        replay.add(concept, text, 1)
        drawn.append(replay.texts(concept))
        chex.assert_trees_all_equal(drawn[-1], replay.texts(concept))
        again = replay.emptied()
        for earlier, other in asked[:count]:
            again.add(earlier, other, 1)
        chex.assert_trees_all_equal(drawn[-1], again.texts(concept))
    seen = {tuple(logits[targets == ANCHOR][:, 0].tolist()) for _, targets, logits in drawn[4:]}
    assert len(seen) > 1 and {anchor for of_edit in seen for anchor in of_edit} == {0, 3, 6, 9}


def test_a_text_has_the_class_that_was_asked_last(model: SparseCBM, batch: Batch) -> None:
    replay = Replay([batch], num_rows=4)
    replay.hold(0, lambda texts: jnp.zeros((6, 3)))
    for target in (2, 1):
        replay.add(0, one_text(model, TEXTS[0]), target)
    assert replay.texts(0)[1].tolist() == [1, ANCHOR, ANCHOR, ANCHOR]


def test_a_replay_without_anchors_is_refused(batch: Batch) -> None:
    with pytest.raises(ValueError, match="there are no anchors"):
        Replay([])
    with pytest.raises(ValueError, match="num_rows is 3; expected at least 4"):
        Replay([batch], num_rows=3)


def test_the_editor_keeps_an_earlier_correction(model: SparseCBM) -> None:
    assert model.masks is not None
    others = next(text_batches(model, TEXTS[1:3], batch_size=2))
    editor = continual([others], costs=None, margin=0.3, strength=0.03, num_rows=8)
    arrays = model.arrays
    asked: list[ConceptCorrection] = []
    for text in (TEXTS[3], TEXTS[0]):
        single = one_text(model, text)
        target = int(second_best(logits_of(model, arrays.masks, single)[0, CONCEPT]))
        correction = ConceptCorrection(single, CONCEPT, target)
        arrays, edit = editor(model.config, arrays, correction._replace(earlier=tuple(asked)))
        assert is_repaired(edit, single.example_weight)
        asked.append(correction)
    for one in asked:
        assert logits_of(model, arrays.masks, one.batch)[0, CONCEPT].argmax() == one.target
