"""Two processes train as one does, and where one of them is killed, what follows is as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsecbm_jax
from sparsecbm_jax.config.run_config import from_config_dict
from sparsecbm_jax.training.setup import prepare

from launch.soak.killed_runs import Kill, Run, differences, free_port
from tests.support.paths import REPOSITORY
from tests.support.small_sample import as_flag, small_data

pytestmark = pytest.mark.long

LOSS_TOLERANCE, PARAMETER_TOLERANCE = 1e-4, 1e-5
SETTINGS: dict[str, Any] = {
    "backbone": {"name": "tiny"},
    "data": small_data(num_train=170),
    "training": {"num_epochs": 2, "batch_size": 16, "eval_batch_size": 16, "log_every_steps": 1},
    "sparsity": {"start_epoch": 0, "end_epoch": 1},
    "pruner": {"num_grads": 2, "block_size": 32},
    "mesh": {"data": 2},
}


def _flags(settings: dict[str, Any]) -> list[str]:
    return [as_flag(f"{section}.{key}", value) for section, values in settings.items() for key, value in values.items()]


def _records(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_prune_and_save_as_one(tmp_path: Path) -> None:
    env = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    command = [
        sys.executable,
        "launch/train.py",
        "--config=configs/common.py",
        *_flags(SETTINGS),
        f"--workdir={tmp_path / 'two'}",
    ]
    processes = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=env | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        # Meanwhile, here.
        one = sparsecbm_jax.train(from_config_dict(SETTINGS), tmp_path / "one")
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "saved" in outputs[0] and "saved" not in outputs[1], "the first process alone reports"

    first, second = _records(tmp_path / "one"), _records(tmp_path / "two")
    assert [(record["step"], record["kind"]) for record in first] == [
        (record["step"], record["kind"]) for record in second
    ]
    losses = [[record["loss"] for record in records if record["kind"] == "train"] for records in (first, second)]
    assert len(losses[0]) == 20
    np.testing.assert_allclose(losses[1], losses[0], atol=LOSS_TOLERANCE)
    loaded = sparsecbm_jax.load(tmp_path / "two" / "model")
    start = prepare(from_config_dict(SETTINGS)).params
    moved = jax.tree.map(lambda after, before: float(jnp.abs(after - before).max()), one.model.params, start)
    assert max(jax.tree.leaves(moved)) > 20 * PARAMETER_TOLERANCE, "or the next line could not fail"
    chex.assert_trees_all_close(loaded.params, one.model.params, rtol=0, atol=PARAMETER_TOLERANCE)
    chex.assert_trees_all_close(loaded.heads, one.model.heads, rtol=0, atol=PARAMETER_TOLERANCE)
    same = [np.mean(np.asarray(loaded.masks[path]) == np.asarray(mask)) for path, mask in one.model.masks.items()]
    # Gradients are added up in another order, which may swap weights of almost equal score.
    assert min(same) > 0.999


def test_what_is_killed_goes_on_in_as_many_processes_or_in_one(tmp_path: Path) -> None:
    """Two kills as `launch/soak/training.py` makes them, of two processes with four devices each, without pruning."""
    settings: dict[str, Any] = {
        "backbone": {"name": "tiny"},
        "data": small_data(),
        "training": {"num_epochs": 1, "batch_size": 16, "eval_batch_size": 16}
        | {"log_every_steps": 1, "save_every_steps": 2},
        "mesh": {"data": 8},
    }
    flags = ["--config=configs/common.py", "--config.strategy=joint", *_flags(settings)]
    whole, killed = (Run(tmp_path / name, flags, os.environ, silence=10) for name in ("whole", "killed"))
    run = from_config_dict({"strategy": "joint", **settings})
    sparsecbm_jax.train(run, whole.workdir)

    outcome = killed.end_by(Kill(num_processes=2, victim=1, signal=signal.SIGKILL, steps=3, delay=0.0))
    assert not outcome.is_finished and outcome.saved is not None
    survivor = killed.output(0).read_text()
    assert "Another process may have died" in survivor or "another task died" in survivor

    outcome = killed.end_by(Kill(num_processes=2, victim=1, signal=signal.SIGTERM, steps=2, delay=0.0))
    assert outcome.statuses == [75, 75]
    assert outcome.saved == killed.last_step(), "both saved what was done"
    assert "the same command goes on where it was" in killed.output(0).read_text()

    sparsecbm_jax.train(run, killed.workdir)
    assert max(differences(whole, killed)) <= LOSS_TOLERANCE
