"""Prints several runs of one configuration as mean ± sample standard deviation, in a Markdown table.

python launch/summarise.py runs/cebab/seed0 runs/cebab/seed1 runs/cebab/seed2
python launch/summarise.py runs/cebab/seed* --json

Reads the metrics.json of each run, in a few seconds on any machine. Runs that differ in more than their seed are
refused.
"""

from __future__ import annotations

import json
import sys

from absl import flags

from sparsecbm_jax.cli import command_line

FLAGS = flags.FLAGS
flags.DEFINE_bool("json", False, "Print the summary as JSON instead of a table.")


def main() -> None:
    """Runs the command; see the docstring of this file."""
    workdirs = FLAGS(sys.argv)[1:]
    if not workdirs:
        raise ValueError(
            "no runs given; expected the folders of finished runs, such as runs/cebab/seed0 runs/cebab/seed1"
        )

    from sparsecbm_jax.evaluation.run_summary import render_summary, summarise_runs

    summary = summarise_runs(workdirs)
    print(json.dumps(summary, indent=2) if FLAGS.json else render_summary(summary))


if __name__ == "__main__":
    command_line.run(main, takes_arguments=True)
