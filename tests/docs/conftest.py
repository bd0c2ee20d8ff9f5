"""What the pages' examples may use: a saved model, a small data set, names, and the commands on the PATH."""

from __future__ import annotations

import csv
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparsecbm_jax.config.run_config import from_config_dict
from sparsecbm_jax.data.synthetic.reviews import sample_reviews
from sparsecbm_jax.training.run import train

from tests.model.test_forward import random_batch
from tests.support.page_run import PageRun
from tests.support.paths import REPOSITORY
from tests.support.shell import Shell
from tests.support.small_sample import SMALL_RUN

_COLUMNS = {
    "review": "description",
    "stars": "review_majority",
    "food": "food_aspect_majority",
    "service": "service_aspect_majority",
}
_NUM_ROWS = {"train": 64, "validation": 32, "test": 32}


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, its model among what it left."""
    return train(from_config_dict(SMALL_RUN), tmp_path_factory.mktemp("pages") / "run").workdir


@pytest.fixture(scope="session")
def small_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table for each split: train.csv, validation.csv and test.csv."""
    folder = tmp_path_factory.mktemp("tables")
    for split, rows in sample_reviews().items():
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for row in rows[: _NUM_ROWS[split]]:
                writer.writerow(_cell(row[key]) for key in _COLUMNS.values())
    return folder


def _cell(cell: str) -> str:
    return "" if cell == "no majority" else cell


@pytest.fixture(scope="session")
def shell() -> Iterator[Shell]:
    """A bash whose commands start at once."""
    with tempfile.TemporaryDirectory(prefix="sparsecbm-shell-") as folder:  # a short path, as sockets need
        opened = Shell(Path(folder))
        yield opened
        opened.close()


@pytest.fixture
def page_run(
    tmp_path: Path, small_run: Path, small_tables: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], PageRun]:
    """Makes what runs the blocks of a page, in a folder that looks like the checkout after the quickstart."""
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    shutil.copytree(small_run, tmp_path / "runs" / "quickstart")
    shutil.copytree(small_tables, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": tmp_path / "runs" / "quickstart" / "model", "DATA": tmp_path / "data", "WORKDIR": tmp_path}

    def run_of(page: Path) -> PageRun:
        if page.name != "train.md":
            # The other pages go on with a run that is finished.
            shutil.copytree(small_run, tmp_path / "run")
        run = PageRun(page, {**names, "BATCH": random_batch(k=4), "SMALL_RUN": SMALL_RUN}, names, shell)
        monkeypatch.setitem(sys.modules, run.module.__name__, run.module)
        return run

    return run_of
