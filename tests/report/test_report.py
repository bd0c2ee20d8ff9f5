"""The report of a run, from a folder made by hand: what it holds, leaves out and refuses, and who can use it."""

import base64
import csv
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsecbm_jax import report
from sparsecbm_jax.config.run_config import from_config_dict, to_dict
from sparsecbm_jax.data import load_dataset
from sparsecbm_jax.data.schema import Examples, Schema
from sparsecbm_jax.intervention.edit_log import EditLog
from sparsecbm_jax.intervention.stored_edit import Positions, StoredEdit, text_hash
from sparsecbm_jax.model import saved_model
from sparsecbm_jax.model.sparse_cbm import SparseCBM
from sparsecbm_jax.report import plots

from tests.report.test_intervention import report as suite_report
from tests.support.tiny_model import SCHEMA, TEXTS, tiny_model

pytest.importorskip("jinja2", reason="jinja2 not here: pip install 'sparsecbm-jax[report]'")
pytest.importorskip("matplotlib", reason="matplotlib not here: pip install 'sparsecbm-jax[report]'")


PHONE = 390
HOSTILE = """</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"> {{ 7 * 7 }} $x$ 🎉"""
KERNEL = "layers/attention/query/kernel"
SECTIONS = (
    "Evaluation",
    "Decisions",
    "Training",
    "Pruning",
    "Subnetworks",
    "Change after edits",
    "Corrections, test split: single edits, triggered by gold labels",
    "Corrections, test split: minimal edits",
    "Corrections, test split: sequential editing",
    "Sparsity, pruning alone",
    "Model card",
)
SWEEP = [("dense", 0.0), ("taylor", 0.5), ("magnitude", 0.5), ("taylor", 0.9), ("magnitude", 0.9)]


def scores(accuracy: float) -> dict[str, float]:
    named = {"accuracy": accuracy, "macro_f1": 0.6, "paper_macro_f1": 0.7, "ece": 0.1, "log_loss": 0.5}
    return {**named, "majority_accuracy": 0.4, "num": 40.0}


def metrics(concepts: tuple[str, ...]) -> dict[str, Any]:
    split = {
        "num_examples": 40,
        "concept": {**scores(0.75), "mean_accuracy": 0.75},
        "concepts": {name: scores(0.5 + 0.1 * n) for n, name in enumerate(concepts)},
        "task": scores(0.625),
    }
    density = dict.fromkeys(concepts, 0.6)
    return {"validation": split, "test": split, "best_epoch": 2, "train_seconds": 12.5, "density": density}


def log_lines() -> list[str]:
    """Three epochs of four steps, pruned before the second and the third."""
    lines = []
    for step in range(1, 13):
        epoch = (step - 1) // 4
        if step in (5, 9):
            done = {"is_stored": False, "form": "dual", "num_grads": 4, "passes": 1, "qr_blocks": {KERNEL: 2}}
            done["mean_square_over_damping"] = {KERNEL: 10.0}
            cut = {"sparsity": [0.2 * epoch] * 3, "density": [1 - 0.2 * epoch] * 3, "concepts": [done] * 3}
            lines.append({"step": step, "kind": "prune", "epoch": epoch, **cut, "peak_bytes": 10**9, "seconds": 2.5})
        loss = {"concept_loss": 1 / step, "grad_norm": 5.0, "loss": 6 / step, "task_loss": 1.5 / step}
        lines.append({"step": step, "kind": "train", "epoch": epoch, **loss})
        if step % 4 == 0:
            accuracy = {"concept_accuracy": 0.05 * step, "task_accuracy": 0.04 * step}
            lines.append({"step": step, "kind": "validation", "epoch": epoch, **accuracy})
    return [json.dumps(line) for line in lines]


