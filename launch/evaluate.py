"""Evaluates a saved model: its scores on a split, or what corrections repair and what they cost.

python launch/evaluate.py --suite=classification --model=runs/cebab/model --split=validation
python launch/evaluate.py --suite=intervention --model=runs/cebab/model --workdir=runs/edits \
    --dense=runs/joint/model,runs/standard/model,runs/independent/model
python launch/evaluate.py --suite=intervention --model=runs/cebab/model --workdir=runs/edits --parts=streams \
    --arms=minimal,guarded --orders=0,1,2 --max_edits=200 --config=configs/cebab_minilm.py --config.data.path=DIR

Without --config the data are those that the model was trained on. The intervention suite has three parts, all on one
split:

  undone   the paper's Figure 3, accuracy against the share of weights that an edit drops and grows: gold labels pick
           the wrong cells, each row is corrected and read again, and the edit undone, which cannot lose; beside it what
           one such edit does to rows it was not made for, which can
  minimal  how few weights repair a wrong cell
  streams  reviews one after another, all corrections kept in force, by arm and order: accuracy before each reveal, on
           the half that no correction is of, on the corrected cells themselves and on their siblings

Results go to results.jsonl, a line each: given again, the command goes on where it was stopped; a workdir is of one
model and config. At the end intervention.md, intervention.json and, where matplotlib is installed (extra `report`),
plots as PNG, SVG and PDF. Takes hours for CEBaB on two cores with the defaults; --max_cells and --max_edits make it
less.
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
    from sparsecbm_jax.evaluation.editing.suite import Subject

FLAGS = flags.FLAGS
command_line.define_config()
flags.adopt_module_key_flags(command_line)
flags.DEFINE_enum("suite", None, ["classification", "intervention"], "What to evaluate.")
flags.DEFINE_string("model", None, "Folder of the saved model, such as runs/cebab/model.")
flags.DEFINE_list(
    "dense", [], "undone: folders of dense models, with commas; each adds a line, of what it was trained for."
)
flags.DEFINE_string("split", "test", "Split to evaluate on.")
flags.DEFINE_string("workdir", None, "Folder that the results of the intervention suite are written to.")
flags.DEFINE_list("parts", ["undone", "minimal", "streams"], "Parts of the intervention suite, with commas.")
flags.DEFINE_list("rankings", ["magnitude", "signed", "random"], "undone: how weights are ranked, with commas.")
flags.DEFINE_list("ratios", ["0", "0.0001", "0.001", "0.003", "0.01", "0.03", "0.1"], "undone: shares, with commas.")
flags.DEFINE_integer("max_cells", 100, "undone: wrong cells to correct, 0 for all.", lower_bound=0)
flags.DEFINE_integer("side_edits", 8, "undone: edits whose side effect is measured.", lower_bound=0)
flags.DEFINE_integer("side_rows", 256, "undone: rows that it is measured on, 0 for all.", lower_bound=0)
flags.DEFINE_integer("max_minimal", 0, "minimal: wrong cells to correct, 0 for all.", lower_bound=0)
flags.DEFINE_integer("max_pairs", 4096, "minimal: the most pairs of weights to change.", lower_bound=1)
flags.DEFINE_list(
    "arms", [], "streams: arms by name (sparsecbm_jax/named_arms.py), with commas; by default all of ARMS."
)
flags.DEFINE_list("orders", ["0", "1", "2"], "streams: seeds of the order of reviews, with commas.")
flags.DEFINE_integer("max_edits", 60, "streams: corrections of each.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "undone, minimal: of the cells that are drawn.")


def main() -> None:
    if not FLAGS.model or not FLAGS.suite:
        raise ValueError("--suite and --model are needed; expected 'classification' or 'intervention', and a folder")
    if FLAGS.suite == "intervention" and not FLAGS.workdir:
        raise ValueError("--workdir is missing; expected a folder for the results of the intervention suite")

    from sparsecbm_jax.evaluation.tables import render_table
    from sparsecbm_jax.model import saved_model
    from sparsecbm_jax.report import plots
    from sparsecbm_jax.report.sections import intervention

    given = FLAGS["config"].value is not None
    run = (
        command_line.run_config()
        if given
        else saved_runs.own_run(saved_model.load(FLAGS.model), FLAGS.model, "--config")
    )
    found = saved_runs.read(FLAGS.model, run)
    if FLAGS.split not in found.splits:
        raise ValueError(f"--split={FLAGS.split}: expected one of {', '.join(found.splits)}")
    if FLAGS.suite == "classification":
        print(render_table(found.scores(run, FLAGS.split, found.model.masks)))
        return
    report = corrected(found, run, Path(FLAGS.workdir))
    text, path = intervention.render(report), Path(FLAGS.workdir) / intervention.FILE
    write_json(path, report, indent=1)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    plots.write([figure for section in intervention.sections(report) for figure in section.figures], path.parent)


def corrected(found: saved_runs.Saved, run: RunConfig, workdir: Path) -> dict[str, typing.Any]:
    """The results of the intervention suite, part by part."""
    from sparsecbm_jax.config.run_config import to_dict
    from sparsecbm_jax.core import masks as masks_lib
    from sparsecbm_jax.core.masks import check_masks
    from sparsecbm_jax.evaluation.editing.named_editors import NAMED_EDITORS, RANKINGS
    from sparsecbm_jax.evaluation.editing.suite import Subject
    from sparsecbm_jax.model import saved_model
    from sparsecbm_jax.model.sparse_cbm import ModelArrays
    from sparsecbm_jax.model.strategies import STRATEGIES
    from sparsecbm_jax.runtime.run_directory import check_same_run

    model, parts = found.model, {"undone": _undone, "minimal": _minimal, "streams": _streams}
    check_masks(model.masks)
    assert model.masks is not None
    for flag, known in (("parts", parts), ("rankings", RANKINGS), ("arms", NAMED_EDITORS)):
        command_line.check_names(flag, known)
    ratios = command_line.numbers("ratios", float)
    command_line.numbers("orders", int)
    density = masks_lib.total_density(model.masks)
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
    about = {"model": saved_runs.fingerprint(FLAGS.model), "split": FLAGS.split, "config": to_dict(run)}
    check_same_run(workdir, about, ignore=("config.pruner.fisher_memory",))
    split, groups = found.splits[FLAGS.split], found.dataset.splits[FLAGS.split].groups
    # Rows that name no original are each their own.
    own = groups or tuple(map(str, range(split.num_examples)))
    subject = Subject(model.config, ModelArrays(model.params, model.masks, model.heads), split, own)
    results = Results(workdir / "results.jsonl")
    report = {name: parts[name](subject, found, run, results) for name in parts if name in FLAGS.parts}
    return {"split": FLAGS.split, "num_weights": masks_lib.num_weights(model.masks), **report}


def _undone(subject: Subject, found: saved_runs.Saved, run: RunConfig, results: Results) -> dict[str, typing.Any]:
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
            arm = RANKINGS[ranking](ratio, FLAGS.seed)
            move = functools.partial(bar.update, 1)
            return single_edits(subject, arm, rows(), held_out(), num_side_edits=FLAGS.side_edits, on_edit=move)

    points = []
    for ratio in sorted(command_line.numbers("ratios", float)):
        for ranking in FLAGS.rankings if ratio else ("none",):
            key = ("undone", ranking, ratio, *drawn, FLAGS.side_edits, FLAGS.side_rows)
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
    from sparsecbm_jax.evaluation.editing.sequential import Cell
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
    summarise = functools.partial(summarise_minimal, num_weights=masks_lib.num_weights(subject.state.masks))
    return {
        "all": summarise(list(by_cell.values())),
        "concepts": {name: summarise(values) for name, values in of_concept.items()},
        "changed": sorted(value["changed"] for value in by_cell.values() if value["is_repaired"]),
    }


def _streams(subject: Subject, found: saved_runs.Saved, run: RunConfig, results: Results) -> dict[str, typing.Any]:
    from sparsecbm_jax.data.batches import fisher_batches
    from sparsecbm_jax.evaluation import metrics
    from sparsecbm_jax.evaluation.editing.named_editors import EDITORS, NAMED_EDITORS, EditorContext
    from sparsecbm_jax.evaluation.editing.sequential import run_sequence
    from sparsecbm_jax.runtime.progress import progress

    batches = fisher_batches(found.splits["train"], run.pruner, seed=run.seed)
    kit = EditorContext(subject.config, subject.state, batches)

    def stream(name: str, order: int) -> dict[str, typing.Any]:
        with contextlib.closing(
            progress(description=f"{name}, order {order}", total=FLAGS.max_edits, unit="edit")
        ) as bar:
            _, report = run_sequence(
                subject.config,
                subject.state,
                NAMED_EDITORS[name].make(kit, order),
                subject.split,
                subject.groups,
                max_edits=FLAGS.max_edits,
                order_seed=order,
                before=subject.readings,
                on_edit=functools.partial(bar.update, 1),
            )
        return report.to_dict()

    names = FLAGS.arms or list(EDITORS)
    reports: dict[str, list[typing.Any]] = {name: [] for name in names}
    # Order by order, so that what is there when it is stopped compares all arms.
    for order in command_line.numbers("orders", int):
        for name in names:
            key = ("stream", name, order, FLAGS.max_edits)
            reports[name].append(results.once(key, functools.partial(stream, name, order)))
    return {
        name: {"title": NAMED_EDITORS[name].title, "summary": metrics.summarise(of_arm), "orders": of_arm}
        for name, of_arm in reports.items()
    }


if __name__ == "__main__":
    command_line.run(main)
