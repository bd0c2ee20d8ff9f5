"""A sweep over criteria and sparsities goes on where it was stopped, and trains on under its masks."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from sparsecbm_jax.config.run_config import from_config_dict
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.model import saved_model
from sparsecbm_jax.training import train

from tests.support.mains import run_main
from tests.support.small_sample import as_flag, small_data

pytestmark = pytest.mark.long

# As in test_training, so that one program does for both.
SETTINGS = {
    **{f"data.{key}": value for key, value in small_data().items()},
    "training.batch_size": 16,
    "training.eval_batch_size": 16,
    "optim.learning_rate": 1e-3,
    "pruner.num_grads": 2,
    "pruner.block_size": 32,
    "backbone.name": "tiny",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings: dict[str, dict[str, object]] = {}
    for key, value in SETTINGS.items():
        section, _, name = key.partition(".")
        settings.setdefault(section, {})[name] = value
    settings["training"]["num_epochs"] = 3
    run = from_config_dict({"strategy": "joint", **settings, "sparsity": {"end_epoch": 3}})
    return train(run, tmp_path_factory.mktemp("joint") / "seed0").workdir / "model"


def sweep(model: Path, workdir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    common = [f"--models={model}", "--config=configs/quickstart.py:tiny", f"--workdir={workdir}"]
    settings = [as_flag(key, value) for key, value in SETTINGS.items()]
    return run_main("sweep.py", *common, *settings, *arguments)


def test_a_sweep_goes_on_where_it_was_stopped(dense: Path, tmp_path: Path) -> None:
    first = sweep(dense, tmp_path, "--criteria=taylor,magnitude", "--sparsities=0.5,0.9")
    assert first.returncode == 0, first.stderr
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    found = [(row["criterion"], row["sparsity"]) for row in map(json.loads, lines)]
    cut = [("taylor", 0.5), ("taylor", 0.9), ("magnitude", 0.5), ("magnitude", 0.9)]
    assert found == [("dense", 0.0), *cut]
    table = (tmp_path / "sweep.md").read_text()
    means, differences = table.strip().split("\n\n")
    assert means.count("\n| ") == 6 and "| magnitude | 0.9 |" in means and table.strip() in first.stdout
    taylor, magnitude = (row["concept"] for row in map(json.loads, lines) if row["sparsity"] == 0.9)
    assert differences.startswith("| less taylor |")
    assert f"\n| magnitude | 0.9 | {100 * (magnitude - taylor):.1f} |" in differences
    assert (tmp_path / "sweep.png").is_file() or "no plot" in first.stdout
    # As if it had been stopped in the last line.
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:-1]) + '\n{"model": "')
    again = sweep(dense, tmp_path, "--criteria=taylor,magnitude", "--sparsities=0.5,0.9")
    assert again.returncode == 0, again.stderr
    assert "taylor at" not in again.stdout and "magnitude at 0.9" in again.stdout
    assert (tmp_path / "sweep.md").read_text() == table
    other = sweep(dense, tmp_path, "--config.pruner.damping=0.5")
    assert other.returncode == 2 and "pruner.damping: saved 0.1, current 0.5" in other.stderr


def test_a_sweep_trains_on_under_its_masks(dense: Path, tmp_path: Path) -> None:
    result = sweep(dense, tmp_path, "--criteria=magnitude", "--sparsities=0.8", "--epochs=3")
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.glob("*seed0-model-magnitude-0.8-3epochs")
    model = saved_model.load(folder / "model")
    assert masks_lib.total_density(model.masks).round(3).tolist() == [0.2] * 2
    refused = sweep(dense, tmp_path, "--epochs=1")
    assert refused.returncode == 2 and "expected 0, for pruning alone, or at least 2" in refused.stderr


def test_a_model_to_start_from_has_to_fit(dense: Path, tmp_path: Path) -> None:
    model = saved_model.load(dense)
    other = dataclasses.replace(model, schema=dataclasses.replace(model.schema, concepts=("a", "b")))
    with pytest.raises(ValueError, match="another backbone or schema"):
        train(from_config_dict({"backbone": {"name": "tiny"}}), tmp_path, start=other)


def test_a_sweep_that_chooses_scores_validation(dense: Path, tmp_path: Path) -> None:
    arguments = ("--criteria=combinatorial", "--sparsities=0.5")
    chosen = sweep(dense, tmp_path, *arguments, "--split=validation")
    assert chosen.returncode == 0, chosen.stderr
    row = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    saved = json.loads((dense / "metrics.json").read_text())
    assert row["concept"] == pytest.approx(saved["validation"]["concept"]["accuracy"])
    other = sweep(dense, tmp_path, *arguments)
    assert other.returncode == 2 and "scored_split" in other.stderr
