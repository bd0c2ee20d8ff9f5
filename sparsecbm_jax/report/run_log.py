"""The log of a run, read and checked record by record."""

from pathlib import Path
from typing import Any, NamedTuple

from sparsecbm_jax.runtime.json_files import read_json_lines
from sparsecbm_jax.training.metrics_log import LOG_FILE

Record = dict[str, Any]

WRITTEN_BY = "what a training run writes"


class RunLog(NamedTuple):
    """The records of a run's `metrics.jsonl`, by kind, in order."""

    train: list[Record]
    validation: list[Record]
    prune: list[Record]


def read_log(workdir: Path) -> RunLog:
    """Reads the log of a run, finished or not; a last line that is still being written is skipped.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: A line is not a record of a run; the line and the expected contents are named.
    """
    path, log = workdir / LOG_FILE, RunLog([], [], [])
    for where, record in read_json_lines(path, WRITTEN_BY):
        if not isinstance(record, dict) or record.get("kind") not in RunLog._fields:
            raise ValueError(f"{where}: expected an object of kind {', '.join(RunLog._fields)}, {WRITTEN_BY}")
        _check_record(record, where)
        getattr(log, record["kind"]).append(record)
    if not any(log):
        raise ValueError(f"{path} holds no record; expected {WRITTEN_BY}")
    return log


def _check_record(record: Record, where: str) -> None:
    for key in ("step", "epoch"):
        if type(record.get(key)) is not int:
            raise ValueError(f"{where}: {key!r} is {record.get(key)!r}; expected an integer")
    if record["kind"] == "prune":
        for key in ("sparsity", "density"):
            values = record.get(key)
            if not isinstance(values, list) or not values or not all(is_number(value) for value in values):
                raise ValueError(f"{where}: {key!r} is {values!r}; expected a list of numbers, one for each concept")
        if len(record["sparsity"]) != len(record["density"]):
            raise ValueError(
                f"{where}: 'sparsity' and 'density' are of {len(record['sparsity'])} and "
                f"{len(record['density'])} concepts; expected as many"
            )
        return
    for key, value in record.items():
        if key != "kind" and value is not None and not is_number(value):
            raise ValueError(f"{where}: {key!r} is {value!r}; expected a number")


def is_number(value: Any) -> bool:
    """Returns True where a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
