"""Trains, prunes, evaluates and saves a concept bottleneck model.

python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart
python launch/train.py --config=configs/cebab.py:bert --config.optim.learning_rate=1e-4 --workdir=runs/x --seeds=0,1,2

A run that was stopped goes on from its last checkpoint when the same command is given again. At SIGTERM it finishes the
step under way, saves a checkpoint and ends with status 75, on which a scheduler may start it again. With --seeds, each
run goes to seedN below the workdir, and summary.json holds their means and standard deviations. In several processes,
on one host or many, all get the same command and --coordinator; see processes.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line, processes
from sparsecbm_jax.runtime.json_files import write_json

FLAGS = flags.FLAGS
command_line.define_config()
flags.adopt_module_key_flags(command_line)
flags.adopt_module_key_flags(processes)
flags.DEFINE_string("workdir", None, "Folder that the run is written to.")
flags.DEFINE_bool("profile", False, "Trace a few steps with JAX's profiler, to WORKDIR/profile (TensorBoard, xprof).")
flags.DEFINE_list("seeds", None, "Seeds of several runs, such as 0,1,2; in place of --config.seed.")


def main() -> None:
    config = command_line.run_config()
    if not FLAGS.workdir:
        raise ValueError("--workdir is missing; expected the folder that the run is written to, such as runs/first")
    workdir = Path(FLAGS.workdir)
    seeds = _seeds()
    process = processes.start()

    from sparsecbm_jax.evaluation.run_summary import render_summary, summarise_runs
    from sparsecbm_jax.training import train

    workdirs = [workdir / f"seed{seed}" for seed in seeds]
    with processes.ending_in_order():
        if not seeds:
            train(config, workdir, profile=FLAGS.profile)
        for seed, folder in zip(seeds, workdirs, strict=True):
            train(dataclasses.replace(config, seed=seed), folder, profile=FLAGS.profile)
    if seeds and process == 0:
        summary = summarise_runs(workdirs)
        write_json(workdir / "summary.json", summary)
        print(render_summary(summary))


def _seeds() -> list[int]:
    try:
        seeds = [int(seed) for seed in FLAGS.seeds or ()]
    except ValueError:
        raise ValueError(f"--seeds={','.join(FLAGS.seeds)}: expected integers with commas, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={','.join(FLAGS.seeds)}: each seed may stand there once")
    return seeds


if __name__ == "__main__":
    command_line.run(main)
