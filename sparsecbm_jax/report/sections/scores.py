"""The scores of a finished run as a section: each concept and the task against the majority, with calibration."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from sparsecbm_jax.evaluation.tables import sections_of
from sparsecbm_jax.model.card import split_reports
from sparsecbm_jax.report import plots
from sparsecbm_jax.report.elements import Figure, Section, Table, percent
from sparsecbm_jax.report.run_log import WRITTEN_BY, is_number

_COLUMNS = (
    ("accuracy", "accuracy", 1),
    ("majority_accuracy", "majority", 1),
    ("macro_f1", "macro-F1", 1),
    ("paper_macro_f1", "paper F1", 1),
    ("ece", "ECE", 1),
)


def evaluation_section(metrics: Mapping[str, Any], source: str) -> Section:
    """Shows the scores of every split, of each concept and of the task, with majority baseline and calibration.

    Args:
        metrics: Contents of `metrics.json`.
        source: Name of the file, for errors.

    Raises:
        ValueError: There are no scores of a split, or a score is not a number.
    """
    reports = split_reports(metrics)
    if not reports:
        raise ValueError(f"{source}: no scores of a split; expected 'test' with 'task' in it, {WRITTEN_BY}")
    # The test split, which is scored once and last, comes first.
    split = "test" if "test" in reports else next(reversed(reports))
    reports = {split: reports[split], **reports}
    tables = []
    for name_of_split, report in reports.items():
        rows = []
        for name, scores in _scores(report, f"{source}: {name_of_split}"):
            row = [name, *(percent(scores[key], digits) for key, _, digits in _COLUMNS)]
            gain = None if scores["accuracy"] is None else scores["accuracy"] - scores["majority_accuracy"]
            row.insert(3, percent(gain, is_signed=True))
            row.append("–" if scores["log_loss"] is None else f"{scores['log_loss']:.3f}")
            rows.append([*row, f"{scores['num']:,.0f}"])
        head = ["", *(title for _, title, _ in _COLUMNS), "log loss, nats", "labelled"]
        head.insert(3, "gain")
        tables.append(Table(f"{name_of_split.capitalize()} split, in percent", head, rows))
    of_split = _scores(reports[split], f"{source}: {split}")
    figures = [
        Figure(
            "accuracy",
            f"Accuracy on {split}, and that of always predicting the most frequent class.",
            functools.partial(_draw_accuracy, of_split, split),
        ),
        Figure(
            "calibration",
            f"Expected calibration error on {split}: mean distance of the probability of the predicted class from the "
            "accuracy at that probability.",
            functools.partial(_draw_calibration, of_split, split),
        ),
    ]
    words = [
        "Majority: accuracy of always predicting the most frequent class; gain: points above it. Paper F1: mean over "
        "classes of the binary macro-F1 of class against rest, which is above macro-F1. ECE: expected calibration "
        "error. All concepts: all their cells pooled."
    ]
    epoch, seconds = metrics.get("best_epoch"), metrics.get("train_seconds")
    if epoch is not None and is_number(epoch):
        took = f" Training took {seconds:,.0f} s." if is_number(seconds) else ""
        among = " of those at the final sparsity" if "density" in metrics else ""
        chosen = f"Epoch {epoch + 1} was chosen, the best on validation{among}; test was scored once, with it."
        words.append(chosen + took)
    return Section("Evaluation", words, figures, tables)


def _scores(report: Mapping[str, Any], where: str) -> list[tuple[str, Mapping[str, Any]]]:
    rows = sections_of(report)
    for name, scores in rows:
        for key in (*(key for key, _, _ in _COLUMNS), "log_loss", "num"):
            if not isinstance(scores, Mapping) or key not in scores:
                raise ValueError(f"{where}: {name!r} has no {key!r}; expected {WRITTEN_BY}")
            if scores[key] is not None and not is_number(scores[key]):
                raise ValueError(f"{where}: {key!r} of {name!r} is {scores[key]!r}; expected a number")
    return rows


def _draw_accuracy(scores: Sequence[tuple[str, Mapping[str, Any]]], split: str, pyplot: Any) -> Any:
    figure, axis = pyplot.subplots(figsize=(plots.COLUMN, 0.9 + 0.26 * len(scores)), layout="constrained")
    for place, (_, one) in enumerate(scores):
        if one["accuracy"] is not None:
            ends = [100 * one["majority_accuracy"], 100 * one["accuracy"]]
            axis.plot(ends, [place, place], color="0.75", linewidth=2, zorder=1)
            first = place == 0
            axis.plot(
                ends[0],
                place,
                linestyle="none",
                color=plots.GREY,
                marker="|",
                markersize=10,
                label="majority" if first else None,
            )
            axis.plot(ends[1], place, linestyle="none", label="model" if first else None, **plots.style(0))
    _name_rows(axis, scores)
    axis.set_xlabel(f"accuracy on {split} (%)")
    plots.legend(figure)
    return figure


def _draw_calibration(scores: Sequence[tuple[str, Mapping[str, Any]]], split: str, pyplot: Any) -> Any:
    figure, axis = pyplot.subplots(figsize=(plots.COLUMN, 0.7 + 0.26 * len(scores)), layout="constrained")
    values = [0.0 if one["ece"] is None else 100 * one["ece"] for _, one in scores]
    axis.barh(range(len(scores)), values, height=0.55, color=plots.COLOURS[0])
    _name_rows(axis, scores)
    axis.set_xlabel(f"calibration error on {split} (points)")
    return figure


def _name_rows(axis: Any, scores: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    axis.set_yticks(range(len(scores)), [plots.label(name) for name, _ in scores])
    axis.invert_yaxis()
    plots.tidy([axis])
