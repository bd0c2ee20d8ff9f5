"""Trains every combination of some settings' values, such as the grids of the paper's Table 3, and ranks them.

python launch/grid.py --config=configs/cebab.py:bert --config.data.path=DIR --workdir=runs/grid \
    --grid="optim.learning_rate=1e-3,1e-4,1e-5,1e-6; gamma=1,3,5,7,10; data.max_length=128,256,512"

Each combination is a run of its own in a folder of --workdir; given again, the command goes on where it was stopped.
The table (grid.md) is in the order of the mean of concept and task accuracy on validation, by which a combination is to
be chosen; the test score is shown of the best one only.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import typing
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line

if typing.TYPE_CHECKING:
    from sparsecbm_jax.config.run_config import RunConfig

FLAGS = flags.FLAGS
command_line.define_config()
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("grid", "", "SECTION.KEY=VALUE,VALUE; SECTION.KEY=VALUE,VALUE and so on.")
flags.DEFINE_string("workdir", None, "Folder of the runs and of the table.")

_SCORES = ("concept", "task")


def main() -> None:
    """Runs the command; see the docstring of this file."""
    run = command_line.run_config()
    grid = parse(FLAGS.grid)
    if not FLAGS.workdir or not grid:
        raise ValueError("--grid and --workdir are needed; expected --grid='gamma=1,5; optim.learning_rate=1e-4,1e-5'")
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    # All of them are checked before the first one trains.
    runs = {name_of(combination): with_settings(run, combination) for combination in combinations}

    from sparsecbm_jax.training import train

    found: dict[str, dict[str, typing.Any]] = {}
    for number, (name, one) in enumerate(runs.items(), start=1):
        print(f"[{number}/{len(runs)}] {name}", flush=True)
        found[name] = train(one, Path(FLAGS.workdir) / name).metrics
    table = render(found)
    (Path(FLAGS.workdir) / "grid.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def parse(text: str) -> dict[str, list[typing.Any]]:
    """Parses the values of each setting.

    Raises:
        ValueError: A setting is unknown, has no value, or has one that is not a JSON number, word or list.
    """
    from sparsecbm_jax.config.run_config import key_names, unknown_key

    grid: dict[str, list[typing.Any]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, _, values = part.partition("=")
        key = key.strip().removeprefix("config.")
        if key not in key_names():
            raise ValueError(f"--grid: {unknown_key(key)}")
        grid[key] = [_value(value.strip()) for value in values.split(",") if value.strip()]
        if not grid[key]:
            raise ValueError(f"--grid: {key} has no values; expected {key}=VALUE,VALUE")
    return grid


def _value(text: str) -> typing.Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def name_of(combination: typing.Mapping[str, typing.Any]) -> str:
    """Returns the folder name of a combination, such as gamma=5,optim.learning_rate=0.0001."""
    return ",".join(f"{key}={str(value).replace('/', '-')}" for key, value in sorted(combination.items()))


def with_settings(run: RunConfig, combination: typing.Mapping[str, typing.Any]) -> RunConfig:
    """Returns the run with the settings of a combination."""
    from sparsecbm_jax.config.run_config import from_config_dict, to_dict

    settings = copy.deepcopy(to_dict(run))
    for key, value in combination.items():
        section, _, name = key.rpartition(".")
        (settings[section] if section else settings)[name] = value
    return from_config_dict(settings)


def render(found: typing.Mapping[str, typing.Mapping[str, typing.Any]]) -> str:
    """Renders a Markdown table, the best on validation first, and the test scores of the best."""

    def scores(name: str, split: str) -> dict[str, float]:
        # Strategy 'standard' has no concepts.
        of_split = found[name][split]
        return {score: 100 * of_split[score]["accuracy"] for score in _SCORES if score in of_split}

    ranked = sorted(found, key=lambda name: -statistics.mean(scores(name, "validation").values()))
    lines = ["| settings | validation concepts | validation task |", "| --- | ---: | ---: |"]
    for name in ranked:
        of_run = scores(name, "validation")
        cells = [f"{of_run[score]:.1f}" if score in of_run else "–" for score in _SCORES]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    best = ", ".join(f"{score} {value:.1f} %" for score, value in scores(ranked[0], "test").items())
    lines.append(f"\nOn test, {ranked[0]}: {best}")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
