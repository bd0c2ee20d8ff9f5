"""`sparsecbm train` on one's own table: which settings its flags stand for, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsecbm_jax.config.run_config import RunConfig, to_dict

from tests.support.mains import run_main
from tests.support.paths import REPOSITORY

TABLE = ["--data=reviews", "--text=review", "--label=stars", "--concepts=food,service"]
# The command line is this file's matter, not training.
STAND_IN = """
import json, sys, types
from sparsecbm_jax.config.run_config import to_dict
training = types.ModuleType("sparsecbm_jax.training")
training.train = lambda config, workdir, profile: print(json.dumps(to_dict(config)))
sys.modules[training.__name__] = training
from sparsecbm_jax.commands.main import main
sys.argv = ["sparsecbm", "train", *sys.argv[1:], "--workdir=run"]
main()
"""


def asked(*arguments: str) -> dict[str, Any]:
    """The settings that differ from the defaults, by dotted name."""
    command = [sys.executable, "-c", STAND_IN, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, defaults = _flat(json.loads(done.stdout)), _flat(json.loads(json.dumps(to_dict(RunConfig()))))
    return {key: value for key, value in found.items() if value != defaults[key]}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def test_flags_are_short_for_settings() -> None:
    table = {
        "data.preset": "columns",
        "data.path": "reviews",
        "data.text_column": "review",
        "data.label_column": "stars",
        "data.concept_columns": ["food", "service"],
    }
    assert asked(*TABLE) == table
    tiny = {"backbone.name": "tiny", "optim.learning_rate": 1e-3}
    assert asked(*TABLE, "--backbone=tiny") == table | tiny
    assert asked(*TABLE, "--backbone=weights/mine") == table | {"backbone.name": "weights/mine"}


def test_overrides_count_more_than_flags_and_these_more_than_a_config_file() -> None:
    overrides = ["--config.optim.learning_rate=0.5", "--config.data.text_column=body", "--config.data.concepts=a,b"]
    found = asked(*overrides, *TABLE, "--backbone=opt_1_3b", "--config.training.num_epochs=30")
    assert found["optim.learning_rate"] == 0.5 and found["training.num_epochs"] == 30
    assert (found["backbone.name"], found["training.batch_size"]) == ("facebook/opt-1.3b", 1)
    assert (found["data.text_column"], found["data.concepts"]) == ("body", ["a", "b"])
    filed = asked("--config=configs/quickstart.py:tiny", *TABLE)
    assert (filed["data.preset"], filed["sparsity.start_epoch"], filed["backbone.name"]) == ("columns", 14, "tiny")


def test_a_config_file_alone_is_taken_as_it_is() -> None:
    found = asked("--config=configs/cebab.py:tiny")
    assert (found["data.preset"], found["backbone.name"]) == ("cebab", "tiny")
    sample = asked("--config.data.preset=sample", "--backbone=tiny")
    assert "data.preset" not in sample and sample["backbone.name"] == "tiny"


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        (folder / f"{split}.csv").write_text("review,food,stars\nfine,Positive,5\nbad,Negative,1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data, --text, --label, --concepts missing; expected --data=DIR --text=COLUMN --label=COLUMN"),
        (["--data=reviews", "--text=review", "--concepts=food"], "--label missing; expected --data=DIR"),
        (["--data=review", *TABLE[1:]], "--data='review' does not exist; expected a folder with a file for each split"),
        (
            ["--config.data.path=review", *TABLE[1:]],
            "--config.data.path = 'review' does not exist; expected a folder with a file for each split",
        ),
        (
            ["--data=reviews", "--text=review", "--label=star", "--concepts=food"],
            "reviews/train.csv: no column 'star' (--label); it has 'review', 'food', 'stars' (did you mean 'stars'?)",
        ),
        (
            ["--data=reviews", "--text=review", "--label=stars", "--concepts=food,servce"],
            "reviews/train.csv: no column 'servce' (--concepts); it has 'review', 'food', 'stars'",
        ),
        # Nothing is said of what a column holds while another is missing.
        (
            ["--data=reviews", "--text=reviw", "--label=stars", "--concepts=food"],
            "reviews/train.csv: no column 'reviw'",
        ),
        ([*TABLE, "--config.optim.learning_rat=1"], "unknown key config.optim.learning_rat; did you mean config.optim"),
    ],
)
def test_what_is_missing_or_misspelt_is_named(reviews: Path, arguments: list[str], message: str) -> None:
    done = run_main("train.py", *arguments, "--workdir=run", "--backbone=tiny", cwd=reviews)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}"), done.stderr
    assert not (reviews / "run").exists()
