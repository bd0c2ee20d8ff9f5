"""Kills training at random moments, and checks that it goes on from a whole checkpoint to the same end.

bash launch/soak/run.sh training                                  # 50 kills: about an hour on two cores
python launch/soak/training.py --kills=3 --workdir=soak       # the runs stay

A run that prunes, on 8 virtual CPU devices, finishes once without a kill. Then it is started again and again in another
folder, in turns in two processes with four devices each and in one with all eight. One of its processes gets SIGKILL,
or every fourth time SIGTERM, at a random moment: while it starts, computes, prunes, scores, or saves. The others must
soon end by themselves with an error; after SIGTERM all must save and end with the status that asks for another start.
The latest checkpoint must be whole, to the checksum of every array. A run that finishes before its kill is followed by
another, and the last run finishes without a further kill: log, scores and model of each must be those of the first run.
Prints a line for each kill and one in the end, or the error and ends with status 2. Linux or macOS.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line

from launch.soak.killed_runs import NUM_DEVICES, Kill, Outcome, Run, differences

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
flags.DEFINE_integer("kills", 50, "Times that a run is killed.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the moments.")
flags.DEFINE_string("workdir", None, "Folder for the runs; by default they are deleted.")

SETTINGS = (
    "--config=configs/common.py",
    "--config.backbone.name=tiny",
    "--config.data.max_length=32",
    "--config.training.num_epochs=8",
    "--config.training.batch_size=64",
    "--config.training.eval_batch_size=64",
    "--config.training.log_every_steps=1",
    "--config.training.save_every_steps=3",
    "--config.sparsity.start_epoch=2",
    "--config.sparsity.end_epoch=4",
    "--config.pruner.num_grads=2",
    "--config.mesh.data=8",
)


def main() -> None:
    """Runs the command; see the docstring of this file."""
    with contextlib.ExitStack() as stack:
        folder = Path(FLAGS.workdir or stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        print(soak(folder, SETTINGS, drawn(FLAGS.seed), FLAGS.kills))


def drawn(seed: int) -> Iterator[Kill]:
    """Draws kills at random moments, without end."""
    draw = random.Random(seed)
    for index in itertools.count():
        num_processes = 2 - index % 2
        kind = signal.SIGTERM if index % 4 == 3 else signal.SIGKILL
        # One of four comes while the processes start, or load a checkpoint.
        steps, delay = (0, draw.uniform(0, 15)) if draw.random() < 0.25 else (draw.randint(1, 8), draw.uniform(0, 2))
        yield Kill(num_processes, draw.randrange(num_processes), kind, steps, delay)


def soak(folder: Path, settings: Sequence[str], kills: Iterator[Kill], num_kills: int) -> str:
    """Runs once without kills, and as often as needed with kills; returns a summary.

    Args:
        folder: Folder of the runs.
        settings: Flags of `launch/train.py`.
        kills: The kills.
        num_kills: Number of kills.

    Raises:
        ValueError: A process did not end as it should, a checkpoint is damaged, or the two runs differ.
    """
    # Starts share their compiled programs.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    environment = {**cache, **os.environ}
    whole = Run(folder / "whole", settings, environment)
    whole.finish(1)
    seen, found = list[Outcome](), list[tuple[float, float, float]]()
    while len(seen) < num_kills:
        killed = Run(folder / f"killed_{len(found) + 1}", settings, environment)
        while len(seen) < num_kills and not (outcome := killed.end_by(kill := next(kills))).is_finished:
            seen.append(outcome)
            devices = f"{kill.num_processes} x {NUM_DEVICES // kill.num_processes} devices"
            print(f"kill {len(seen)}/{num_kills}: {devices}, {outcome.describe(kill)}", flush=True)
        killed.finish(1 + len(seen) % 2)
        found.append(differences(whole, killed))
    numbers, weights, masks = map(max, zip(*found, strict=True))
    slowest = max(outcome.seconds for outcome in seen)
    num_saved = sum(outcome.saved is not None for outcome in seen)
    return (
        f"{len(seen)} kills of {len(found)} runs: every checkpoint was whole, {num_saved} of the starts after them "
        f"went on from one, and the other processes ended within {slowest:.1f} s. Compared with the run without kills, "
        f"numbers of the log differ by at most {numbers:.2g}, parameters by {weights:.2g}, masks in "
        f"{100 * masks:.2g} % of the weights"
    )


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    command_line.run(main, keeps_memory=False)
