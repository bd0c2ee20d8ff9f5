"""Corrections by name, for people: a text, a concept, the class that it should have; and what came of it.

`intervention` and `minimal` have the functions of arrays that do the work.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.artifact import Predictions, SparseCBM, text_batches
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.data.schema import Schema, did_you_mean
from sparsecbm_jax.edits import MaskEdit, StoredEdit, num_changed, positions_of, text_hash
from sparsecbm_jax.intervention import Guard, SaliencyFn, check_masks, edit_of, intervene
from sparsecbm_jax.lasting import MARGIN, STRENGTH, Replay, concept_logits, lasting_edit
from sparsecbm_jax.masks import Masks
from sparsecbm_jax.minimal import minimal_edit


@dataclasses.dataclass(frozen=True)
class TextPrediction:
    """What the model says about a text: classes and probabilities of the concepts, the label and its probabilities."""

    concepts: dict[str, str]
    concept_probabilities: dict[str, dict[str, float]]
    label: str
    label_probabilities: dict[str, float]


@dataclasses.dataclass(frozen=True)
class CorrectionReport:
    """One correction in plain numbers, with the edit itself for `apply` and `undo`.

    Attributes:
            text, concept, target, label: what was asked; label is None where the task label was left out.
            saliency, drop_fraction, num_steps: how.
            num_dropped, num_grown: changed weights over all steps.
            num_weights: maskable weights of the backbone.
            before, after: the predictions on the text.
            edit: the positions; not part of `to_dict`.
    """

    text: str
    concept: str
    target: str
    label: str | None
    saliency: str
    drop_fraction: float
    num_steps: int
    num_dropped: int
    num_grown: int
    num_weights: int
    before: TextPrediction
    after: TextPrediction
    edit: MaskEdit = dataclasses.field(repr=False, compare=False)

    @property
    def is_repaired(self) -> bool:
        """Whether the concept has the asked class now."""
        return self.after.concepts[self.concept] == self.target

    @property
    def changed_share(self) -> float:
        """Dropped and grown weights over the maskable weights of the backbone."""
        return (self.num_dropped + self.num_grown) / self.num_weights

    def stored(self) -> StoredEdit:
        """The edit for a file or a log: what changed, what was asked, and what came of it, without the text."""
        return StoredEdit(
            concept=self.concept,
            target=self.target,
            label=self.label,
            text_sha256=text_hash(self.text),
            saliency=self.saliency,
            num_steps=self.num_steps,
            positions=positions_of(self.edit),
            before=dataclasses.asdict(self.before),
            after=dataclasses.asdict(self.after),
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON, without the positions."""
        skipped = {"edit", "before", "after"}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skipped}
        readings = {"before": dataclasses.asdict(self.before), "after": dataclasses.asdict(self.after)}
        return {**fields, "is_repaired": self.is_repaired, "changed_share": self.changed_share, **readings}


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
    guard: Guard | None = None,
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
    guard: Guard | None = None,
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
    masks, _ = lasting_edit(
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


class Proposal(NamedTuple):
    """A reading that is worth a person's look, found without any label; nothing is corrected by itself.

    Attributes:
            row: index of the text.
            concept: its name.
            reading, runner_up: the two most probable classes.
            margin: difference of their probabilities.
            entropy: of all classes, in nats.
    """

    row: int
    concept: str
    reading: str
    runner_up: str
    margin: float
    entropy: float


def propose(
    predictions: Predictions, schema: Schema, *, max_margin: float | None = None, min_entropy: float | None = None
) -> list[Proposal]:
    """The readings that the model is least sure of, the least sure first.

    Args:
            predictions: of `artifact.predict`.
            schema: the model's names.
            max_margin: readings whose two best classes are closer than this, in probability.
            min_entropy: readings whose entropy, in nats, is above this. With both, either will do.

    Raises:
        ValueError: if neither is given.
    """
    if max_margin is None and min_entropy is None:
        raise ValueError("max_margin and min_entropy are both None; expected at least one threshold")
    probabilities = np.asarray(predictions.concept_probabilities, np.float64)
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, axis=-1)
    margins = ranked[..., 0] - ranked[..., 1]
    entropies = -np.sum(probabilities * np.log(np.maximum(probabilities, np.finfo(float).tiny)), axis=-1)
    is_unsure = np.zeros(margins.shape, bool)
    if max_margin is not None:
        is_unsure |= margins < max_margin
    if min_entropy is not None:
        is_unsure |= entropies > min_entropy
    found = [
        Proposal(
            row=int(n),
            concept=schema.concepts[k],
            reading=schema.classes[order[n, k, 0]],
            runner_up=schema.classes[order[n, k, 1]],
            margin=float(margins[n, k]),
            entropy=float(entropies[n, k]),
        )
        for n, k in np.argwhere(is_unsure)
    ]
    return sorted(found, key=lambda proposal: proposal.margin)


def name_index(kind: str, name: str, names: Sequence[str]) -> int:
    """Position of a name among the schema's `names` of that kind.

    Raises:
            ValueError: if it is not there; the nearest one is given.
    """
    if name not in names:
        expected = ", ".join(map(repr, names))
        raise ValueError(f"there is no {kind} {name!r}{did_you_mean(name, names)}; expected one of {expected}")
    return list(names).index(name)


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
