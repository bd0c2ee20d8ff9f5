"""Runs in one or two processes that are killed and started again, and checks of their results.

`soak/training.py` kills a run many times; a test kills one twice.
"""

from __future__ import annotations

import dataclasses
import signal
import socket
import subprocess
import sys
import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparsecbm_jax.runtime.json_files import read_json_lines

CHECKOUT = Path(__file__).resolve().parents[2]
TRAIN = CHECKOUT / "launch" / "train.py"
NUM_DEVICES = 8
# Seconds that processes wait for each other at the start, and that the others may take to end.
START, LIMIT = 20, 60.0
# Measured values, which differ between two equal runs.
MEASURED = ("seconds", "peak_bytes", "concepts", "step_seconds", "examples_per_second", "tokens_per_second")
# Two processes add gradients up in another order than one process; the rounding may swap weights of almost equal score.
TOLERANCE, OTHER_MASKS = 1e-4, 1e-3


class Kill(typing.NamedTuple):
    """A signal that ends a run, and its moment.

    Attributes:
        num_processes: Number of processes of the run.
        victim: Index of the process that gets the signal.
        signal: SIGKILL or SIGTERM.
        steps: Number of further steps before the signal.
        delay: Seconds between these steps and the signal.
    """

    num_processes: int
    victim: int
    signal: signal.Signals
    steps: int
    delay: float


@dataclasses.dataclass
class Outcome:
    """The end of a start.

    Attributes:
        is_finished: True where the run finished before the signal.
        step: Last step in its log.
        saved: Latest step of a checkpoint, which is whole; None where there is none yet.
        statuses: Exit statuses of the processes.
        seconds: Seconds from the signal to the end of the last process.
    """

    is_finished: bool
    step: int
    saved: int | None
    statuses: list[int]
    seconds: float

    def describe(self, kill: Kill) -> str:
        """Formats the outcome in a line."""
        checkpoint = "no checkpoint yet" if self.saved is None else f"the checkpoint of step {self.saved} is whole"
        return (
            f"{kill.signal.name} to process {kill.victim} after step {self.step}: statuses "
            f"{', '.join(map(str, self.statuses))} within {self.seconds:.1f} s; {checkpoint}"
        )


