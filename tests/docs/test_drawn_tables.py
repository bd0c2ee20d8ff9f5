"""The pictures that docs/images/draw_tables.py draws show the values of the tables beside them."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest

from sparsecbm_jax.report import plots

from tests.support.paths import REPOSITORY

PAGE = (REPOSITORY / "docs" / "results" / "intervention.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    path = REPOSITORY / "docs" / "images" / "draw_tables.py"
    spec = importlib.util.spec_from_file_location("draw_tables", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(axis: Any) -> dict[str, list[float]]:
    return {line.get_label(): [round(float(y), 1) for y in line.get_ydata()] for line in axis.lines}


def test_the_curves_are_those_of_the_table(tables: ModuleType) -> None:
    single, sequential = tables.figures(PAGE)
    assert (single.name, sequential.name) == ("single_edits", "sequential_editing")
    above = single.draw(plots.pyplot()).axes[0]
    shown = lines_of(above)
    assert above.get_title() == "concepts" and shown["signed"] == [87.1, 99.6, 99.6, 98.1, 96.4, 96.1, 94.7]
    assert shown["magnitude (paper)"][-1] == 89.2 and shown["dense joint model"] == [88.0, 88.0]
    drawn = sequential.draw(plots.pyplot())
    (retained,) = (axis for axis in drawn.axes if "retained" in axis.get_xlabel())
    names = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    points = [round(float(line.get_xdata()[0]), 1) for line in retained.lines if len(line.get_xdata()) == 1]
    assert dict(zip(names, points, strict=True))["continual"] == 94.5


def test_a_table_ends_with_its_last_row(tables: ModuleType) -> None:
    page = "# Head\n\n| a | b |\n| --- | ---: |\n| x | 1.0 |\n| y | – |\n\n| z | 2.0 |\n"
    assert tables.rows_of(page, "b") == [{"a": "x", "b": "1.0"}, {"a": "y", "b": "–"}]
