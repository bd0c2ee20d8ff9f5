"""Reports of corrections, by name, and their form for a terminal."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparsecbm_jax.correction.request_file import CorrectionRequest
from sparsecbm_jax.data.words import printable
from sparsecbm_jax.intervention.mask_edit import MaskEdit
from sparsecbm_jax.intervention.stored_edit import StoredEdit, positions_of, text_hash


@dataclasses.dataclass(frozen=True)
class TextPrediction:
    """The prediction for a text: classes and probabilities of the concepts, the label and its probabilities."""

    concepts: dict[str, str]
    concept_probabilities: dict[str, dict[str, float]]
    label: str
    label_probabilities: dict[str, float]


@dataclasses.dataclass(frozen=True)
class EditorDescription:
    """An editor as data.

    Attributes:
        name: The editor's name in reports.
        settings: Its settings by name.
    """

    name: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items() if value is not None)
        return f"{self.name}: {settings}" if settings else self.name


@dataclasses.dataclass(frozen=True)
class CorrectionReport:
    """One correction in plain numbers, with the edit itself for `apply` and `undo`.

    Attributes:
        request: The request.
        editor: The editor that changed the model.
        num_dropped, num_grown: Numbers of changed weights of the concept's mask.
        num_weights: Maskable weights of the backbone.
        before, after: Predictions for the text.
        edit: The changed positions; not part of `to_dict`.
    """

    request: CorrectionRequest
    editor: EditorDescription
    num_dropped: int
    num_grown: int
    num_weights: int
    before: TextPrediction
    after: TextPrediction
    edit: MaskEdit = dataclasses.field(repr=False, compare=False)

    @property
    def is_repaired(self) -> bool:
        """True where the concept has the requested class now."""
        return self.after.concepts[self.request.concept] == self.request.target

    @property
    def changed_share(self) -> float:
        """Dropped and grown weights as a share of the maskable weights of the backbone."""
        return (self.num_dropped + self.num_grown) / self.num_weights

    def stored(self) -> StoredEdit:
        """Returns the edit for a file or a log: changes, request and predictions, without the text."""
        settings = self.editor.settings
        return StoredEdit(
            concept=self.request.concept,
            target=self.request.target,
            label=self.request.label,
            text_sha256=text_hash(self.request.text),
            saliency=str(settings.get("saliency", self.editor.name)),
            num_steps=int(settings.get("num_steps", 1)),
            positions=positions_of(self.edit),
            before=dataclasses.asdict(self.before),
            after=dataclasses.asdict(self.after),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data for JSON, without the positions."""
        return {
            **self.request._asdict(),
            "editor": dataclasses.asdict(self.editor),
            "num_dropped": self.num_dropped,
            "num_grown": self.num_grown,
            "num_weights": self.num_weights,
            "is_repaired": self.is_repaired,
            "changed_share": self.changed_share,
            "before": dataclasses.asdict(self.before),
            "after": dataclasses.asdict(self.after),
        }


_ANY_REASON = "the change does not suffice"
_REASONS = {
    "minimal": "no change of at most max_pairs pairs of weights gives the concept this class, so none was made",
    "fixed_size": "a change of this share does not suffice; a larger drop_fraction or more num_steps may",
    "continual": "earlier corrections and anchors outweigh it; later corrections, or the editor minimal, may repair it",
}


def render_correction(report: CorrectionReport) -> str:
    """Renders a correction for a terminal: the changes, and every concept and the label before and after."""
    request = report.request
    asked = f"{request.concept} = {request.target}" + (f", label = {request.label}" if request.label else "")
    outcome = "repaired" if report.is_repaired else "not repaired"
    if report.before.concepts[request.concept] == request.target:
        outcome = "was correct before" if report.is_repaired else "lost"
    lines = [
        f'"{printable(request.text, 240)}"',
        f"asked: {asked}; {outcome}",
        f"changed: {report.num_dropped} weights dropped, {report.num_grown} grown, {report.changed_share:.4%} of the "
        f"backbone's {report.num_weights:,} ({report.editor})",
    ]
    if outcome == "not repaired":
        lines.append(f"why: {_REASONS.get(report.editor.name, _ANY_REASON)}")
    names = [*report.before.concepts, "label"]
    before, after = _rows(report.before), _rows(report.after)
    widths = [max(map(len, column)) for column in ([*names, "concept"], before, after)]
    lines.append(f"  {'':{widths[0]}}  {'before':{widths[1]}}  after")
    for name, old, new in zip(names, before, after, strict=True):
        mark = "*" if name == request.concept else " "
        lines.append(f"{mark} {name:{widths[0]}}  {old:{widths[1]}}  {new}")
    return "\n".join(lines)


def _rows(prediction: TextPrediction) -> list[str]:
    def row(name: str, probabilities: Mapping[str, float]) -> str:
        return f"{name} (" + ", ".join(f"{each} {share:.1%}" for each, share in probabilities.items()) + ")"

    rows = [row(name, prediction.concept_probabilities[concept]) for concept, name in prediction.concepts.items()]
    return [*rows, row(prediction.label, prediction.label_probabilities)]
