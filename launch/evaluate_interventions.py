"""Evaluates corrections of a saved model: what they repair, what they cost, and what lasts.

python launch/evaluate_interventions.py --model=runs/cebab/model --workdir=runs/edits \
    --dense=runs/joint/model,runs/standard/model,runs/independent/model
python launch/evaluate_interventions.py --model=runs/cebab/model --workdir=runs/edits --parts=sequential \
    --editors=minimal,continual --orders=0,1,2 --max_edits=200

Without --config the data are those that the model was trained on. There are three parts, all on one split:

  single      the paper's Figure 3, accuracy against the share of weights that an edit drops and grows: gold labels pick
              the wrong cells, each row is corrected and predicted again, and the edit undone, which cannot lose; with
              it what one such edit does to rows it was not made for, which can
  minimal     how few weights repair a wrong cell
  sequential  reviews one after another, all corrections kept, by editor and order: accuracy before each reveal, on the
              half that no correction is of, on the corrected cells themselves and on their siblings

Results go to results.jsonl, a line each: given again, the command continues where it was stopped; a workdir is of one
model and config. At the end it writes intervention.md, intervention.json and, where matplotlib is installed (extra
`report`), plots as PNG, SVG and PDF. Takes hours for CEBaB on two cores with the defaults; --max_cells and --max_edits
make it less.
"""

from __future__ import annotations

import contextlib
import functools
import typing
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line, saved_runs
from sparsecbm_jax.runtime.json_files import write_json
from sparsecbm_jax.runtime.result_cache import Results

if typing.TYPE_CHECKING:
    from sparsecbm_jax.config.run_config import RunConfig
    from sparsecbm_jax.evaluation.editing.subject import Subject

