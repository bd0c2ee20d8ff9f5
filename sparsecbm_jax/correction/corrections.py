"""Corrections by name, for people: a text, a concept, the class that it should have; and what came of it.

`intervention` and `minimal` have the functions of arrays that do the work.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from sparsecbm_jax.config.names import name_index
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import Masks, check_masks
from sparsecbm_jax.correction.report import CorrectionReport, TextPrediction
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.continual_edit import MARGIN, STRENGTH, continual_edit
from sparsecbm_jax.intervention.fixed_size_edit import intervene
from sparsecbm_jax.intervention.mask_edit import MaskEdit, edit_of, num_changed
from sparsecbm_jax.intervention.minimal_edit import minimal_edit
from sparsecbm_jax.intervention.ranking import EditCosts, SaliencyFn
from sparsecbm_jax.intervention.replay import Replay
from sparsecbm_jax.model.forward import concept_logits
from sparsecbm_jax.model.predictions import text_batches
from sparsecbm_jax.model.sparse_cbm import SparseCBM


def correct(
    model: SparseCBM,
    text: str,
    concept: str,
    target: str,
    drop_fraction: float = 0.0001,
    *,
    label: str | None = None,
    saliency: str | SaliencyFn = "signed",
    num_steps: int = 1,
) -> tuple[SparseCBM, CorrectionReport]:
    """Corrects one concept of one text, by name; see `intervene`.

    Args:
        model: a model with masks.
        text: the text that the model misreads.
        concept: name of the concept.
        target: name of the class that it should have.
        drop_fraction: share of the backbone's maskable weights that each step drops, and as many that it grows.
        label: name of the task label to pull towards as well.
        saliency: as in `intervene`.
        num_steps: as in `intervene`.

    Returns:
        The model with the new masks, without the metrics of the old ones, and what changed. The concept may still
        have another class than asked: `CorrectionReport.is_repaired` says so.

    Raises:
        ValueError: as `intervene`; a name is not in the schema (the nearest one is given); the text holds nothing that
            the tokeniser reads; the model's output is not finite.
    """
    old, batch, index, wanted = _asked(model, text, concept, target)
    masks, edit = intervene(
        model.config,
        model.params,
        old,
        model.heads,
        batch,
        index,
        wanted,
        drop_fraction,
        None if label is None else name_index("label", label, model.schema.labels),
        saliency=saliency,
        num_steps=num_steps,
    )
    name = saliency if isinstance(saliency, str) else getattr(saliency, "__name__", repr(saliency))
    asked = {"concept": concept, "target": target, "label": label, "saliency": name, "drop_fraction": drop_fraction}
    return _corrected(model, masks, edit, text=text, num_steps=num_steps, **asked)


def correct_minimally(
    model: SparseCBM,
    text: str,
    concept: str,
    target: str,
    *,
    margin: float = 0.0,
    guard: EditCosts | None = None,
    max_pairs: int = 4096,
) -> tuple[SparseCBM, CorrectionReport]:
    """Corrects one concept of one text with as few weights as do, by name; see `minimal.minimal_edit`.

    Args:
        model, text, concept, target: as for `correct`.
        margin, guard, max_pairs: as for `minimal_edit`.

    Returns:
        As `correct`; `drop_fraction` says how small the edit is. Where `max_pairs` pairs do not repair the concept,
        the model keeps its masks and `CorrectionReport.is_repaired` is False.

    Raises:
        ValueError: as `correct` and `minimal_edit`.
    """
    old, batch, index, wanted = _asked(model, text, concept, target)
    masks, found = minimal_edit(
        model.config,
        model.params,
        old,
        model.heads,
        batch,
        index,
        wanted,
        margin=margin,
        guard=guard,
        max_pairs=max_pairs,
    )
    asked = {"concept": concept, "target": target, "label": None, "saliency": "signed" if guard is None else "guarded"}
    fraction = int(found.num_pairs) / masks_lib.num_weights(masks)
    return _corrected(model, masks, found.edit, text=text, drop_fraction=fraction, num_steps=1, **asked)


def remember(model: SparseCBM, text: str, concept: str, target: str, replay: Replay) -> None:
    """Adds an earlier correction to those that `correct_lastingly` keeps in force, by name.

    Raises:
        ValueError: a name is not in the schema, or the text holds nothing that the tokeniser reads.
    """
    _, batch, index, wanted = _asked(model, text, concept, target)
    replay.add(index, batch, wanted)


def correct_lastingly(
    model: SparseCBM,
    text: str,
    concept: str,
    target: str,
    replay: Replay,
    *,
    original: SparseCBM | None = None,
    guard: EditCosts | None = None,
    margin: float = MARGIN,
    strength: float = STRENGTH,
) -> tuple[SparseCBM, CorrectionReport]:
    """Corrects one concept of one text so that earlier corrections hold and other texts stay; see `lasting`.

    Args:
        model, text, concept, target: as for `correct`.
        replay: earlier corrections and anchors; remembers this one.
        original: the model that anchors are to be read as by, before any correction; `model` where there was none.
        guard, margin, strength: as for `lasting_edit`. `guards.steep` of a `guards.fisher_guard` did best.

    Returns:
        As `correct`; `drop_fraction` says how many weights of the concept were dropped.
        `CorrectionReport.is_repaired` is False where the earlier corrections and the anchors outweigh this one.

    Raises:
        ValueError: as `correct` and `lasting_edit`.
    """
    old, batch, index, wanted = _asked(model, text, concept, target)
    before = original or model
    check_masks(before.masks)
    assert before.masks is not None
    arrays = (before.config, before.params, before.masks, before.heads)
    replay.hold(index, lambda texts: concept_logits(*arrays, texts, index))
    replay.add(index, batch, wanted)
    rows, targets, logits = replay.batch(index)
    masks, _ = continual_edit(
        model.config,
        model.params,
        old,
        model.heads,
        rows,
        index,
        targets,
        logits,
        guard=guard,
        margin=margin,
        strength=strength,
    )
    edit = edit_of(model.config, model.params, old, masks, model.heads, batch, index, wanted)
    asked = {"concept": concept, "target": target, "label": None, "saliency": "lasting"}
    fraction = num_changed(edit)[0] / masks_lib.num_weights(masks)
    return _corrected(model, masks, edit, text=text, drop_fraction=fraction, num_steps=1, **asked)


def _asked(model: SparseCBM, text: str, concept: str, target: str) -> tuple[Masks, Batch, int, int]:
    check_masks(model.masks)
    assert model.masks is not None
    index = name_index("concept", concept, model.schema.concepts)
    wanted = name_index("class", target, model.schema.classes)
    return model.masks, next(text_batches(model, [text], batch_size=1)), index, wanted


def _corrected(model: SparseCBM, masks: Masks, edit: MaskEdit, **asked: Any) -> tuple[SparseCBM, CorrectionReport]:
    num_dropped, num_grown = num_changed(edit)
    report = CorrectionReport(
        **asked,
        num_dropped=num_dropped,
        num_grown=num_grown,
        num_weights=masks_lib.num_weights(masks),
        before=_predicted(model, edit.concept_logits_before, edit.label_logits_before),
        after=_predicted(model, edit.concept_logits_after, edit.label_logits_after),
        edit=edit,
    )
    # The scores were those of the masks before.
    metadata = {key: value for key, value in model.metadata.items() if key != "metrics"}
    return dataclasses.replace(model, masks=masks, metadata=metadata), report


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
