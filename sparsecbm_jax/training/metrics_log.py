"""A run's log: lines for people, metrics as JSON lines and, where installed, TensorBoard."""

import importlib.util
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from sparsecbm_jax.runtime.json_files import read_json_lines, write_atomically

LOG_FILE = "metrics.jsonl"


def print_once(text: str) -> None:
    """Prints a line, on one of the run's processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


class MetricsLog:
    """Appends records to `metrics.jsonl`, and to TensorBoard where tensorboardX is installed.

    Args:
        workdir: the run's directory.
        step: the step that the run goes on from; records after it, from a continuation that was lost, are dropped.
        redone: kinds of records of that very step that are dropped, too, since they will be written again.
        is_writer: False on all processes but one, which then write nothing.
    """

    def __init__(self, workdir: Path, *, step: int = 0, redone: Collection[str] = (), is_writer: bool = True) -> None:
        self._file = None
        self._board = None
        if not is_writer:
            return
        path = workdir / LOG_FILE
        earlier = read_json_lines(path, "what this run logged before") if step and path.is_file() else ()
        kept = [
            record
            for _, record in earlier
            if record["step"] < step or (record["step"] == step and record["kind"] not in redone)
        ]
        write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Writes one record: {"step", "kind", **values}; numbers also go to TensorBoard as kind/name."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()
