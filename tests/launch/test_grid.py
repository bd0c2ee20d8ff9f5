"""A grid trains every combination once and ranks them by validation."""

import json
import subprocess
from pathlib import Path

from tests.support.mains import run_main
from tests.support.small_sample import as_flag, small_data

SETTINGS = (
    "--config.strategy=standard",
    # As in test_training, so that one program does for both.
    "--config.training.num_epochs=3",
    "--config.training.batch_size=16",
    "--config.training.eval_batch_size=16",
    "--config.optim.learning_rate=1e-3",
    "--config.optim.head_learning_rate=1e-2",
    "--config.sparsity.start_epoch=1",
    "--config.sparsity.end_epoch=7",
    *(as_flag(f"data.{key}", value) for key, value in small_data().items()),
)


def grid(workdir: Path, text: str) -> subprocess.CompletedProcess[str]:
    common = ("--config=configs/quickstart.py:tiny", f"--workdir={workdir}", *SETTINGS)
    return run_main("grid.py", *common, f"--grid={text}")


def test_a_grid_ranks_by_validation_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    first = grid(tmp_path, "gamma=5; seed=0,1")
    assert first.returncode == 0, first.stderr
    table = (tmp_path / "grid.md").read_text()
    assert table.strip() in first.stdout
    metrics = {
        name: json.loads((tmp_path / name / "metrics.json").read_text())
        for name in ("gamma=5,seed=0", "gamma=5,seed=1")
    }
    best = max(metrics, key=lambda name: metrics[name]["validation"]["task"]["accuracy"])
    rows = [line for line in table.splitlines() if line.startswith("| gamma")]
    assert len(rows) == 2 and rows[0].startswith(f"| {best} | – | ")
    assert f"On test, {best}: " in table and table.count("On test") == 1
    again = grid(tmp_path, "gamma=5; seed=0,1")
    assert again.returncode == 0 and again.stdout.count("finished already") == 2
    assert (tmp_path / "grid.md").read_text() == table


def test_a_bad_grid_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    for text, message in {
        "gama=1": "--grid: unknown key config.gama; did you mean config.gamma?",
        "gamma=": "--grid: gamma has no values; expected gamma=VALUE,VALUE",
        "": "--grid and --workdir are needed",
        "gamma=1,-2": "config.gamma",
    }.items():
        result = grid(tmp_path / "none", text)
        assert result.returncode == 2 and message in result.stderr, result.stderr
    assert not (tmp_path / "none").exists()
