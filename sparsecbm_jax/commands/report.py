"""Writes the report of a run as one page: scores, decisions, training, pruning, subnetworks, corrections, model card.

sparsecbm report --workdir=runs/quickstart
sparsecbm report --workdir=runs/cebab --out=report.html --figures=figures
sparsecbm report --workdir=runs/cebab --suite=runs/edits --sweep=runs/sweep

The page opens from disk and asks nothing of any network. What the run does not have is left out, and named at the end
of the page. --suite is a folder that `launch/evaluate_interventions.py` wrote, --sweep one of `launch/sweep.py`.
--figures writes every figure as PNG, SVG and PDF, too. Needs the extra `report`. Takes seconds on a CPU; with a model,
about as long as it takes to compile and to read up to 512 held-out reviews, from which the shown decisions are chosen.
"""

from __future__ import annotations

import importlib
import typing
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line, saved_runs

if typing.TYPE_CHECKING:
    from sparsecbm_jax.data.schema import Examples
    from sparsecbm_jax.model.sparse_cbm import SparseCBM

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("workdir", None, "Folder of the run, finished or not.")
flags.DEFINE_string("out", None, "Page to write; by default report.html of the run.")
flags.DEFINE_string("suite", None, "Folder that the intervention suite wrote.")
flags.DEFINE_string("sweep", None, "Folder that a sweep wrote.")
flags.DEFINE_string("log", None, "File of edits of the run's model; by default edits.log of the run, where it is.")
flags.DEFINE_string("figures", None, "Folder to write the figures to as well, as PNG, SVG and PDF.")


def main() -> None:
    """Runs the command."""
    if not FLAGS.workdir:
        raise ValueError("--workdir is missing; expected the folder of a run, such as runs/quickstart")
    # Before the work, so that a missing library costs none.
    importlib.import_module("sparsecbm_jax.report.page")
    from sparsecbm_jax.report import plots, read_report, write_report

    plots.pyplot()
    report = read_report(
        FLAGS.workdir, suite=FLAGS.suite, sweep_folder=FLAGS.sweep, edit_log=FLAGS.log, held_out=_held_out
    )
    out = Path(FLAGS.out or Path(FLAGS.workdir) / "report.html")
    write_report(out, report)
    print(f"report: {out}")
    for line in report.left_out:
        print(f"left out: {line}")
    if FLAGS.figures:
        plots.write(report.figures, Path(FLAGS.figures))


def _held_out(model: SparseCBM) -> Examples:
    folder = str(Path(FLAGS.workdir) / "model")
    return saved_runs.own_data(model, folder, "a model that `sparsecbm train` wrote").splits["test"]
