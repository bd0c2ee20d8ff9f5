"""Pathways and corrections for a terminal, and pathways as the rows of a table."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from sparsecbm_jax.data.words import Word, printable
from sparsecbm_jax.explanation.pathways import ConceptPathway, DecisionPathway

BAR_WIDTH = 12
CSV_COLUMNS = (
    "text_number",
    "text",
    "target",
    "label",
    "label_probability",
    "explained_label",
    "foil",
    "expected_label",
    "concept",
    "predicted_class",
    "probability",
    "is_unsure",
    "contribution",
    "contrast",
    "effect",
    "explained_class",
    "method",
)


def top_words(pathway: DecisionPathway, lane: ConceptPathway, top: int) -> list[tuple[Word, float]]:
    """Returns the words of highest absolute score for a concept, with their scores, without words that were not read.

    A concept that is read as unknown, and was not asked for, has none.

    Args:
        pathway: The pathway of the text.
        lane: The concept's lane in it.
        top: Most words to return.
    """
    if not lane.shows_words:
        return []
    scored = zip(pathway.words, lane.word_scores, strict=True)
    return sorted(((word, score) for word, score in scored if word.is_read), key=lambda pair: -abs(pair[1]))[:top]


def csv_header(top: int = 5) -> str:
    """Returns the first line of the table that `csv_rows` fills, with columns for `top` words."""
    return _csv([[*CSV_COLUMNS, *(f"{kind}_{i + 1}" for i in range(top) for kind in ("word", "score"))]])


def csv_rows(pathway: DecisionPathway, number: int, top: int = 5) -> str:
    """Returns a line for each concept of a text. Texts stand as they are: no spreadsheet may read them as formulas.

    Args:
        pathway: The pathway, from `explain`.
        number: Number of the text, from 0.
        top: Words shown per concept, those of highest absolute score; cells are empty where a text has fewer.
    """
    rows: list[list[Any]] = []
    for lane in pathway.concepts:
        words = [cell for word, score in top_words(pathway, lane, top) for cell in (word.text, score)]
        row = [number, pathway.text, pathway.target, pathway.label, pathway.label_probabilities[pathway.label]]
        row += [pathway.explained_label, pathway.foil, pathway.expected_label]
        row += [lane.name, lane.predicted_class, lane.probabilities[lane.predicted_class]]
        row += [lane.is_unsure]
        row += [lane.contribution, lane.contrast, lane.effect, lane.explained_class, pathway.method, *words]
        rows.append(row + [""] * (len(CSV_COLUMNS) + 2 * top - len(row)))
    return _csv(rows)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue()


def method_words(pathway: DecisionPathway) -> str:
    """Describes the method of the word scores: 'integrated_gradients (signed, from zero in 32 steps)'."""
    path = "" if pathway.baseline is None else f", from {pathway.baseline} in {pathway.num_steps} steps"
    return f"{pathway.method} ({'signed' if pathway.is_signed else 'no sign'}{path})"


def render_text(pathway: DecisionPathway, top: int = 5) -> str:
    """Renders the pathway for a terminal; control characters of the text are escaped.

    Args:
        pathway: The pathway, from `explain`.
        top: Words shown per concept, those of highest absolute score.
    """
    label = pathway.explained_label
    share = pathway.label_probabilities
    lines = [
        f'"{printable(pathway.text, 240)}"' + (" (longer than the model reads)" if pathway.is_truncated else ""),
        f"label: {pathway.label} {share[pathway.label]:.1%}{' (not sure)' if pathway.is_unsure else ''}"
        + (f"; explained: {label} {share[label]:.1%}" if label != pathway.label else ""),
        f"explained: {printable(pathway.target, 120)}; words by {method_words(pathway)}",
        f"  logit {pathway.label_logits[label]:+.3f} of {label!r} = base {pathway.base[label]:+.3f} + the concepts"
        f"{', against the average text and label' if pathway.reference == 'mean' else ', counted from zero'}:",
    ]
    name_width = max(len(lane.name) for lane in pathway.concepts)
    class_width = max(len(lane.predicted_class) for lane in pathway.concepts)
    largest = max(abs(lane.contribution) for lane in pathway.concepts) or 1.0
    for lane in pathway.concepts:
        bar = "█" * round(abs(lane.contribution) / largest * BAR_WIDTH)
        density = "dense" if lane.subnetwork is None else f"{lane.subnetwork.density:.1%} of weights"
        lines.append(
            f"  {lane.name:{name_width}}  {lane.predicted_class:{class_width}} "
            f"{lane.probabilities[lane.predicted_class]:6.1%}  {lane.contribution:+.3f} {bar:{BAR_WIDTH}}  {density}"
            f"{_doubts(lane)}"
        )
        number = "+.3g" if pathway.is_signed else ".3g"
        ranked = top_words(pathway, lane, top)
        words = "  ".join(f"{printable(word.text, 24)} {score:{number}}" for word, score in ranked)
        about = "" if lane.explained_class == lane.predicted_class else f"for {lane.explained_class}: "
        words = words if lane.shows_words else "no words, since it is read as unknown"
        lines.append(f"  {'':{name_width}}  {about}{words}")
    return "\n".join([*lines, *_comparisons(pathway)])


def _doubts(lane: ConceptPathway) -> str:
    """Says how far a concept can be relied on."""
    doubts = ["not sure"] * lane.is_unsure + ["read no better than by guessing"] * lane.is_guess
    return f" ({', '.join(doubts)})" if doubts else ""


def _comparisons(pathway: DecisionPathway) -> list[str]:
    """Says why the explained label and not the foil, and which concepts move the expected label."""
    lines = []
    if pathway.foil != pathway.explained_label:
        contrasts = (f"{lane.name} {lane.contrast:+.3f}" for lane in pathway.concepts)
        lines.append(f"  why {pathway.explained_label!r} and not {pathway.foil!r}: {', '.join(contrasts)}")
    if pathway.expected_label is not None:
        effects = (f"{lane.name} {lane.effect:+.2f}" for lane in pathway.concepts)
        lines.append(f"  expected label {pathway.expected_label:.2f}, moved by {', '.join(effects)}")
    return lines
