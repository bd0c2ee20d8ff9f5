"""Tables and plots of the intervention suite, from a report made by hand; and results that are made once."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparsecbm_jax.evaluation.editing.suite import summarise_minimal
from sparsecbm_jax.evaluation.metrics import summarise
from sparsecbm_jax.report import plots
from sparsecbm_jax.report.sections import intervention
from sparsecbm_jax.runtime.result_cache import Results

SEQUENCE = {
    "num_reviews": 20,
    "num_edits": 10,
    "repaired": 1.0,
    "retained": 0.75,
    "prequential": 0.8,
    "without": 0.9,
    "held_out_before": 0.85,
    "held_out_after": 0.83,
    "label_before": 0.6,
    "label_after": None,
    "generality_before": 0.25,
    "generality_after": 0.5,
    "locality": 0.95,
    "others_changed": 0.02,
    "changed": 60.0,
    "seconds": None,
}


def report(repairs: dict[str, float]) -> dict[str, Any]:
    """Two shares of three rankings, five minimal edits, two editors of two orders."""

    def point(ranking: str, ratio: float, repaired: float) -> dict[str, Any]:
        side = [
            {"concept_before": 0.9, "concept_after": 0.9 - fall, "task_before": 0.6, "task_after": 0.6 - fall}
            for fall in (0.1 * repaired, 0.3 * repaired)
        ]
        scores = {"num_cells": 40, "repaired": repaired, "concept": 0.87 + 0.13 * repaired, "task": 0.64}
        return {"ranking": ranking, "ratio": ratio, **scores, "changed": 21.0, "seconds": 0.5, "side": side}

    dense = [
        {"strategy": "joint", "concept": 0.88, "task": 0.65},
        {"strategy": "standard", "concept": None, "task": 0.67},
    ]
    points = [point("none", 0.0, 0.0)]
    points += [point(name, ratio, ratio**0.1 * most) for name, most in repairs.items() for ratio in (0.0001, 0.01)]
    cells = [{"is_repaired": n < 4, "changed": 10**n, "seconds": 0.1} for n in range(5)]
    orders = [SEQUENCE, {**SEQUENCE, "retained": 0.25, "held_out_after": 0.87}]
    editor = {"summary": summarise(orders), "orders": orders}
    return {
        "split": "test",
        "num_weights": 100_000,
        "single": {"points": points, "oracle": {"task": 0.7}, "dense": dense},
        "minimal": {
            "all": summarise_minimal(cells, 100_000),
            "concepts": {"food": summarise_minimal(cells[:1], 100_000), "noise": summarise_minimal([], 100_000)},
            "changed": [10**n for n in range(4)],
        },
        "sequential": {"minimal": {"title": "minimal", **editor}, "none": {"title": "no correction", **editor}},
    }


FIGURES = ("single_edits", "minimal_edits", "sequential_editing")
MADE = report({"magnitude": 0.3, "signed": 1.0, "random": 0.2})


@pytest.mark.parametrize(
    "line",
    [
        "| no intervention | 0 | 21 | 0.0 | 87.0 | 64.0 | +0.0 | +0.0 | 0.50 |",
        "| signed | 1 % | 21 | 63.1 | 95.2 | 64.0 | -12.6 | -12.6 | 0.50 |",
        "| oracle activation | – | – | – | set | 70.0 | – | – | – |",
        "| dense joint model | – | – | – | 88.0 | 65.0 | – | – | – |",
        "| dense model of the task alone | – | – | – | – | 67.0 | – | – | – |",
        "| all concepts | 5 | 80.0 | 10 | 100 | 1000 | 1000 | 1000 | 0.1 | 1 | 0.10 |",
        "| noise | 0 | – | – | – | – | – | – | – | – | – |",
        "| minimal | 100.0 ± 0.0 | 50.0 ± 35.4 | 80.0 ± 0.0 | -10.0 ± 0.0 | +0.0 ± 2.8 | – | +25.0 ± 0.0 "
        "| 95.0 ± 0.0 | 2.0 ± 0.0 | 20 | 10 | 60 | – |",
    ],
)
def test_tables_say_what_was_found(line: str) -> None:
    assert line in intervention.render(MADE).splitlines()


def test_tables_have_the_parts_that_were_asked_for() -> None:
    text = intervention.render({name: MADE[name] for name in ("split", "num_weights", "minimal")})
    assert "## Minimal edits" in text and "## Sequential" not in text and "## Single" not in text


def test_a_report_of_version_0_1_0_is_read(tmp_path: Path) -> None:
    former = {"single": "undone", "sequential": "streams"}
    written = {former.get(name, name): part for name, part in MADE.items()}
    (tmp_path / intervention.FILE).write_text(json.dumps(written))
    assert intervention.read(tmp_path) == json.loads(json.dumps(MADE))


def test_every_part_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots: matplotlib is not installed")
    plots.write([figure for section in intervention.sections(MADE) for figure in section.figures], tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg", "pdf")}


def test_results_are_made_once_and_a_torn_line_again(tmp_path: Path) -> None:
    path, made = tmp_path / "results.jsonl", []

    def make() -> dict[str, Any]:
        made.append(None)
        return {"value": (len(made), None)}

    results = Results(path)
    assert [results.once(("a", 0.1), make), results.once(("a", 0.1), make)] == [{"value": [1, None]}] * 2
    results.once(("b",), make)
    whole = path.read_text()
    path.write_text(whole[:-5])
    again = Results(path)
    assert ("a", 0.1) in again and ("b",) not in again
    assert again.once(("b",), make) == {"value": [3, None]}
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == [["a", 0.1], ["b"]]
    assert Results(path).once(("a", 0.1), make) == {"value": [1, None]} and len(made) == 3
