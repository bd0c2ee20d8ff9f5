"""What a run tells while it goes: progress bars, metrics as JSON lines and, where installed, TensorBoard."""

import importlib.util
import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from tqdm.auto import tqdm

from sparsecbm_jax import traces
from sparsecbm_jax.checkpoint import write_atomically

T = TypeVar("T")
LOG_FILE = "metrics.jsonl"
_LINE_SECONDS = 30.0


def progress(
    items: Iterable[T] | None = None, *, description: str, total: int | None = None, initial: int = 0, unit: str = "it"
) -> Any:
    """A bar with rate and time left; in a file or a pipe, a line every half minute instead of a redrawn one.

    Without items, it is moved by its `update(n)` and ended by its `close()`.
    """
    if sys.stderr.isatty():
        return tqdm(
            items, desc=description, total=total, initial=initial, unit=unit, mininterval=0.5, dynamic_ncols=True
        )
    return tqdm(
        items,
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        leave=False,
        mininterval=_LINE_SECONDS,
        maxinterval=2 * _LINE_SECONDS,
        miniters=1,
        delay=_LINE_SECONDS,
        ascii=True,
        position=0,  # a bar inside another would be drawn below it
        file=_LineWriter(),
    )


class _LineWriter:
    """Gives every state of a bar a line of its own, on what is standard error by then."""

    def write(self, text: str) -> None:
        shown = text.strip()
        if shown:
            sys.stderr.write(f"{shown}\n")

    def flush(self) -> None:
        sys.stderr.flush()


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
        records = [(line, json.loads(line)) for line in _lines(path)] if step else []
        kept = [
            line
            for line, record in records
            if record["step"] < step or (record["step"] == step and record["kind"] not in redone)
        ]
        write_atomically(path, "".join(f"{line}\n" for line in kept))
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


class StepTrace:
    """Traces a few steps with JAX's profiler, once the first ones have been compiled.

    Args:
      folder: where the trace goes, for TensorBoard or xprof; None traces nothing.
    """

    FIRST, COUNT = 3, 3

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._num_begun, self._is_tracing = folder, 0, False
        self._is_told = True

    def begin_step(self, wait: Callable[[], object]) -> None:
        """Starts or ends the trace where it is time; to be called before each step.

        Args:
          wait: returns when the step before is done.
        """
        self._num_begun += 1
        if self._folder is not None and self._num_begun == self.FIRST:
            wait()
            jax.profiler.start_trace(self._folder)
            self._is_tracing, self._is_told = True, False
        elif self._num_begun == self.FIRST + self.COUNT:
            wait()
            self.end()

    def end(self) -> None:
        """Ends a trace that is under way."""
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False

    def report(self) -> str | None:
        """What was traced, once, after its end: None before, and where nothing is new."""
        if self._folder is None or self._is_tracing or self._is_told:
            return None
        self._is_told = True
        waits = traces.read_waits(self._folder)
        told = "" if waits is None else f": {traces.render(waits)}"
        return f"a trace of training steps is in {self._folder}{told}"


def _lines(path: Path) -> list[str]:
    """Whole records of a log; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    while lines:
        try:
            json.loads(lines[-1])
            break
        except ValueError:
            lines.pop()
    return lines
