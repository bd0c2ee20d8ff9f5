"""What a correction changed, by name, and how a terminal shows it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparsecbm_jax.data.words import printable
from sparsecbm_jax.intervention.mask_edit import MaskEdit
from sparsecbm_jax.intervention.stored_edit import StoredEdit, positions_of, text_hash


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


def render_correction(report: CorrectionReport) -> str:
    """A correction for a terminal: what changed, and every concept and the label before and after."""
    asked = f"{report.concept} = {report.target}" + (f", label = {report.label}" if report.label else "")
    outcome = "repaired" if report.is_repaired else "not repaired"
    if report.before.concepts[report.concept] == report.target:
        outcome = "was so before" if report.is_repaired else "lost"
    steps = f"{report.num_steps} step" + ("s" if report.num_steps > 1 else "")
    how = f"{report.saliency}, drop_fraction {report.drop_fraction:g}, {steps}"
    if report.saliency == "lasting":
        how = "lasting, as many as it took"
    lines = [
        f'"{printable(report.text, 240)}"',
        f"asked: {asked}; {outcome}",
        f"changed: {report.num_dropped} weights dropped, {report.num_grown} grown, {report.changed_share:.4%} of the "
        f"backbone's {report.num_weights:,} ({how})",
    ]
    names = [*report.before.concepts, "label"]
    before, after = _rows(report.before), _rows(report.after)
    widths = [max(map(len, column)) for column in ([*names, "concept"], before, after)]
    lines.append(f"  {'':{widths[0]}}  {'before':{widths[1]}}  after")
    for name, old, new in zip(names, before, after, strict=True):
        mark = "*" if name == report.concept else " "
        lines.append(f"{mark} {name:{widths[0]}}  {old:{widths[1]}}  {new}")
    return "\n".join(lines)


def _rows(prediction: TextPrediction) -> list[str]:
    def row(name: str, probabilities: Mapping[str, float]) -> str:
        return f"{name} (" + ", ".join(f"{each} {share:.1%}" for each, share in probabilities.items()) + ")"

    rows = [row(name, prediction.concept_probabilities[concept]) for concept, name in prediction.concepts.items()]
    return [*rows, row(prediction.label, prediction.label_probabilities)]
