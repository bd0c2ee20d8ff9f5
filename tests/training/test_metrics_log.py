"""A run's log, and its progress bars."""

import json
from pathlib import Path

import pytest

from sparsecbm_jax.runtime import progress as progress_lib
from sparsecbm_jax.runtime.progress import progress
from sparsecbm_jax.training import metrics_log


def test_a_bar_in_a_file_is_whole_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_lib, "_LINE_SECONDS", 0.0)
    for _ in progress(range(3), description="epoch 1/2", unit="step"):
        assert list(progress(range(2), description="pruning")) == [0, 1]
    shown = capsys.readouterr().err
    assert shown.endswith("\n") and "\r" not in shown
    assert all(line.startswith(("epoch 1/2:", "pruning:")) for line in shown.splitlines())
    assert "2/3" in shown


def test_a_short_loop_leaves_no_line_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), description="epoch 1/2")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_log_goes_on_after_its_last_whole_record(tmp_path: Path) -> None:
    first = metrics_log.MetricsLog(tmp_path)
    for step in (1, 2, 3):
        first.write(step, "train", {"loss": 0.5})
    first.close()
    path = tmp_path / metrics_log.LOG_FILE
    path.write_text(path.read_text() + '{"step": 4, "ki')
    again = metrics_log.MetricsLog(tmp_path, step=2)
    again.write(3, "train", {"loss": 0.25})
    again.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(1, 0.5), (2, 0.5), (3, 0.25)]