FLAGS = flags.FLAGS
command_line.define_config()
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("model", None, "Folder of the saved model, such as runs/cebab/model.")
flags.DEFINE_list(
    "dense", [], "single: folders of dense models, with commas; each adds a line, of what it was trained for."
)
flags.DEFINE_string("split", "test", "Split to evaluate on.")
flags.DEFINE_string("workdir", None, "Folder that the results are written to.")
flags.DEFINE_list("parts", ["single", "minimal", "sequential"], "Parts to run, with commas.")
flags.DEFINE_list("rankings", ["magnitude", "signed", "random"], "single: how weights are ranked, with commas.")
flags.DEFINE_list("ratios", ["0", "0.0001", "0.001", "0.003", "0.01", "0.03", "0.1"], "single: shares, with commas.")
flags.DEFINE_integer("max_cells", 100, "single: wrong cells to correct, 0 for all.", lower_bound=0)
flags.DEFINE_integer("side_edits", 8, "single: edits whose side effect is measured.", lower_bound=0)
flags.DEFINE_integer("side_rows", 256, "single: rows that it is measured on, 0 for all.", lower_bound=0)
flags.DEFINE_integer("max_minimal", 0, "minimal: wrong cells to correct, 0 for all.", lower_bound=0)
flags.DEFINE_integer("max_pairs", 4096, "minimal: the most pairs of weights to change.", lower_bound=1)
flags.DEFINE_list(
    "editors",
    [],
    "sequential: editors by name (sparsecbm_jax/evaluation/editing/named_editors.py), with commas; by default all of "
    "EDITORS.",
)
flags.DEFINE_list("orders", ["0", "1", "2"], "sequential: seeds of the order of reviews, with commas.")
flags.DEFINE_integer("max_edits", 60, "sequential: corrections of each.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "single, minimal: of the cells that are drawn.")


def main() -> None:
    """Runs the parts, writes and prints what came out."""
    if not FLAGS.workdir:
        raise ValueError("--workdir is missing; expected a folder for the results")

    from sparsecbm_jax.report import plots
    from sparsecbm_jax.report.sections import intervention

    run, found = saved_runs.read_with_data()
    report = evaluate_interventions(found, run, Path(FLAGS.workdir))
    text, path = intervention.render(report), Path(FLAGS.workdir) / intervention.FILE
    write_json(path, report, indent=1)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    plots.write([figure for section in intervention.sections(report) for figure in section.figures], path.parent)


def evaluate_interventions(found: saved_runs.Saved, run: RunConfig, workdir: Path) -> dict[str, typing.Any]:
    """Returns the results, part by part."""
    from sparsecbm_jax.config.run_config import to_dict
    from sparsecbm_jax.core import masks as masks_lib
    from sparsecbm_jax.evaluation.editing.subject import Subject
    from sparsecbm_jax.runtime.run_directory import check_same_run

    model, parts = found.model, {"single": _single, "minimal": _minimal, "sequential": _sequential}
    masks_lib.check_masks(model.masks)
    _check_flags(found, parts)
    about = {"model": saved_runs.fingerprint(FLAGS.model), "split": FLAGS.split, "config": to_dict(run)}
    check_same_run(workdir, about, ignore=("config.pruner.fisher_memory",))
    split, groups = found.splits[FLAGS.split], found.dataset.splits[FLAGS.split].groups
    # Rows that name no original are each their own.
    own = groups or tuple(map(str, range(split.num_examples)))
    subject = Subject(model.config, model.arrays, split, own, model.class_activations)
    results = Results(workdir / "results.jsonl")
    report = {name: parts[name](subject, found, run, results) for name in parts if name in FLAGS.parts}
    return {"split": FLAGS.split, "num_weights": masks_lib.num_weights(model.arrays.concept_masks), **report}


def _check_flags(found: saved_runs.Saved, parts: typing.Mapping[str, typing.Any]) -> None:
    """Raises ValueError before hours of work where a flag is wrong."""
    from sparsecbm_jax.core import masks as masks_lib
    from sparsecbm_jax.evaluation.editing.named_editors import NAMED_EDITORS, RANKINGS
    from sparsecbm_jax.model import saved_model
    from sparsecbm_jax.model.strategies import STRATEGIES

    for flag, known in (("parts", parts), ("rankings", RANKINGS), ("editors", NAMED_EDITORS)):
        command_line.check_names(flag, known)
    ratios = command_line.numbers("ratios", float)
    command_line.numbers("orders", int)
    assert found.model.masks is not None
    density = masks_lib.total_density(found.model.masks)
    most = float(min(density.min(), 1 - density.max()))
    if not all(0 <= ratio <= most for ratio in ratios):
        raise ValueError(
            f"--ratios={','.join(FLAGS.ratios)}: expected shares from 0 to {most:g}, since each concept of "
            f"{FLAGS.model} has to have as many kept and as many pruned weights"
        )
    for folder in FLAGS.dense:
        strategy = saved_model.load(folder).strategy
        if STRATEGIES[strategy].is_sparse:
            expected = ", ".join(name for name, one in STRATEGIES.items() if not one.is_sparse)
            raise ValueError(f"--dense={folder}: trained by strategy {strategy!r}; expected one of {expected}")


def _single(subject: Subject, found: saved_runs.Saved, run: RunConfig, results: Results) -> dict[str, typing.Any]:
    from sparsecbm_jax.evaluation.editing.named_editors import RANKINGS
    from sparsecbm_jax.evaluation.editing.suite import oracle, single_edits
    from sparsecbm_jax.runtime.progress import progress

    drawn = FLAGS.max_cells, FLAGS.seed
    rows = functools.cache(lambda: subject.draw(*drawn))
    held_out = functools.cache(
        lambda: subject.draw_held_out(rows()[: FLAGS.side_edits], FLAGS.side_rows, seed=FLAGS.seed)
    )

    def point(ranking: str, ratio: float) -> dict[str, typing.Any]:
        cells = sum(len(subject.wrong_of(row)) for row in rows())
        with contextlib.closing(progress(description=f"{ranking}, r = {ratio:g}", total=cells, unit="edit")) as bar:
            editor = RANKINGS[ranking](ratio, FLAGS.seed)
            move = functools.partial(bar.update, 1)
            return single_edits(subject, editor, rows(), held_out(), num_side_edits=FLAGS.side_edits, on_edit=move)

    points = []
    for ratio in sorted(command_line.numbers("ratios", float)):
        for ranking in FLAGS.rankings if ratio else ("none",):
            key = ("single", ranking, ratio, *drawn, FLAGS.side_edits, FLAGS.side_rows)
            value = results.once(key, functools.partial(point, ranking, ratio))
            points.append({"ranking": ranking, "ratio": ratio, **value})
    set_by_hand = results.once(("oracle", *drawn), lambda: oracle(subject, rows()))
    dense = [
        results.once(("dense model", saved_runs.fingerprint(folder)), functools.partial(_dense, folder, run))
        for folder in FLAGS.dense
    ]
    return {"points": points, "oracle": set_by_hand, "dense": dense}


def _dense(folder: str, run: RunConfig) -> dict[str, typing.Any]:
    """The scores of a dense model on what its backbone was trained for; None for the rest."""
    from sparsecbm_jax.model.strategies import STRATEGIES

    found = saved_runs.read(folder, run)
    strategy = found.model.strategy
    scores = found.scores(run, FLAGS.split, None)
    accuracies = {
        name: scores[name]["accuracy"] if name in STRATEGIES[strategy].trains else None for name in ("concept", "task")
    }
    return {"strategy": strategy, **accuracies}


def _minimal(subject: Subject, found: saved_runs.Saved, run: RunConfig, results: Results) -> dict[str, typing.Any]:
    from sparsecbm_jax.core import masks as masks_lib
    from sparsecbm_jax.evaluation.editing.subject import Cell
    from sparsecbm_jax.evaluation.editing.suite import minimal_edits, summarise_minimal
    from sparsecbm_jax.runtime.progress import progress

    cells = [Cell(row, k) for row in subject.draw(FLAGS.max_minimal, FLAGS.seed) for k in subject.wrong_of(row)]
    key_of = {cell: ("minimal", *cell, FLAGS.max_pairs) for cell in cells}
    left = [cell for cell in cells if key_of[cell] not in results]
    made = minimal_edits(subject, left, FLAGS.max_pairs)
    for cell, value in progress(made, description="minimal", total=len(left), unit="edit"):
        results.once(key_of[cell], functools.partial(dict, value))
    by_cell = {cell: results[key_of[cell]] for cell in cells}
    concepts = found.dataset.schema.concepts
    of_concept = {name: [v for cell, v in by_cell.items() if cell.concept == k] for k, name in enumerate(concepts)}
    num_weights = masks_lib.num_weights(subject.arrays.concept_masks)
    summarise = functools.partial(summarise_minimal, num_weights=num_weights)
    return {
        "all": summarise(list(by_cell.values())),
        "concepts": {name: summarise(values) for name, values in of_concept.items()},
        "changed": sorted(value["changed"] for value in by_cell.values() if value["is_repaired"]),
    }


def _sequential(subject: Subject, found: saved_runs.Saved, run: RunConfig, results: Results) -> dict[str, typing.Any]:
    from sparsecbm_jax.data.batches import fisher_batches
    from sparsecbm_jax.evaluation import metrics
    from sparsecbm_jax.evaluation.editing.named_editors import EDITORS, NAMED_EDITORS, EditorContext
    from sparsecbm_jax.evaluation.editing.sequential import run_sequence
    from sparsecbm_jax.runtime.progress import progress

    batches = fisher_batches(found.splits["train"], run.pruner, seed=run.seed)
    context = EditorContext(subject.config, subject.arrays, batches, subject.class_activations)

    def sequence(name: str, order: int) -> dict[str, typing.Any]:
        bar = progress(description=f"{name}, order {order}", total=FLAGS.max_edits, unit="edit")
        with contextlib.closing(bar):
            _, report = run_sequence(
                subject,
                NAMED_EDITORS[name].make(context, order),
                max_edits=FLAGS.max_edits,
                order_seed=order,
                on_edit=functools.partial(bar.update, 1),
            )
        return report.to_dict()

    names = FLAGS.editors or list(EDITORS)
    reports: dict[str, list[typing.Any]] = {name: [] for name in names}
    # Order by order, so that what is there when it is stopped compares all editors.
    for order in command_line.numbers("orders", int):
        for name in names:
            key = ("sequential", name, order, FLAGS.max_edits)
            reports[name].append(results.once(key, functools.partial(sequence, name, order)))
    return {
        name: {"title": NAMED_EDITORS[name].title, "summary": metrics.summarise(of_editor), "orders": of_editor}
        for name, of_editor in reports.items()
    }


if __name__ == "__main__":
    command_line.run(main)
