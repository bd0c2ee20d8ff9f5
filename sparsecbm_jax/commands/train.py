r"""Trains, prunes, evaluates and saves a concept bottleneck model.

sparsecbm train --data=DIR --text=review --label=stars --concepts=food,service --workdir=runs/mine
sparsecbm train --data=DIR --text=review --label=stars --concepts=food,service --workdir=runs/mine --backbone=tiny \
    --config.training.num_epochs=4 --config.sparsity.start_epoch=1 --config.sparsity.end_epoch=2
sparsecbm train --config=configs/cebab.py:bert --config.optim.learning_rate=1e-4 --workdir=runs/x --seeds=0,1,2

DIR holds a table for each split: files with train, validation (or dev) and test in their names. A row is a text, its
label, and a class for each concept; which classes and labels there are is read off the training rows, and printed. An
empty cell of a concept counts as class 'unknown' where there is such a class. --data, --text, --label and --concepts
are short for --config.data.path, text_column, label_column and concept_columns, and --backbone for
--config.backbone.name with a learning rate that suits it: one in a config file gives way to them, and they to the long
flag. Config files are part of a checkout, or your own.

A run that was stopped goes on from its last checkpoint when the same command is given again. At SIGTERM it finishes the
step under way, saves a checkpoint and ends with status 75, on which a scheduler may start it again. With --seeds, each
run goes to seedN below the workdir, and summary.json holds their means and standard deviations. In several processes,
on one host or many, all get the same command and --coordinator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line, default_config, processes
from sparsecbm_jax.data import sources
from sparsecbm_jax.data.presets import COLUMNS
from sparsecbm_jax.data.schema import DataError

if typing.TYPE_CHECKING:
    from sparsecbm_jax.config.run_config import DataConfig

FLAGS = flags.FLAGS
command_line.define_config(default=Path(default_config.__file__))
flags.adopt_module_key_flags(command_line)
flags.adopt_module_key_flags(processes)
flags.DEFINE_string("data", None, "Folder of your own table, with a file for each split (CSV, JSON, JSONL, Parquet).")
flags.DEFINE_string("text", None, "Column of the text.")
flags.DEFINE_string("label", None, "Column of the label.")
flags.DEFINE_list("concepts", [], "Columns of the concepts, with commas; their names are the concepts'.")
flags.DEFINE_string("backbone", None, "minilm, tiny, another known name, a name on the hub, or a folder of its layout.")
flags.DEFINE_string("workdir", None, "Folder that the run is written to.")
flags.DEFINE_bool("profile", False, "Trace a few steps with JAX's profiler, to WORKDIR/profile (TensorBoard, xprof).")
flags.DEFINE_list("seeds", None, "Seeds of several runs, such as 0,1,2; in place of --config.seed.")

# Flags that describe one's own table, and the settings of `data` that they are short for.
_TABLE = {"data": "path", "text": "text_column", "label": "label_column", "concepts": "concept_columns"}


def main() -> None:
    """Runs the command."""
    config = command_line.run_config(_settings())
    _check_table(config.data)
    if not FLAGS.workdir:
        raise ValueError("--workdir is missing; expected the folder that the run is written to, such as runs/first")
    workdir = Path(FLAGS.workdir)
    seeds = _seeds()
    process = processes.start()

    from sparsecbm_jax.evaluation.run_summary import render_summary, summarise_runs
    from sparsecbm_jax.training import train

    # It says which classes and labels it found in the training rows.
    logging.getLogger(sources.__name__).setLevel(logging.INFO)
    workdirs = [workdir / f"seed{seed}" for seed in seeds]
    with processes.ending_in_order(), _naming_flags():
        if not seeds:
            train(config, workdir, profile=FLAGS.profile)
        for seed, folder in zip(seeds, workdirs, strict=True):
            train(dataclasses.replace(config, seed=seed), folder, profile=FLAGS.profile)
    if seeds and process == 0:
        summary = summarise_runs(workdirs)
        (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(render_summary(summary))


def _settings() -> dict[str, typing.Any]:
    """Returns the settings that the flags of one's own table, and `--backbone`, are short for, by dotted name."""
    table = {f"data.{key}": value for flag, key in _TABLE.items() if (value := FLAGS[flag].value)}
    if "data.concept_columns" in table:
        table["data.concept_columns"] = tuple(table["data.concept_columns"])
    if table or not command_line.has_config():
        table["data.preset"] = COLUMNS
    return table | (default_config.backbone_settings(FLAGS.backbone) if FLAGS.backbone else {})


def _check_table(data: DataConfig) -> None:
    """Raises ValueError where columns of one's own table are not named."""
    if data.preset != COLUMNS:
        return
    absent = [f"--{flag}" for flag, key in _TABLE.items() if not getattr(data, key)]
    if data.name and "--data" in absent:
        absent.remove("--data")
    if absent:
        raise ValueError(
            f"{', '.join(absent)} missing; expected --data=DIR --text=COLUMN --label=COLUMN --concepts=COLUMN,COLUMN "
            "for your own table, or --config=FILE"
        )


@contextlib.contextmanager
def _naming_flags() -> Iterator[None]:
    """Has messages on bad data name the flags that were given, in place of the settings that they are short for."""
    try:
        yield
    except DataError as error:
        message = str(error)
        for flag, key in _TABLE.items():
            if FLAGS[flag].value:
                message = message.replace(f"config.data.{key} = ", f"--{flag}=").replace(
                    f"config.data.{key}", f"--{flag}"
                )
        # As the other settings are typed.
        raise DataError(re.sub(r"(?<!-)config\.data\.", "--config.data.", message)) from error


def _seeds() -> list[int]:
    try:
        seeds = [int(seed) for seed in FLAGS.seeds or ()]
    except ValueError:
        raise ValueError(f"--seeds={','.join(FLAGS.seeds)}: expected integers with commas, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={','.join(FLAGS.seeds)}: each seed may stand there once")
    return seeds
