"""SIGTERM at any moment of a run: what was done is saved, and the same call goes on to the bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import pytest

from sparsecbm_jax.cli import processes
from sparsecbm_jax.runtime import preemption
from sparsecbm_jax.runtime.checkpoints import Checkpointer
from sparsecbm_jax.training import train

from tests.support.paths import REPOSITORY
from tests.training.test_train import tiny_run

RUN = tiny_run(training={"log_every_steps": 1})
STEPS, CONCEPTS, GRADS, SCORED = 6, 2, RUN.pruner.num_grads, 3
# (where, how often the run asks until then whether to stop, the step that is saved), each from where the one before it
# stopped. It asks after a step, after each gradient of a concept, and before each batch that is scored.
MOMENTS = (
    ("mid-epoch", 2, 2),
    ("the last step of an epoch", STEPS - 2, STEPS),
    ("validation", 2, STEPS),
    ("a gradient of the second concept", SCORED + GRADS + 1, STEPS),
    ("a step after pruning", SCORED + GRADS + 2, STEPS + 2),
    ("the scores of the end", STEPS - 2 + SCORED + CONCEPTS * GRADS + STEPS + SCORED + 2, 3 * STEPS),
)


def send_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Has SIGTERM come before the run asks for the `moment`-th time whether to stop."""
    real, asked = preemption.StopSignal.is_due, list[int]()

    def is_due(self: preemption.StopSignal) -> bool:
        asked.append(1)
        if len(asked) == moment:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(preemption.StopSignal, "is_due", is_due)


def compared(workdir: Path) -> list[dict[str, Any]]:
    """The records of a log, without what is measured by the clock or of the process."""
    measured = {"seconds", "peak_bytes", "concepts", "step_seconds", "examples_per_second", "tokens_per_second"}
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in measured} for record in records]


def test_a_run_that_is_sent_sigterm_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uninterrupted = train(RUN, tmp_path / "whole", profile=True)
    assert list((tmp_path / "whole" / "profile").rglob("*.xplane.pb")), "JAX's profiler traced a few steps"
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    rates = {"step_seconds", "examples_per_second", "tokens_per_second", "peak_bytes"}
    assert all(rates <= set(record) for record in records if record["kind"] == "train")
    before = signal.getsignal(signal.SIGTERM)
    for where, moment, step in MOMENTS:
        with monkeypatch.context() as patch, pytest.raises(preemption.Preempted):
            send_at(patch, moment)
            train(RUN, tmp_path / "stopped")
        assert signal.getsignal(signal.SIGTERM) is before
        with Checkpointer(tmp_path / "stopped" / "checkpoints") as saved:
            assert saved.latest_step() == step, where
    resumed = train(RUN, tmp_path / "stopped")
    assert compared(resumed.workdir) == compared(uninterrupted.workdir)
    for name in ("params", "heads", "masks"):
        chex.assert_trees_all_equal(getattr(resumed.model, name), getattr(uninterrupted.model, name))
    scores = [{**result.metrics, "train_seconds": 0} for result in (resumed, uninterrupted)]
    assert scores[0] == scores[1]


def test_the_exit_status_is_what_schedulers_start_again_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, processes.ending_in_order():
        raise preemption.Preempted
    assert ended.value.code == preemption.EXIT_STATUS == 75
    assert "the same command goes on where it was (exit status 75)" in capsys.readouterr().err


def test_sigterm_before_the_run_begins_ends_with_that_status_whatever_is_being_done() -> None:
    program = (
        "import os, signal, sys; from sparsecbm_jax.cli import processes\n"
        "try:\n    processes.flags.FLAGS([''])\n    processes.start()\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "except BaseException:\n    sys.exit(3)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY)
    assert ended.returncode == preemption.EXIT_STATUS
