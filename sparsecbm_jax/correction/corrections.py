"""Corrections by name, for people: a text, a concept, and the class that it should have.

`intervention.editors` has the functions on arrays that make the edits.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from sparsecbm_jax.config.names import name_index
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.correction.report import CorrectionReport, EditorDescription, TextPrediction
from sparsecbm_jax.correction.request_file import CorrectionRequest
from sparsecbm_jax.intervention import editors
from sparsecbm_jax.intervention.editors import Editor
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection, num_changed
from sparsecbm_jax.model.predictions import text_batches
from sparsecbm_jax.model.sparse_cbm import SparseCBM


def correct(
    model: SparseCBM,
    request: CorrectionRequest,
    *,
    editor: Editor | None = None,
    earlier: Sequence[CorrectionRequest] = (),
) -> tuple[SparseCBM, CorrectionReport]:
    """Corrects one concept of one text.

    Args:
        model: A model with masks; it is not changed.
        request: The text that is predicted incorrectly, the concept, and the class that it should have.
        editor: The editor that changes the model, one of `intervention.editors` or your own; None takes the minimal
            edit, which changes as few weights as repair this text, regardless of other texts.
        earlier: Earlier corrections, oldest first, for editors that retain them, such as `editors.continual`.

    Returns:
        The corrected model, without the scores of the old one, and a report of the changes. The concept may still have
        another class than the requested one: `CorrectionReport.is_repaired` is False then.

    Raises:
        TypeError: The request is not a `CorrectionRequest`.
        ValueError: A name is not in the schema (the nearest one is given), the model has no masks, the text holds
            nothing that the tokeniser reads, the model's output is not finite, or the editor refuses.
    """
    editor = editors.minimal() if editor is None else editor
    masks_lib.check_masks(model.masks)
    asked = concept_correction(model, request)
    asked = asked._replace(earlier=tuple(concept_correction(model, one) for one in earlier))
    arrays, edit = editor(model.config, model.arrays, asked)
    num_dropped, num_grown = num_changed(edit)
    report = CorrectionReport(
        request=request,
        editor=EditorDescription(*editors.describe(editor)),
        num_dropped=num_dropped,
        num_grown=num_grown,
        num_weights=masks_lib.num_weights(arrays.concept_masks),
        before=_predicted(model, edit.concept_logits_before, edit.label_logits_before),
        after=_predicted(model, edit.concept_logits_after, edit.label_logits_after),
        edit=edit,
    )
    return model.with_arrays(arrays), report


def concept_correction(model: SparseCBM, request: CorrectionRequest) -> ConceptCorrection:
    """Returns a request as arrays: tokens in place of the text, indices in place of names.

    Raises:
        TypeError: As `correct`.
        ValueError: As `correct`.
    """
    if not isinstance(request, CorrectionRequest):
        raise TypeError(f"the request is a {type(request).__name__}; expected CorrectionRequest(text, concept, target)")
    schema = model.schema
    return ConceptCorrection(
        next(text_batches(model, [request.text], batch_size=1)),
        name_index("concept", request.concept, schema.concepts),
        name_index("class", request.target, schema.classes),
        None if request.label is None else name_index("label", request.label, schema.labels),
    )


def _predicted(
    model: SparseCBM, concept_logits: Float[Array, "1 K C"], label_logits: Float[Array, "1 Y"]
) -> TextPrediction:
    concepts = np.asarray(jax.nn.softmax(concept_logits[0], axis=-1), np.float64)
    labels = np.asarray(jax.nn.softmax(label_logits[0]), np.float64)
    if not (np.isfinite(concepts).all() and np.isfinite(labels).all()):
        raise ValueError("the model's output for the text is not finite; its parameters may have diverged in training")
    schema = model.schema
    return TextPrediction(
        concepts={c: schema.classes[i] for c, i in zip(schema.concepts, concepts.argmax(-1), strict=True)},
        concept_probabilities={
            c: dict(zip(schema.classes, row, strict=True))
            for c, row in zip(schema.concepts, concepts.tolist(), strict=True)
        },
        label=schema.labels[int(labels.argmax())],
        label_probabilities=dict(zip(schema.labels, labels.tolist(), strict=True)),
    )
