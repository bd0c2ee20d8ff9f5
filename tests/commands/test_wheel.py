"""The package as `pip install` leaves it: its commands in an empty directory, without the checkout."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparsecbm_jax.data.synthetic.reviews import sample_reviews
from sparsecbm_jax.version import __version__

from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.long

COLUMNS = {"food_aspect_majority": "food", "service_aspect_majority": "service", "review_majority": "stars"}
TEXT = "The soup was cold but our waiter was friendly."
# One program for all texts, and no gradients for pruning: compiling them is what takes time.
TRAIN = (
    "train --data=reviews --text=review --label=stars --concepts=food,service --workdir=runs/mine --backbone=tiny "
    "--config.training.num_epochs=2 --config.sparsity.start_epoch=0 --config.sparsity.end_epoch=1 "
    "--config.pruner.criterion=magnitude --config.data.max_length=16"
).split()
MODEL = "--model=runs/mine/model"
EXPLAIN = ["explain", MODEL, f"--text={TEXT}"]
EDITS = ["edits", MODEL, "--log=edits.log"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-build-isolation", f"--wheel-dir={folder}", str(REPOSITORY))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installs the wheel to a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    _pip("install", f"--target={folder}", str(wheel))
    return folder


@pytest.fixture(scope="module")
def directory(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a model on a small table in a directory that holds nothing else."""
    folder = tmp_path_factory.mktemp("directory")
    _write_reviews(folder / "reviews")
    done = _run(installed, folder, TRAIN)
    assert done.returncode == 0, done.stderr
    assert "info: classes found in reviews/train.csv: Negative, Positive, unknown" in done.stderr
    assert "info: labels found in reviews/train.csv: 1, 2, 3, 4, 5" in done.stderr
    assert "saved runs/mine/model and runs/mine/metrics.json" in done.stdout
    return folder


def test_a_wheel_holds_the_command_and_the_templates(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (entry_points,) = (name for name in held if name.endswith("entry_points.txt"))
        assert "sparsecbm = sparsecbm_jax.commands.main:main" in archive.read(entry_points).decode()
    package = REPOSITORY / "sparsecbm_jax"
    templates = {path for suffix in ("html", "js", "css") for path in package.rglob(f"*.{suffix}")}
    assert {path.suffix for path in templates} == {".html", ".js", ".css"}
    assert {str(path.relative_to(REPOSITORY)) for path in templates} <= held
    assert "sparsecbm_jax/py.typed" in held


def test_the_installed_package_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    program = "import sparsecbm_jax; print(sparsecbm_jax.__file__)"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=tmp_path, env=_environment(installed), capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(installed), found.stderr
    script = subprocess.run(
        [sys.executable, str(installed / "bin" / "sparsecbm"), "--version"],
        cwd=tmp_path,
        env=_environment(installed),
        capture_output=True,
        text=True,
    )
    assert (script.returncode, script.stdout) == (0, f"sparsecbm {__version__}\n"), script.stderr


def test_help_lists_the_commands(installed: Path, tmp_path: Path) -> None:
    done = _run(installed, tmp_path, ["--help"])
    assert done.returncode == 0 and "sparsecbm COMMAND --help" in done.stdout, done.stderr
    for name in ("train", "explain", "correct", "edits", "serve", "evaluate", "report"):
        assert re.search(rf"^  {name} +\w", done.stdout, flags=re.MULTILINE)


def test_every_command_runs_on_a_model_of_ones_own_table(installed: Path, directory: Path) -> None:
    commands = {
        "correct": ["correct", MODEL, "--find", "--editor=minimal", "--log=edits.log"],
        "text": EXPLAIN,
        "json": [*EXPLAIN, "--format=json"],
        "csv": [*EXPLAIN, "--format=csv", "--top=1"],
        "html": [*EXPLAIN, "--format=html", "--output=pathways.html"],
        "evaluate": ["evaluate", MODEL, "--json"],
        "report": ["report", "--workdir=runs/mine"],
    }
    with ThreadPoolExecutor(2) as pool:
        made = dict(
            zip(commands, pool.map(lambda one: _run(installed, directory, one), commands.values()), strict=True)
        )
    for name, done in made.items():
        assert done.returncode == 0, f"{name}: {done.stderr}"
    pathway = json.loads(made["json"].stdout)
    assert [lane["name"] for lane in pathway["concepts"]] == ["food", "service"]
    assert f"label: {pathway['label']} " in made["text"].stdout
    rows = list(csv.DictReader(made["csv"].stdout.splitlines()))
    assert [row["concept"] for row in rows] == ["food", "service"]
    assert TEXT in (directory / "pathways.html").read_text(encoding="utf-8")
    assert set(json.loads(made["evaluate"].stdout)) >= {"task", "concept", "concepts"}
    assert "<figure" in (directory / "runs" / "mine" / "report.html").read_text(encoding="utf-8")

    (edit_id,) = re.findall(r"logged: edit (\w+)", made["correct"].stdout)
    listed = _run(installed, directory, EDITS)
    assert listed.stdout.startswith(f"{edit_id}  "), listed.stderr
    assert listed.stdout.endswith("\n1 active edit in edits.log\n")
    undone = _run(installed, directory, [*EDITS, f"--undo={edit_id}"])
    assert (undone.returncode, undone.stdout) == (0, "0 active edits in edits.log\n"), undone.stderr


def _pip(command: str, *arguments: str) -> None:
    asked = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--no-index", *arguments]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _run(installed: Path, cwd: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsecbm_jax", *arguments]
    return subprocess.run(command, cwd=cwd, env=_environment(installed), capture_output=True, text=True)


def _environment(installed: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(installed)}


def _write_reviews(folder: Path) -> None:
    """Writes a table of 64, 16 and 16 reviews; a cell that says nothing is empty."""
    folder.mkdir()
    for split, name, count in (("train", "train", 64), ("validation", "dev", 16), ("test", "test", 16)):
        rows = [row for row in sample_reviews()[split] if row["review_majority"] != "no majority"][:count]
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["review", *COLUMNS.values()])
            for row in rows:
                cells = (row[column].replace("no majority", "") for column in COLUMNS)
                writer.writerow([row["description"], *cells])
