"""A run's directory: the settings of its first start, compared with the current ones."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from sparsecbm_jax.config.run_config import RunConfig, completed, to_dict
from sparsecbm_jax.runtime.json_files import read_json_object, write_json

RUN_FILE = "run.json"


class RunMismatchError(ValueError):
    """A directory that holds a run with another configuration."""


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(
            _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
        )
    return flat


def run_differences(saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """Lists every dotted key at which two nested configurations differ, with both values.

    Args:
        saved: The configuration of a run.
        current: Another configuration.
        ignore: Dotted keys that are not compared; a key stands for all below it.

    >>> run_differences({"seed": 0, "optim": {"rate": 1.0}}, {"seed": 1, "optim": {"rate": 2.0}}, ignore=("seed",))
    ['optim.rate: saved 1.0, current 2.0']
    """
    # Through JSON, so that a tuple equals the list it was saved as.
    before, after = (_flatten(json.loads(json.dumps(config))) for config in (saved, current))
    ignored = tuple(ignore)
    absent = object()
    lines = []
    for key in sorted(set(before) | set(after)):
        if any(key == name or key.startswith(f"{name}.") for name in ignored):
            continue
        old, new = before.get(key, absent), after.get(key, absent)
        if old is absent or new is absent or old != new:
            words = ("nothing" if value is absent else json.dumps(value) for value in (old, new))
            lines.append("{}: saved {}, current {}".format(key, *words))
    return lines


def read_run(workdir: str | Path) -> dict[str, Any] | None:
    """Reads the configuration of the run in a directory; None where the directory holds no run.

    Raises:
        RunMismatchError: The file cannot be read.
    """
    path = Path(workdir) / RUN_FILE
    if not path.exists():
        return None
    return dict(completed(read_json_object(path, "the configuration of a run", error=RunMismatchError)))


def _with_newer_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a run's settings with those of `current` that came after it, at what it did without them: the default."""
    defaults, completed_run = to_dict(RunConfig()), dict(saved)
    for name in current.keys() & defaults.keys():
        default, was = defaults[name], saved.get(name, {})
        if isinstance(default, Mapping) and isinstance(was, Mapping) and isinstance(current[name], Mapping):
            newer = current[name].keys() & default.keys() - was.keys()
            completed_run[name] = {**was, **{key: default[key] for key in newer}}
    return completed_run


def check_same_run(workdir: str | Path, config: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> None:
    """Claims a directory for a run, or checks that it already holds this run.

    The first use writes `run.json` (process 0 alone); a later use compares with it.

    Args:
        workdir: The run's directory; made if absent.
        config: The run's configuration as nested dicts of JSON values.
        ignore: Dotted keys that do not affect the result, such as the logging interval; a key stands for all below it.

    Raises:
        RunMismatchError: The directory holds a different run; every key that differs is listed with both values.
    """
    saved = read_run(workdir)
    if saved is None:
        if jax.process_index() == 0:
            write_json(Path(workdir) / RUN_FILE, config)
        return
    if differences := run_differences(_with_newer_settings(saved, config), config, ignore):
        raise RunMismatchError(
            f"{workdir} is a workdir holding a different run; expected another workdir, or that run's settings:\n  "
            + "\n  ".join(differences)
        )