class Run:
    """A run in a folder, which is started several times."""

    def __init__(
        self, workdir: Path, settings: Sequence[str], environment: Mapping[str, str], *, silence: int = 20
    ) -> None:
        """Stores the settings of the run.

        Args:
            workdir: The run's folder.
            settings: Flags of `launch/train.py`.
            environment: Environment of the processes.
            silence: Seconds of silence after which the others count a process as dead.
        """
        self.workdir, self._settings, self._environment, self._silence = workdir, settings, environment, silence

    def _start(self, num_processes: int) -> list[subprocess.Popen[bytes]]:
        command = [sys.executable, str(TRAIN), *self._settings, f"--workdir={self.workdir}"]
        devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES // num_processes)}
        if num_processes > 1:
            command += [f"--coordinator=localhost:{free_port()}", f"--num_processes={num_processes}"]
            command += [f"--heartbeat_seconds={self._silence}", f"--start_seconds={START}"]
        started = []
        for index in range(num_processes):
            own = [f"--process_id={index}"] if num_processes > 1 else []
            with self.output(index).open("wb") as output:
                process = subprocess.Popen(
                    command + own,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**self._environment, **devices},
                    cwd=CHECKOUT,
                )
            started.append(process)
        return started

    def output(self, index: int) -> Path:
        """Returns the file with the output of a process since its last start."""
        return self.workdir.with_name(f"{self.workdir.name}-{index}.txt")

    def finish(self, num_processes: int) -> None:
        """Runs to the end."""
        processes = self._start(num_processes)
        try:
            statuses = [process.wait() for process in processes]
        finally:
            _end(processes)
        if any(statuses):
            raise ValueError(f"{self.workdir}: ended with {statuses}, expected 0 of each; {self._tails()}")

    def end_by(self, kill: Kill) -> Outcome:
        """Starts the run and sends a signal to one of its processes."""
        last = (self._saved() or 0) + kill.steps
        processes = self._start(kill.num_processes)
        try:
            while kill.steps and self.last_step() < last and all(process.poll() is None for process in processes):
                time.sleep(0.02)
            time.sleep(kill.delay)
            is_finished = all(process.poll() == 0 for process in processes)
            step, since = self.last_step(), time.monotonic()
            processes[kill.victim].send_signal(kill.signal)
            statuses = [process.wait(timeout=max(0.0, since + LIMIT - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            raise ValueError(f"{self.workdir}: a process did not end within {LIMIT:g} s of {kill}") from None
        finally:
            _end(processes)
        seconds = time.monotonic() - since
        outcome = Outcome(is_finished or not any(statuses), step, self._saved(), statuses, seconds)
        if not outcome.is_finished:
            self._check(kill, statuses)
        return outcome

    def _check(self, kill: Kill, statuses: Sequence[int]) -> None:
        if kill.signal == signal.SIGKILL:
            is_expected = statuses[kill.victim] == -signal.SIGKILL and all(statuses)
        else:
            # While Python starts, no handler is installed yet.
            is_expected = statuses[kill.victim] in (75, -signal.SIGTERM) and all(statuses)
        if not is_expected:
            raise ValueError(f"{self.workdir}: {kill} led to {statuses}; {self._tails()}")

    def _tails(self) -> str:
        ends = []
        for path in sorted(self.workdir.parent.glob(f"{self.workdir.name}-*.txt")):
            ends += [f"{path}:", *path.read_text(errors="replace").splitlines()[-5:]]
        return "\n".join(ends)

    def records(self) -> list[dict[str, typing.Any]]:
        """Returns the records of the log's whole lines."""
        path = self.workdir / "metrics.jsonl"
        return [record for _, record in read_json_lines(path, "what the run logs")] if path.is_file() else []

    def last_step(self) -> int:
        """Returns the last step in the log."""
        return max((record["step"] for record in self.records()), default=0)

    def _saved(self) -> int | None:
        """Returns the latest step of a checkpoint, after reading all of it.

        Raises:
            CheckpointError: The checkpoint is not whole.
        """
        from sparsecbm_jax.runtime.checkpoints import Checkpointer

        if not (self.workdir / "checkpoints").is_dir():
            return None
        with Checkpointer(self.workdir / "checkpoints") as checkpoints:
            step = checkpoints.latest_step()
            if step is not None:
                checkpoints.restore(step, checkpoints.describe(step))
        return step


def differences(one: Run, other: Run) -> tuple[float, float, float]:
    """Compares two runs: largest difference of logged numbers, that of parameters, and share of mask bits that differ.

    Raises:
        ValueError: A difference is too large, or the logs have other records.
    """
    import numpy as np

    from sparsecbm_jax.model import saved_model

    logs = [[_numbers(record) for record in run.records()] for run in (one, other)]
    if [list(record) for record in logs[0]] != [list(record) for record in logs[1]]:
        raise ValueError(f"{other.workdir}: the log has other records than that of {one.workdir}")
    pairs = [(a[key], b[key]) for a, b in zip(*logs, strict=True) for key in a if isinstance(a[key], int | float)]
    numbers = max(abs(a - b) for a, b in pairs)
    models = [saved_model.load(run.workdir / "model") for run in (one, other)]
    leaves = [_leaves({"params": model.params, "heads": model.heads}) for model in models]
    weights = max(float(np.abs(a - b).max()) for a, b in zip(*leaves, strict=True) if a.size)
    kept = [np.concatenate([np.zeros(1, bool), *map(np.ravel, _leaves(model.masks))]) for model in models]
    masks = float(np.mean(kept[0] != kept[1]))
    if max(numbers, weights) > TOLERANCE or masks > OTHER_MASKS:
        raise ValueError(
            f"{other.workdir}: differs from {one.workdir}: numbers of the log by {numbers:g}, parameters by "
            f"{weights:g}, masks in {100 * masks:g} % of the weights"
        )
    return numbers, weights, masks


def _numbers(record: Mapping[str, typing.Any]) -> dict[str, typing.Any]:
    return {key: value for key, value in record.items() if key not in MEASURED}


def _leaves(tree: typing.Any) -> list[typing.Any]:
    import jax
    import numpy as np

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def free_port() -> int:
    """Finds a port of this machine that is free."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port: int = server.getsockname()[1]
        return port
