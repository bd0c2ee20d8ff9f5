"""The tutorials: their code runs on a small model, and they were committed as a whole run left them."""

from __future__ import annotations

import dataclasses
import json
import linecache
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from sparsecbm_jax.model.saved_model import load, save

from tests.support.paths import REPOSITORY
from tests.support.small_sample import SMALL_RUN

pytest.importorskip("IPython", reason="IPython not here: pip install 'sparsecbm-jax[docs]'")

pytestmark = pytest.mark.long

FOLDER = REPOSITORY / "docs" / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.ipynb"))
MAX_CODE_CELLS = 15
AMPLIFIED = 4.0
# Of this machine or another: nothing in a tutorial says where it was run.
_ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:tmp|home|root|work|usr|var|opt|private|Users|mnt|data)/|[A-Z]:\\\\")


def read(path: Path) -> dict[str, Any]:
    """The notebook as JSON; its cells' sources are lists of lines."""
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


class Tutorial:
    """A notebook that is run in this process, its parameters replaced.

    Attributes:
        module: whose names the cells read and set.
    """

    def __init__(self, name: str, **parameters: Any) -> None:
        self.path, self._parameters = FOLDER / f"{name}.ipynb", parameters
        self.module = types.ModuleType(f"tutorial_{name}")

    def run(self) -> None:
        """Runs the cells in their order."""
        for n, cell in enumerate(code_cells(self.path), 1):
            self._execute("".join(cell["source"]), n)
            if "parameters" in cell["metadata"].get("tags", ()):
                unknown = set(self._parameters) - set(vars(self.module))
                assert not unknown, f"{self.path.name} has no parameters {unknown}"
                vars(self.module).update(self._parameters)

    def _execute(self, source: str, n: int) -> None:
        place = f"{self.path.name}, code cell {n}"
        # So that a traceback shows the lines of the cell.
        linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
        exec(compile(source, place, "exec", dont_inherit=True), vars(self.module))


@pytest.fixture
def run_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., types.ModuleType]:
    """Runs a tutorial in an empty folder; gives the names that it leaves."""

    def run(name: str, **parameters: Any) -> types.ModuleType:
        monkeypatch.chdir(tmp_path)
        tutorial = Tutorial(name, **parameters)
        monkeypatch.setitem(sys.modules, tutorial.module.__name__, tutorial.module)
        tutorial.run()
        return tutorial.module

    return run


@pytest.fixture
def workdir(small_run: Path, tmp_path: Path) -> Path:
    """A folder of a finished run, which is not trained again.

    The small run's model says nearly the same of all texts. Its weights are made so large that texts matter, and so do
    edits.
    """
    folder = Path(shutil.copytree(small_run, tmp_path / "run"))
    model = load(folder / "model")
    params = jax.tree.map(lambda leaf: leaf * AMPLIFIED if leaf.ndim > 1 else leaf, model.params)
    save(dataclasses.replace(model, params=params), folder / "model")
    return folder


def test_explain_a_decision(run_tutorial: Callable[..., Any], workdir: Path) -> None:
    found = run_tutorial("explain_a_decision", RUN=SMALL_RUN, WORKDIR=workdir)
    assert (workdir / "pathway.html").stat().st_size > 10_000
    assert found.total == pytest.approx(found.pathway.label_logits[found.label], abs=1e-4)


def test_correct_a_decision(run_tutorial: Callable[..., Any], workdir: Path) -> None:
    found = run_tutorial("correct_a_decision", RUN=SMALL_RUN, WORKDIR=workdir)
    assert found.report.is_repaired and found.report.num_dropped == found.report.num_grown > 0
    assert found.masks.fingerprint(found.undone) == found.masks.fingerprint(found.model.masks)


def test_bring_your_own(run_tutorial: Callable[..., Any], tmp_path: Path) -> None:
    rows = {"train": 48, "validation": 16, "test": 16}
    found = run_tutorial("bring_your_own", NUM_ROWS=rows, NUM_EPOCHS=3, WORKDIR=tmp_path / "hotels")
    assert found.schema.concepts == ("room", "staff", "location")
    assert found.report.num_dropped == found.report.num_grown  # so little training leaves little to edit
    assert found.effect.num_texts == rows["test"]
    assert "agreement_scores" in (tmp_path / "hotels" / "agreement" / "run.json").read_text()


def test_every_tutorial_is_run_here() -> None:
    assert {path.stem for path in TUTORIALS} == {"explain_a_decision", "correct_a_decision", "bring_your_own"}


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_it_was_committed_as_a_whole_run_left_it(path: Path) -> None:
    cells = code_cells(path)
    assert len(cells) <= MAX_CODE_CELLS
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    last = cells[-1]["outputs"]
    assert last, "it ends with something to see"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_it_does_not_say_where_it_was_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'"image/png": "[^"]*"', "", text)
    found = [text[max(0, match.start() - 40) : match.end() + 40] for match in _ABSOLUTE.finditer(text)]
    assert found == []


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_its_prose_is_short(path: Path) -> None:
    """Paragraphs of a few sentences, and a heading or a sentence before each piece of code but the first."""
    for cell in read(path)["cells"]:
        if cell["cell_type"] == "markdown":
            for paragraph in "".join(cell["source"]).split("\n\n"):
                assert len(paragraph.split()) <= 90, paragraph
