"""Scores as tables for a terminal."""

import math
from collections.abc import Mapping
from typing import Any

COLUMNS = (
    ("accuracy", "accuracy"),
    ("majority_accuracy", "majority"),
    ("macro_f1", "macro-F1"),
    ("paper_macro_f1", "paper F1"),
    ("ece", "ECE"),
)


def sections_of(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the rows of a report's table, names with their scores: each concept, all concepts, and the task."""
    rows = list(report.get("concepts", {}).items())
    rows += [("all concepts", report["concept"])] if "concept" in report else []
    return [*rows, ("task", report["task"])]


def percent(value: float | None) -> str:
    """Formats a share in percent; - for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def render_table(report: Mapping[str, Any]) -> str:
    """Renders a report as an aligned plain-text table, in percent, the majority baseline next to the accuracy.

    Args:
        report: The report, from `evaluate`.
    """
    rows = [["%", *(title for _, title in COLUMNS), "labelled"]]
    for name, scores in sections_of(report):
        rows.append([name, *(percent(scores[key]) for key, _ in COLUMNS), f"{scores['num']:.0f}"])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
