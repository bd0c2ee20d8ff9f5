"""The intervention suite as sections: gains and costs of corrections.

Reference: Tan et al. 2024, Figure 3 (single edits); the rest is ours.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsecbm_jax.model.strategies import JOINTLY_TRAINED, STRATEGIES
from sparsecbm_jax.report import plots
from sparsecbm_jax.report.elements import Figure, Section, Table, percent, render_markdown
from sparsecbm_jax.runtime.json_files import read_json

SuiteReport = dict[str, Any]

FILE = "intervention.json"
_WRITTEN_BY = "what launch/evaluate_interventions.py writes"
_PARTS = ("single", "minimal", "sequential")
# The parts' names in version 0.1.0.
_FORMER = {"undone": "single", "streams": "sequential"}
TITLES = {"none": "no intervention", "magnitude": "magnitude (paper)", "signed": "signed", "random": "random"}
STYLES = {"magnitude": 1, "signed": 0, "random": 2}


def read(folder: Path) -> SuiteReport:
    """Reads the report of `launch/evaluate_interventions.py` from its workdir.

    Raises:
        FileNotFoundError: There is no such report.
        ValueError: The file has other contents than the command writes; the line, or the missing key, is named.
    """
    path = folder / FILE
    report = read_json(path, _WRITTEN_BY)
    try:
        report = {_FORMER.get(name, name): part for name, part in report.items()}
        if not sections(report):
            raise KeyError(" or ".join(_PARTS))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}; expected {_WRITTEN_BY}") from error
    return report


def sections(report: SuiteReport) -> list[Section]:
    """Makes a section for each part of the report."""
    parts: tuple[Callable[[SuiteReport], Section], ...] = (_single, _minimal, _sequential)
    return [part(report) for name, part in zip(_PARTS, parts, strict=True) if name in report]


def render(report: SuiteReport) -> str:
    """Renders the report as Markdown."""
    return "\n\n".join([f"# Interventions, {report['split']} split", *map(render_markdown, sections(report))])


def share(value: float) -> str:
    """Formats a share of the backbone in percent, exactly and with as few digits as possible.

    >>> [share(value) for value in (0.0, 0.0001, 0.03)]
    ['0', '0.01 %', '3 %']
    """
    return f"{100 * value:g} %" if value else "0"


def _changes(point: SuiteReport, name: str) -> list[float]:
    """Returns the change of an accuracy on held-out rows by each edit that was tried."""
    pairs = [(side[f"{name}_before"], side[f"{name}_after"]) for side in point["side"]]
    return [after - before for before, after in pairs if before is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def _single(report: SuiteReport) -> Section:
    found = report["single"]
    rows = []
    for point in found["points"]:
        rows.append([TITLES[point["ranking"]], share(point["ratio"]), f"{point['changed']:.0f}"])
        rows[-1] += [percent(point[name]) for name in ("repaired", "concept", "task")]
        for name in ("concept", "task"):
            rows[-1].append(percent(_mean(_changes(point, name)), is_signed=True))
        rows[-1].append("–" if point["seconds"] is None else f"{point['seconds']:.2f}")
    rows.append(["oracle activation", *"–––", "set", percent(found["oracle"]["task"]), *"–––"])
    for dense in found["dense"]:
        scores = [percent(dense[name]) for name in ("concept", "task")]
        rows.append([STRATEGIES[dense["strategy"]].title, *"–––", *scores, *"–––"])
    heads = "ranking", "r", "changed", "repaired", "concepts", "task", "held-out concept", "held-out task", "seconds"
    num_cells, sides = found["points"][0]["num_cells"], len(found["points"][0]["side"])
    words = (
        f"Gold labels select the wrong cells ({num_cells} of them are corrected). Each review is corrected from the "
        "original masks, so the accuracy on concepts cannot fall. The held-out columns can: they are the points that "
        f"the edited concept and the task gain on reviews of other originals, mean over {sides} of the edits. In "
        "percent; a share r of the weights is dropped, and as many are grown."
    )
    caption = (
        "Accuracy against the share r of the backbone's weights that a correction drops, and grows. Above: each review "
        "is corrected from the original masks. Below: the effect of one edit on texts that it was not made for; "
        "shaded, the range over edits."
    )
    table = Table("Corrections by ranking of weights and share r, in percent", heads, rows)
    figure = Figure("single_edits", caption, functools.partial(_draw_single, report))
    return Section("Single edits, triggered by gold labels", [words], [figure], [table])


def _minimal(report: SuiteReport) -> Section:
    found = report["minimal"]
    rows = []
    for name, one in {"all concepts": found["all"], **found["concepts"]}.items():
        counts, shares = one["changed"], one["share"]
        row = [name, f"{one['num_cells']}", percent(one["repaired"])]
        row += ["–" if counts[q] is None else f"{counts[q]:.0f}" for q in ("0.25", "0.5", "0.75", "0.9", "1.0")]
        row += ["–" if shares[q] is None else f"{100 * shares[q]:.2g}" for q in ("0.5", "0.9")]
        rows.append([*row, "–" if one["seconds"] is None else f"{one['seconds']:.2f}"])
    heads = ["concept", "wrong cells", "repaired %", "25 %", "median", "75 %", "90 %", "most", "median, % of backbone"]
    heads += ["90 %, % of backbone", "seconds"]
    words = "Weights changed, dropped and grown together, among the cells that were repaired; each cell by itself."
    caption = (
        "Wrong cells that are repaired when at most so many weights change: by the minimal edit of each, and, as "
        "markers, by edits of a fixed size."
    )
    table = Table("Weights that minimal edits change", heads, rows)
    figure = Figure("minimal_edits", caption, functools.partial(_draw_minimal, report))
    return Section("Minimal edits", [words], [figure], [table])


# Of a sequence's report: column, value of a number in it, whether it is a difference in points.
_SEQUENCE_COLUMNS: tuple[tuple[str, Callable[[SuiteReport], float | None], bool], ...] = (
    ("repaired", lambda r: r["repaired"], False),
    ("retained", lambda r: r["retained"], False),
    ("before reveal", lambda r: r["prequential"], False),
    ("gain over none", lambda r: _less(r["prequential"], r["without"]), True),
    ("held-out concepts", lambda r: _less(r["held_out_after"], r["held_out_before"]), True),
    ("held-out task", lambda r: _less(r["label_after"], r["label_before"]), True),
    ("same siblings", lambda r: _less(r["generality_after"], r["generality_before"]), True),
    ("other siblings still correct", lambda r: r["locality"], False),
    ("other concepts changed", lambda r: r["others_changed"], False),
)


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _values(editor: SuiteReport, of: Callable[[SuiteReport], float | None]) -> list[float]:
    return [value for value in map(of, editor["orders"]) if value is not None]


def _sequential(report: SuiteReport) -> Section:
    found = report["sequential"]
    rows = []
    for editor in found.values():
        row = [editor["title"]]
        for _, of, is_signed in _SEQUENCE_COLUMNS:
            values = _values(editor, of)
            spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
            row.append(percent(_mean(values), is_signed=is_signed) + spread)
        for name, digits in (("num_reviews", 0), ("num_edits", 0), ("changed", 0), ("seconds", 2)):
            mean = editor["summary"][name]["mean"]
            row.append("–" if mean is None else f"{mean:.{digits}f}")
        rows.append(row)
    heads = ["editor", *(name for name, _, _ in _SEQUENCE_COLUMNS), "reviews", "corrections", "changed", "seconds"]
    orders = len(next(iter(found.values()))["orders"])
    over = "one order" if orders == 1 else f"mean ± standard deviation over {orders} orders"
    words = (
        f"All corrections stay active; {over} of the reviews, in percent or, with a sign, in points. Retained: "
        "corrected cells that are correct at the end. Before reveal: accuracy of each review before it is corrected; "
        "gain: over the same reviews without corrections. Same siblings: of a corrected cell's siblings with the same "
        "gold class, points gained; other siblings: of those with another class, the share still correct. The oracle "
        "sets an activation of the text itself, so it is correct by definition, and no later prediction changes. A "
        "wrong label counts as repaired where the text got the wrong class that was requested."
    )
    caption = "Gains and costs of each editor at the end of a sequence of reviews: mean, and range over orders."
    table = Table("Sequential editing, by editor", heads, rows)
    figure = Figure("sequential_editing", caption, functools.partial(_draw_sequential, report))
    return Section("Sequential editing", [words], [figure], [table])


def _draw_single(report: SuiteReport, pyplot: Any) -> Any:
    found = report["single"]
    figure, axes = pyplot.subplots(2, 2, figsize=(plots.BOTH, 5), layout="constrained", sharex=True)
    ratios = sorted({point["ratio"] for point in found["points"]})
    places = {ratio: i for i, ratio in enumerate(ratios)}
    for ranking in dict.fromkeys(point["ranking"] for point in found["points"] if point["ranking"] != "none"):
        points = [point for point in found["points"] if point["ranking"] in ("none", ranking)]
        where, style = [places[point["ratio"]] for point in points], plots.style(STYLES[ranking])
        for column, name in enumerate(("concept", "task")):
            levels = [float("nan") if point[name] is None else 100 * point[name] for point in points]
            axes[0, column].plot(where, levels, label=TITLES[ranking], **style)
            changes = [[100 * change for change in _changes(point, name)] for point in points]
            if all(changes):
                axes[1, column].plot(where, [statistics.mean(c) for c in changes], **style)
                low, high = [min(c) for c in changes], [max(c) for c in changes]
                axes[1, column].fill_between(where, low, high, color=style["color"], alpha=0.12, linewidth=0)
    lines = [
        (STRATEGIES[one["strategy"]].title, "--" if one["strategy"] in JOINTLY_TRAINED else "-.", one)
        for one in found["dense"]
    ]
    for label, dash, scores in [*lines, ("oracle activation", ":", found["oracle"])]:
        for column, name in enumerate(("concept", "task")):
            if scores and scores.get(name) is not None:
                axes[0, column].axhline(
                    100 * scores[name], color=plots.GREY, linestyle=dash, linewidth=1.2, label=label
                )
    for column, name in enumerate(("concepts", "task")):
        axes[0, column].set(title=name, ylabel=f"accuracy on {report['split']} (%),\ngold-triggered, single edits")
        axes[1, column].axhline(0, color=plots.GREY, linewidth=0.8)
        axes[1, column].set(xlabel="r, share dropped, and grown (%)", ylabel="change (points),\nother texts, one edit")
        axes[1, column].set_xticks(list(places.values()), [f"{100 * ratio:g}" for ratio in ratios])
    plots.tidy(axes.flat)
    plots.legend(figure)
    return figure


def _draw_minimal(report: SuiteReport, pyplot: Any) -> Any:
    found, total = report["minimal"], report["num_weights"]
    figure, axis = pyplot.subplots(figsize=(plots.COLUMN, 2.8), layout="constrained")
    num_cells, changed = found["all"]["num_cells"], found["changed"]
    where = [100 * count / total for count in changed]
    level = [100 * (i + 1) / num_cells for i in range(len(changed))]
    axis.step(where, level, where="post", color="black", linewidth=1.6, label="minimal edit")
    for point in report.get("single", {}).get("points", ()):
        if point["ratio"]:
            style = plots.style(STYLES[point["ranking"]])
            is_first = TITLES[point["ranking"]] not in axis.get_legend_handles_labels()[1]
            label = TITLES[point["ranking"]] if is_first else None
            # As many are grown as are dropped.
            axis.plot(200 * point["ratio"], 100 * point["repaired"], linestyle="none", label=label, **style)
    axis.set(xscale="log", ylim=(-3, 103))
    axis.set(xlabel="weights changed (% of the backbone)", ylabel=f"wrong cells repaired (% of {num_cells})")
    plots.tidy([axis])
    plots.legend(figure)
    return figure


_PANELS = (
    ("gain before\nthe reveal\n(points)", "gain over none"),
    ("held-out\nconcepts\n(points)", "held-out concepts"),
    ("corrected\nretained\n(%)", "retained"),
    ("same\nsiblings\n(points)", "same siblings"),
    ("other siblings\nstill correct\n(%)", "other siblings still correct"),
)


def _draw_sequential(report: SuiteReport, pyplot: Any) -> Any:
    found = report["sequential"]
    of_column = {name: (of, is_signed) for name, of, is_signed in _SEQUENCE_COLUMNS}
    height = 1.3 + 0.3 * len(found)
    figure, axes = pyplot.subplots(
        1, len(_PANELS), figsize=(plots.BOTH + 0.6, height), layout="constrained", sharey=True
    )
    for axis, (title, column) in zip(axes, _PANELS, strict=True):
        of, is_signed = of_column[column]
        for place, editor in enumerate(found.values()):
            values = [100 * value for value in _values(editor, of)]
            if values:
                axis.plot(
                    [min(values), max(values)], [place, place], color="0.6", linewidth=2.5, solid_capstyle="round"
                )
                axis.plot(statistics.mean(values), place, markersize=6, **plots.style(0))
        if is_signed:
            axis.axvline(0, color=plots.GREY, linewidth=0.8)
        axis.set_xlabel(title)
        axis.margins(x=0.12)
    axes[0].set_yticks(range(len(found)), [plots.label(editor["title"], 40) for editor in found.values()])
    axes[0].set_ylim(len(found) - 0.5, -0.5)
    plots.tidy(axes)
    return figure