def make_run(folder: Path, schema: Schema) -> None:
    """What a run leaves, with a random model that nobody trained."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", *SCHEMA.concepts, "label"])
            for n, text in enumerate(TEXTS):
                writer.writerow([text, *(SCHEMA.classes[(n + k) % 2] for k in range(3)), SCHEMA.labels[n % 2]])
    columns = {"text_column": "text", "label_column": "label", "concept_columns": SCHEMA.concepts, "max_length": 32}
    data = {"preset": "columns", "path": str(folder), "concepts": schema.concepts, **columns}
    run = from_config_dict({"data": data, "backbone": {"name": "tiny"}})
    metadata = {"run_config": to_dict(run), "dataset": "reviews", "backbone": "tiny", "seed": 3}
    model = dataclasses.replace(tiny_model(), schema=schema, metadata=metadata)
    saved_model.save(model, folder / "model")
    (folder / "metrics.jsonl").write_text("\n".join(log_lines()) + "\n")
    (folder / "metrics.json").write_text(json.dumps(metrics(schema.concepts)))
    mask = np.asarray(model.masks[KERNEL][2])
    kept, pruned = np.flatnonzero(mask), np.flatnonzero(~mask)
    edit = StoredEdit(
        concept=schema.concepts[2],
        target="Negative",
        label=None,
        text_sha256=text_hash(TEXTS[0]),
        saliency="signed",
        num_steps=1,
        positions={KERNEL: Positions(mask.shape, kept[:5], pruned[-4:])},
        before={"concepts": {schema.concepts[2]: "Positive"}},
    )
    with EditLog(folder / "edits.log", model.masks, schema.concepts) as log:
        log.append(edit)


def held_out(model: SparseCBM) -> Examples:
    return load_dataset(from_config_dict(model.metadata["run_config"]).data).splits["test"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run named `run`, a folder of the intervention suite, and one of a sweep."""
    root = tmp_path_factory.mktemp("report")
    make_run(root / "run", SCHEMA)
    (root / "suite").mkdir()
    suite = suite_report({"magnitude": 0.3, "signed": 1.0, "random": 0.2})
    (root / "suite" / "intervention.json").write_text(json.dumps(suite))
    (root / "sweep").mkdir()
    results = [
        {"model": f"m{n}", "criterion": c, "sparsity": s, "epochs": 0, "concept": 0.9 - 0.1 * s, "task": 0.6 - 0.1 * n}
        for n in range(2)
        for c, s in SWEEP
    ]
    (root / "sweep" / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    return root


@pytest.fixture(scope="module")
def whole(folder: Path) -> report.RunReport:
    return report.read_report(folder / "run", suite=folder / "suite", sweep_folder=folder / "sweep", held_out=held_out)


@pytest.fixture(scope="module")
def hostile(whole: report.RunReport, tmp_path_factory: pytest.TempPathFactory) -> report.RunReport:
    """A run whose concepts have names that would be markup, and a decision on a review that would be."""
    root = tmp_path_factory.mktemp("hostile")
    make_run(root / "run", dataclasses.replace(SCHEMA, concepts=(HOSTILE, "a" * 300, "]]>")))
    made = report.read_report(root / "run")
    pathway = dataclasses.replace(whole.sections[1].pathways[0], text=HOSTILE, words=())
    lanes = tuple(dataclasses.replace(lane, word_scores=()) for lane in pathway.concepts)
    decisions = whole.sections[1]._replace(pathways=[dataclasses.replace(pathway, concepts=lanes)])
    return made._replace(sections=[decisions, *made.sections], predictor=whole.predictor)


@pytest.fixture(scope="module")
def pages(whole: report.RunReport, hostile: report.RunReport) -> dict[str, str]:
    return {"whole": report.render_report(whole), "hostile": report.render_report(hostile)}


def cells(made: report.RunReport, title: str, caption: str) -> list[list[str]]:
    (section,) = (section for section in made.sections if section.title == title)
    (table,) = (table for table in section.tables if caption in table.caption)
    return [list(row) for row in (table.head, *table.rows)]


def test_it_has_a_section_for_all_there_is(whole: report.RunReport) -> None:
    assert tuple(section.title for section in whole.sections) == SECTIONS
    assert whole.left_out == []
    numbers = {key.name: (key.value, key.note) for key in whole.key_numbers}
    assert numbers["task accuracy"] == ("62.5 %", "on test; majority 40.0 %")
    assert numbers["weights kept"][0] == "60.0 %" and numbers["steps"][0] == "12"
    # What is drawn stands in numbers beside it.
    assert all(section.tables for section in whole.sections if section.figures)
    names = [figure.name for figure in whole.figures]
    assert len(set(names)) == len(names) and {"pruning_schedule", "overlap", "change_after_edits", "sweep"} < set(names)


def test_tables_say_what_the_run_wrote(whole: report.RunReport) -> None:
    head, *rows = cells(whole, "Training", "Each epoch")
    assert head[:2] == ["epoch", "concept loss"] and head[-1] == "pruned to %"
    assert rows[2] == ["3 (chosen)", "0.096", "0.145", "0.578", "5.000", "60.0", "48.0", "40.0"]
    assert cells(whole, "Pruning", "Pruning events")[1] == [
        *["1", "2", "5", "20.0", "80.0", "dual", "4", "6", "2.5", "1.00"]
    ]
    assert cells(whole, "Pruning", "Mean square")[1] == ["attention query", "10", "10", "10"]
    assert cells(whole, "Evaluation", "Test split")[1][:4] == ["food", "50.0", "40.0", "+10.0"]
    edits = cells(whole, "Change after edits", "Active edits")[1]
    assert edits[1:] == ["Positive → Negative", "service", "5", "4"]
    assert cells(whole, "Change after edits", "Changes of service") == [
        ["kernel", "layer 1", "layer 2"],
        ["attention query", "−5 +0, 1", "−0 +4, 1"],
    ]
    taylor, less = cells(whole, SECTIONS[9], "Accuracy on test"), cells(whole, SECTIONS[9], "Differences from taylor")
    assert taylor[1:3] == [
        ["dense", "0", "90.0 ± 0.0", "55.0 ± 7.1", "2"],
        ["taylor", "0.5", "85.0 ± 0.0", "55.0 ± 7.1", "2"],
    ]
    assert less[1] == ["magnitude", "0.5", "0.0 ± 0.0", "0.0 ± 0.0", "2"]
    assert ["seed", "3"] in cells(whole, "Model card", "made of")
    assert ["data.max_length", "32"] in cells(whole, "Model card", "Settings")


def test_the_shown_decisions_are_what_they_are_called(whole: report.RunReport, folder: Path) -> None:
    head, *rows = cells(whole, "Decisions", "Predictions for the reviews")
    assert head == ["kind", "text", "label", *SCHEMA.concepts]
    kinds = {row[0]: row for row in rows}
    assert "wrong label" in kinds and ", not " in kinds["wrong label"][2]
    pathways = whole.sections[1].pathways
    assert [row[1] for row in rows] == [pathway.text for pathway in pathways]
    for row, pathway in zip(rows, pathways, strict=True):
        assert row[2].startswith(pathway.label)
        assert [cell.split(",")[0] for cell in row[3:]] == [lane.predicted_class for lane in pathway.concepts]
    again = report.read_report(folder / "run", held_out=held_out)
    assert again.sections[1].pathways == pathways


def test_what_is_not_there_is_named_and_not_shown(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "run" / "metrics.jsonl", tmp_path)
    made = report.read_report(tmp_path)
    assert [section.title for section in made.sections] == ["Training", "Pruning"]
    assert "The run has not ended" in made.sections[0].words[0]
    assert [line.partition(":")[0] for line in made.left_out] == [
        *("Evaluation", "Decisions", "Subnetworks", "Change after edits", "Corrections", "Sparsity", "Model card")
    ]
    page = report.render_report(made)
    assert "Evaluation: the run has no metrics.json yet." in page and 'id="main" hidden' in page
    # A record that is being written is no error.
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 13, "ki')
    assert report.read_report(tmp_path).sections[0].tables == made.sections[0].tables

    def none(model: SparseCBM) -> Examples:
        raise ValueError("reviews.csv is not there")

    made = report.read_report(folder / "run", held_out=none)
    assert "Decisions: reviews.csv is not there." in made.left_out


def test_a_dense_run_has_no_subnetworks(tmp_path: Path) -> None:
    saved_model.save(dataclasses.replace(tiny_model(), masks=None, strategy="joint"), tmp_path / "model")
    made = report.read_report(tmp_path)
    assert [section.title for section in made.sections] == ["Model card"]
    assert "Subnetworks: a dense model has none." in made.left_out


@pytest.mark.parametrize(
    ("name", "line", "content", "message"),
    [
        ("metrics.jsonl", 2, "{", "metrics.jsonl: line 2 is not JSON"),
        (
            "metrics.jsonl",
            3,
            '{"kind": "tran", "step": 1}',
            "metrics.jsonl: line 3: expected an object of kind train, ",
        ),
        (
            "metrics.jsonl",
            1,
            '{"kind": "train", "step": 1, "epoch": 0, "loss": "x"}',
            "line 1: 'loss' is 'x'; expected a n",
        ),
        ("metrics.jsonl", 1, '{"kind": "train", "epoch": 0}', "line 1: 'step' is None; expected an integer"),
        (
            "metrics.jsonl",
            5,
            '{"kind": "prune", "step": 1, "epoch": 0, "sparsity": [1], "density": []}',
            "line 5: 'density' is []; expected a list of numbers",
        ),
        ("metrics.jsonl", 2, b"\xff", "metrics.jsonl: line 2 is not UTF-8"),
        ("metrics.json", None, "[]", "metrics.json holds a list, expected an object"),
        ("metrics.json", None, "{}", "metrics.json: no scores of a split; expected 'test'"),
        (
            "metrics.json",
            None,
            '{"test": {"task": {"accuracy": 1}}}',
            "metrics.json: test: 'task' has no 'majority_accur",
        ),
        ("edits.log", 2, "0", "edits.log: line 2"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(
    folder: Path, tmp_path: Path, name: str, line: int | None, content: str | bytes, message: str
) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    bad = content if isinstance(content, bytes) else content.encode()
    if line is None:
        (run / name).write_bytes(bad)
    else:
        lines = [*(run / name).read_bytes().split(b"\n"), b""]
        lines[line - 1] = bad
        (run / name).write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        report.read_report(run)


@pytest.mark.parametrize(
    ("part", "name", "content", "message"),
    [
        ("suite", "intervention.json", '{"single": {"points": []}}', "intervention.json: KeyError: 'oracle'"),
        (
            "suite",
            "intervention.json",
            "{}",
            "KeyError: 'single or minimal or sequential'; expected what",
        ),
        ("suite", "intervention.json", '{\n"single": ', "intervention.json is not JSON: Expecting value: line 2"),
        ("sweep_folder", "results.jsonl", '{"model": "a"}\n', "results.jsonl: line 1: "),
        ("sweep_folder", "results.jsonl", "", "holds no result of pruning; expected what launch/sweep.py writes"),
        ("suite", None, "", "intervention.json does not exist; expected what launch/evaluate_interventions.py"),
        ("sweep_folder", None, "", "results.jsonl does not exist; expected what launch/sweep.py writes"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    folder: Path, tmp_path: Path, part: str, name: str | None, content: str, message: str
) -> None:
    if name is not None:
        (tmp_path / name).write_text(content)
    suite, sweep_folder = (tmp_path if part == name_of_part else None for name_of_part in ("suite", "sweep_folder"))
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(message)):
        report.read_report(folder / "run", suite=suite, sweep_folder=sweep_folder)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; expected the folder of a run"):
        report.read_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds nothing of a run; expected metrics.jsonl, metrics.json or model/"):
        report.read_report(tmp_path)


def test_a_page_is_small_and_names_no_place_outside(
    pages: dict[str, str], whole: report.RunReport, hostile: report.RunReport
) -> None:
    for page, made in zip(pages.values(), (whole, hostile), strict=True):
        assert len(page.encode()) < 2_000_000
        held = "".join(base64.b64decode(part).decode() for part in re.findall(r"base64,([\w+/=]+)", page))
        assert page.count("<img ") == len(made.figures) and held.count("<svg ") == len(made.figures)
        # Names of SVG's own vocabulary apart.
        for address in re.findall(r"https?://[^\s\"'<>]+", page + held):
            assert re.fullmatch(r"http://www\.w3\.org/(2000/svg|1999/xlink)", address)


def test_a_page_that_would_be_too_large_is_refused(whole: report.RunReport, tmp_path: Path) -> None:
    report.write_report(tmp_path / "new" / "small.html", whole._replace(sections=[], predictor=None))
    assert (tmp_path / "new" / "small.html").read_bytes().endswith(b"</html>")
    with pytest.raises(ValueError, match="at most 2,000,000 are allowed"):
        report.render_report(whole._replace(sections=[], lead="a" * 2_000_000))


def test_a_figure_is_the_same_file_again(whole: report.RunReport, tmp_path: Path) -> None:
    (figure,) = (figure for figure in whole.figures if figure.name == "pruning_schedule")
    for folder in ("one", "two"):
        plots.write([figure], tmp_path / folder)
    for ending, start in {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}.items():
        one, two = ((tmp_path / folder / f"pruning_schedule.{ending}").read_bytes() for folder in ("one", "two"))
        assert one.startswith(start) and one == two


@pytest.fixture
def open_report(visit: Callable[[str], Any], tmp_path: Path, pages: dict[str, str]) -> Callable[[str], Any]:
    """Opens a report from disk."""

    def opened(name: str) -> Any:
        path = tmp_path / "report.html"
        path.write_bytes(pages[name].encode())
        return visit(path.as_uri())

    return opened


def test_the_page_shows_its_figures_and_asks_nothing(open_report: Any, whole: report.RunReport) -> None:
    page = open_report("whole")
    outside = [url for url in page.requests if not url.startswith("data:image/svg+xml")]
    assert outside == [page.url] and page.problems == []
    loaded = page.eval_on_selector_all("img", "nodes => nodes.map(node => node.complete && node.naturalWidth > 0)")
    assert loaded == [True] * len(whole.figures)
    assert page.evaluate("fetch('data:,x').then(() => 'allowed', () => 'refused')") == "refused"
    assert page.locator("h2").all_text_contents()[0] == "Evaluation"
    # A decision is the page of pathways': a concept that is set gives the label anew.
    page.select_option("#choice", index=1)
    assert page.text_content(".review") == whole.sections[1].pathways[1].text
    page.locator("button.class").first.click()
    assert "the label is" in page.text_content(".status")


def test_hostile_text_stays_text(open_report: Any, hostile: report.RunReport) -> None:
    page = open_report("hostile")
    assert page.evaluate("window.hacked") is None and page.problems == []
    assert page.locator("script").count() == 2
    assert page.locator("img").count() == len(hostile.figures)
    assert HOSTILE in page.locator("th").all_text_contents()
    assert page.text_content(".review") == HOSTILE


@pytest.mark.parametrize("name", ["whole", "hostile"])
def test_nothing_overflows_on_a_phone(open_report: Any, name: str) -> None:
    page = open_report(name)
    page.set_viewport_size({"width": PHONE, "height": 844})
    page.eval_on_selector_all("details", "nodes => nodes.forEach(node => { node.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    spilling = "nodes => nodes.filter(n => n.getBoundingClientRect().right > innerWidth).map(n => n.outerHTML)"
    assert page.eval_on_selector_all("h1, h2, p, li, dd, figure, .canvas, .table, summary, .card", spilling) == []


def test_axe_finds_nothing_serious(open_report: Any, axe: str) -> None:
    page = open_report("whole")
    page.eval_on_selector_all("details", "nodes => nodes.forEach(node => { node.open = true; })")
    page.evaluate(axe)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        found = page.evaluate("axe.run().then((result) => result.violations)")
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert not [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in serious]
