"""Draws single_edits.png and sequential_editing.png from their tables in docs/results/intervention.md.

    python docs/images/draw_tables.py

Where a table has a row for each order, order 0 is shown. Needs the extra `report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsecbm_jax.evaluation.editing.named_editors import EDITORS
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.report import plots
from sparsecbm_jax.report.elements import Figure
from sparsecbm_jax.report.sections import intervention

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "results" / "intervention.md"

Row = dict[str, str]


def rows_of(page: str, column: str) -> list[Row]:
    """Returns the rows of the first Markdown table that has a column, as dicts from column to cell."""
    lines = page.splitlines()
    # The line below a head is of dashes.
    begin = next(i for i, line in enumerate(lines) if column in _cells(line) and lines[i + 1].startswith("| ---"))
    heads, rows = _cells(lines[begin]), []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(heads, _cells(line), strict=True)))
    return rows


def single_edits(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the table of edits by ranking and share as the suite reports it; an edit's changes are their mean."""
    rankings = {title: name for name, title in intervention.TITLES.items()}
    strategies = {strategy.title: name for name, strategy in STRATEGIES.items()}
    points, dense, oracle = [], [], {}
    for row in rows:
        title, scores = row["ranking"], {"concept": _share(row["concepts"]), "task": _share(row["task"])}
        if title in strategies:
            dense.append({"strategy": strategies[title], **scores})
        elif title not in rankings:
            oracle = scores
        else:
            side: dict[str, Any] = {}
            for name, column in (("concept", "held-out concept"), ("task", "held-out task")):
                side |= {f"{name}_before": 0.0, f"{name}_after": _share(row[column])}
            point = {"ranking": rankings[title], "ratio": float(row["r"].removesuffix(" %")) / 100, **scores}
            point |= {"repaired": _share(row["repaired"]), "changed": float(row["changed"]), "num_cells": 0}
            points.append({**point, "seconds": None, "side": [side]})
    return {"split": "test", "single": {"points": points, "dense": dense, "oracle": oracle}}


def sequential_editing(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the table of editors as the suite reports it; what is a change there counts from 0."""
    found = {}
    for row in rows:
        order = {column: _share(row[column]) for column in ("repaired", "retained", "prequential", "locality")}
        order["without"] = float(row["prequential"]) / 100 - float(row["gain"]) / 100
        order["others_changed"] = _share(row["other concepts changed"])
        for column, name in (("held-out concepts", "held_out"), ("held-out task", "label"), ("generality",) * 2):
            order |= {f"{name}_before": 0.0, f"{name}_after": _share(row[column])}
        name = row["editor"].strip("`")
        summary = {key: {"mean": None} for key in ("num_reviews", "num_edits", "changed", "seconds")}
        found[name] = {"title": EDITORS[name].title, "orders": [order], "summary": summary}
    return {"split": "test", "sequential": found}


def figures(page: str) -> list[Figure]:
    """Returns the figures of the page's tables."""
    first_order = [row for row in rows_of(page, "prequential") if row["order"] == "0"]
    reports = [single_edits(rows_of(page, "ranking")), sequential_editing(first_order)]
    return [figure for report in reports for part in intervention.sections(report) for figure in part.figures]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _share(cell: str) -> float | None:
    """Reads a share in percent, or a change in points."""
    return float(cell) / 100 if cell.lstrip("+-").replace(".", "").isdigit() else None


def main() -> None:
    """Draws the pictures."""
    for figure in figures(PAGE.read_text(encoding="utf-8")):
        (picture,) = plots.draw(figure, "png")
        (FOLDER / f"{figure.name}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
