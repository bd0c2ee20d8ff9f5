"""Measures concept and task accuracy against sparsity, for criteria and models: the paper's Figure 5, and comparisons.

python launch/sweep.py --models=runs/joint/seed0/model,runs/joint/seed1/model --config=configs/cebab_minilm.py \
    --config.data.path=DIR --criteria=woodfisher,magnitude --sparsities=0.5,0.75,0.9 --workdir=runs/sweep
python launch/sweep.py ... --epochs=2        # trains each on under its masks

Every dense model is pruned once for each criterion and sparsity; scores are computed once for all sparsities. With
--epochs, pruning is the first step of a training run from the dense model, whose settings (learning rates, batch size)
are the config's. Results go to results.jsonl, a line each: given again, the command goes on where it was stopped. A
workdir is for one config and one split (test, or --split=validation to choose by). In the end it writes tables of means
and of differences paired by model (sweep.md) and, if matplotlib is installed (extra `report`), a plot (sweep.png, .svg
and .pdf) of means over the models with their range.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line, saved_runs
from sparsecbm_jax.runtime.json_files import append_json_line
from sparsecbm_jax.runtime.result_cache import read_results

if typing.TYPE_CHECKING:
    from sparsecbm_jax.config.run_config import RunConfig
    from sparsecbm_jax.report.sections.sweep import Result

FLAGS = flags.FLAGS
command_line.define_config()
flags.adopt_module_key_flags(command_line)
flags.DEFINE_list("models", [], "Folders of dense models of strategy 'joint', with commas.")
flags.DEFINE_list("criteria", ["woodfisher", "magnitude"], "Values of config.pruner.criterion, with commas.")
flags.DEFINE_list("sparsities", ["0.25", "0.5", "0.75", "0.9"], "Pruned fractions, with commas.")
flags.DEFINE_enum("split", "test", ["test", "validation"], "Split to score: choose on validation, report on test.")
flags.DEFINE_integer("epochs", 0, "Epochs of training under the masks.", lower_bound=0)
flags.DEFINE_string("workdir", None, "Folder that results are written to.")

_SCORES = ("concept", "task")


def main() -> None:
    """Runs the command; see the docstring of this file."""
    run = command_line.run_config()
    if not FLAGS.workdir or not FLAGS.models:
        raise ValueError("--models and --workdir are needed; expected dense models and a folder for the results")
    if FLAGS.epochs == 1:
        raise ValueError("--epochs=1: expected 0, for pruning alone, or at least 2")
    sparsities = sorted(command_line.numbers("sparsities", float))
    runs = {criterion: _run_of(run, criterion, sparsities[-1]) for criterion in FLAGS.criteria}
    workdir = Path(FLAGS.workdir)

    from sparsecbm_jax.config.run_config import to_dict
    from sparsecbm_jax.report import plots
    from sparsecbm_jax.report.sections.sweep import Result, render, section
    from sparsecbm_jax.runtime.run_directory import check_same_run

    # Apart from the settings that flags vary, all results of a folder are of one config and split.
    shared = to_dict(_run_of(run, "woodfisher", 0.5)) | ({} if FLAGS.split == "test" else {"scored_split": FLAGS.split})
    check_same_run(workdir, shared, ignore=("pruner.fisher_memory",))
    path = workdir / "results.jsonl"
    found = [Result(**line) for line in read_results(path)]
    for folder in FLAGS.models:
        rows = [(criterion, s) for criterion in runs for s in sparsities]
        left = [row for row in rows if (folder, *row, FLAGS.epochs) not in {tuple(result[:4]) for result in found}]
        if not left and any(result.model == folder and not result.sparsity for result in found):
            continue
        for result in (_tuned if FLAGS.epochs else _pruned)(folder, left, runs, workdir):
            found.append(result)
            append_json_line(path, result._asdict())
            print(f"{folder}: {describe(result)}", flush=True)
    asked = {(criterion, s) for criterion in runs for s in sparsities}
    shown = [r for r in found if r.model in FLAGS.models and _is_asked(r, asked, FLAGS.epochs)]
    made = section(shown, FLAGS.criteria)
    table = render(made)
    (workdir / "sweep.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    plots.write(made.figures, workdir)


def _is_asked(result: Result, asked: set[tuple[str, float]], epochs: int) -> bool:
    return not result.sparsity or ((result.criterion, result.sparsity) in asked and result.epochs == epochs)


def _run_of(run: RunConfig, criterion: str, sparsity: float) -> RunConfig:
    pruner = dataclasses.replace(run.pruner, criterion=criterion)
    cut = dataclasses.replace(run.sparsity, final=sparsity, initial=0.0, per_concept=())
    return dataclasses.replace(run, strategy="sparse", pruner=pruner, sparsity=cut)


def _read(folder: str, run: RunConfig) -> saved_runs.Saved:
    found = saved_runs.read(folder, run)
    if found.model.strategy != "joint":
        raise ValueError(f"{folder} was trained by strategy {found.model.strategy!r}; expected a dense model, 'joint'")
    return found


def _dense(folder: str, found: saved_runs.Saved, run: RunConfig) -> Result:
    from sparsecbm_jax.report.sections.sweep import Result

    report = found.scores(run, FLAGS.split, None)
    return Result(folder, "dense", 0.0, 0, *(report[name]["accuracy"] for name in _SCORES))


def _pruned(
    folder: str, rows: list[tuple[str, float]], runs: dict[str, RunConfig], workdir: Path
) -> typing.Iterator[Result]:
    """Yields the results of pruning alone; the scores of a criterion are stored until its last sparsity is done."""
    from sparsecbm_jax.pruning import pruner
    from sparsecbm_jax.pruning.score_store import StoredScores
    from sparsecbm_jax.report.sections.sweep import Result
    from sparsecbm_jax.runtime import checkpoints
    from sparsecbm_jax.runtime.progress import progress

    found = _read(folder, next(iter(runs.values())))
    yield _dense(folder, found, next(iter(runs.values())))
    num_concepts = found.model.config.num_concepts
    for criterion in dict.fromkeys(criterion for criterion, _ in rows):
        with checkpoints.Checkpointer(workdir / "scores", num_concepts) as checkpointer:
            about = {"model": saved_runs.fingerprint(folder), "criterion": criterion}
            store = StoredScores(checkpointer, num_concepts, about, discards_others=True)
            bar = functools.partial(progress, description=f"{folder}: {criterion}", unit="gradient")
            for sparsity in (s for of_row, s in rows if of_row == criterion):
                run = _run_of(runs[criterion], criterion, sparsity)
                masks = pruner.prune_model(found.model, found.splits["train"], run, make_bar=bar, store=store)
                report = found.scores(run, FLAGS.split, masks)
                yield Result(folder, criterion, sparsity, 0, *(report[name]["accuracy"] for name in _SCORES))
            store.clear()


def _tuned(
    folder: str, rows: list[tuple[str, float]], runs: dict[str, RunConfig], workdir: Path
) -> typing.Iterator[Result]:
    """Yields the results of pruning before the first step of a training run."""
    from sparsecbm_jax.model import saved_model
    from sparsecbm_jax.report.sections.sweep import Result
    from sparsecbm_jax.training import train

    found = _read(folder, next(iter(runs.values())))
    yield _dense(folder, found, next(iter(runs.values())))
    start = saved_model.load(folder)
    for criterion, sparsity in rows:
        run = _run_of(runs[criterion], criterion, sparsity)
        once = dataclasses.replace(run.sparsity, schedule="oneshot", start_epoch=0, end_epoch=1)
        run = dataclasses.replace(
            run, sparsity=once, training=dataclasses.replace(run.training, num_epochs=FLAGS.epochs)
        )
        name = f"{'-'.join(Path(folder).parts).strip('-/')}-{criterion}-{sparsity:g}-{FLAGS.epochs}epochs"
        metrics = train(run, workdir / name, start=start).metrics[FLAGS.split]
        yield Result(folder, criterion, sparsity, FLAGS.epochs, *(metrics[name]["accuracy"] for name in _SCORES))


def describe(result: Result) -> str:
    """Formats a result in a line."""
    accuracies = f"concepts {100 * result.concept:.1f} %, task {100 * result.task:.1f} %"
    return f"{result.criterion} at {result.sparsity:g}: {accuracies}"


if __name__ == "__main__":
    # Training repeats one program; pruning alone does not.
    command_line.run(main, keeps_memory=any(argument.startswith("--epochs") for argument in sys.argv))
