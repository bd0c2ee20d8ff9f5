"""A preview says what the model with the edit would read, text by text."""

import numpy as np
import pytest

from sparsecbm_jax.correction.preview import outputs_of, preview
from sparsecbm_jax.intervention.fixed_size_edit import intervene
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.predictions import text_batches

from tests.support.tiny_model import TEXTS, tiny_model

CONCEPT = 1


def test_a_preview_is_what_the_edited_model_reads() -> None:
    model = tiny_model(num_layers=1)
    assert model.masks is not None
    config, arrays, forward = model.config, model.arrays, make_forward(model.config)
    texts = [*TEXTS, *(f"{text} great" for text in TEXTS)]
    gold = np.arange(len(texts) + 2) % 3
    batches = [
        batch._replace(concepts=np.tile(gold[5 * n : 5 * n + 5, None], (1, 3)), row_ids=5 * n + np.arange(5))
        for n, batch in enumerate(text_batches(model, texts, batch_size=5))
    ]
    masks, _ = intervene(config, arrays, ConceptCorrection(batches[0], CONCEPT, 2), 0.05)
    edited = arrays._replace(masks=masks)
    found = preview(config, edited, outputs_of(config, arrays, batches), CONCEPT)
    expected_rows, repaired, broken, shift = [], 0, 0, []
    flips, label_flips = np.zeros((3, 3), int), np.zeros((2, 2), int)
    for batch in batches:
        was, now = (forward(some, batch) for some in (arrays, edited))
        for row in np.flatnonzero(batch.example_weight):
            a, b = (np.asarray(output.concept_logits)[row, CONCEPT] for output in (was, now))
            p, q = (np.exp(u) / np.exp(u).sum() for u in (a, b))
            shift.append(np.abs(p - q).sum() / 2)
            flips[a.argmax(), b.argmax()] += 1
            label_flips[tuple(int(np.asarray(output.label_logits)[row].argmax()) for output in (was, now))] += 1
            if a.argmax() != b.argmax():
                expected_rows.append(int(batch.row_ids[row]))
                repaired += b.argmax() == batch.concepts[row, CONCEPT]
                broken += a.argmax() == batch.concepts[row, CONCEPT]
    assert expected_rows and found.changed_rows == tuple(expected_rows)
    np.testing.assert_array_equal(found.flips, flips)
    np.testing.assert_array_equal(found.label_flips, label_flips)
    assert (found.num_texts, found.num_repaired, found.num_broken) == (len(texts), repaired, broken)
    assert found.shift == pytest.approx(np.mean(shift), abs=1e-5)
    assert found.to_dict()["changed_rows"] == expected_rows
    with pytest.raises(ValueError, match="the sample has no texts"):
        preview(config, edited, [], CONCEPT)
