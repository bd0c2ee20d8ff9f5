"""The evaluation mains: the suite goes on where it was stopped, and refuses by name before it computes."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsecbm_jax.config.run_config import from_config_dict, to_dict
from sparsecbm_jax.intervention.edit_log import EditLog
from sparsecbm_jax.model import saved_model
from sparsecbm_jax.model.predictions import predict

from tests.support.mains import REPOSITORY, run_main
from tests.support.tiny_model import SCHEMA, TEXTS, tiny_model

pytestmark = pytest.mark.long

ASKED = (
    "--rankings=signed --ratios=0,0.01 --max_cells=2 --side_edits=1 --max_minimal=2 --editors=none,minimal --orders=0"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that says what it was trained on: a few reviews in a table, two of each original.

    The reviews are of one width, which is other files' too.
    """
    root = tmp_path_factory.mktemp("evaluate")
    for split in ("train", "validation", "test"):
        with (root / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", *SCHEMA.concepts, "label", "original"])
            for n, text in enumerate(TEXTS):
                classes = [SCHEMA.classes[(n + k) % 3] for k in range(3)]
                writer.writerow([f"{text} {split} {TEXTS[1]}", *classes, SCHEMA.labels[n % 2], n // 2])
    data = {"preset": "columns", "path": str(root), "text_column": "text", "label_column": "label", "max_length": 24}
    data |= {"concept_columns": SCHEMA.concepts, "group_column": "original"}
    run = from_config_dict({"data": data, "backbone": {"name": "tiny"}, "pruner": {"num_grads": 1}})
    model = dataclasses.replace(tiny_model(num_layers=1), metadata={"run_config": to_dict(run)})
    saved_model.save(model, root / "model")
    saved_model.save(dataclasses.replace(model, masks=None, strategy="sequential"), root / "dense")
    return root


def evaluate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_main("evaluate_interventions.py", f"--model={folder / 'model'}", *arguments)


def test_the_suite_goes_on_where_it_was_stopped(folder: Path) -> None:
    workdir = folder / "edits"
    asked = [f"--workdir={workdir}", *ASKED.split(), "--max_edits=2"]
    asked.append(f"--dense={folder / 'dense'}")
    first = evaluate(folder, *asked)
    assert first.returncode == 0, first.stderr
    lines = (workdir / "results.jsonl").read_text().splitlines()
    names = [line["key"][:2] for line in map(json.loads, lines)]
    expected = [
        ["single", "none"],
        ["single", "signed"],
        ["oracle", 2],
        ["dense model"],
        ["sequential", "none"],
        ["sequential", "minimal"],
    ]
    assert [name[:1] if name[0] == "dense model" else name for name in names if name[0] != "minimal"] == expected
    text = (workdir / "intervention.md").read_text()
    assert text.strip() in first.stdout and "| minimal |" in text and "| oracle activation |" in text
    (dense,) = [line for line in text.splitlines() if line.startswith("| dense model of the concepts alone |")]
    assert dense.endswith("| – | – | – | – |")
    report = json.loads((workdir / "intervention.json").read_text())
    assert set(report) == {"split", "num_weights", "single", "minimal", "sequential"}
    # As if it had been stopped in the last line: what is whole is not made again.
    kept = json.loads(lines[0])
    kept["value"]["changed"] = 77
    (workdir / "results.jsonl").write_text("\n".join([json.dumps(kept), *lines[1:-1]]) + '\n{"key": ["str')
    again = evaluate(folder, *asked)
    assert again.returncode == 0, again.stderr
    assert len((workdir / "results.jsonl").read_text().splitlines()) == len(lines)
    assert "| no intervention | 0 | 77 |" in again.stdout
    other = evaluate(folder, *asked, "--split=validation")
    assert other.returncode == 2 and 'split: saved "test", current "validation"' in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "error: --workdir is missing"),
        ("--workdir=x --ratios=0.9", "error: --ratios=0.9: expected shares from 0 to 0."),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, arguments: str, message: str) -> None:
    result = evaluate(folder, *arguments.split())
    assert result.returncode == 2 and message in result.stderr, result.stderr


def test_only_dense_models_are_compared_with(folder: Path, tmp_path: Path) -> None:
    result = evaluate(folder, f"--workdir={tmp_path / 'edits'}", f"--dense={folder / 'model'}")
    assert result.returncode == 2 and "strategy 'sparse'; expected one of standard, independent" in result.stderr
    assert not (tmp_path / "edits").exists()


def test_a_models_scores_are_printed(folder: Path) -> None:
    result = run_main("evaluate.py", f"--model={folder / 'model'}")
    assert result.returncode == 0 and result.stdout.startswith("%  ") and "all concepts" in result.stdout
    as_json = run_main("evaluate.py", f"--model={folder / 'model'}", "--json", "--split=validation")
    assert set(json.loads(as_json.stdout)) >= {"task", "concept", "concepts"}
    other = run_main("evaluate.py", f"--model={folder / 'model'}", "--split=dev")
    assert other.returncode == 2 and "--split=dev: expected one of train, validation, test" in other.stderr


def test_corrections_of_a_file_are_kept(folder: Path, tmp_path: Path) -> None:
    kept, log = tmp_path / "corrections.jsonl", tmp_path / "edits.log"
    model = saved_model.load(folder / "model")
    assert model.masks is not None
    readings = predict(model, [TEXTS[0], TEXTS[3]]).concepts[:, 1]
    earlier, now = SCHEMA.classes[readings[0]], SCHEMA.classes[(readings[1] + 2) % 3]
    kept.write_text(json.dumps({"text": TEXTS[0], "concept": "ambiance", "target": earlier}) + "\n")
    asked = [f"--model={folder / 'model'}", f"--text={TEXTS[3]}", "--concept=ambiance", f"--target={now}"]
    made = run_main("intervene.py", *asked, f"--requests={kept}", f"--log={log}")
    assert made.returncode == 0 and "logged: edit" in made.stdout, made.stderr
    corrections = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(one["text"], one["target"]) for one in corrections] == [(TEXTS[0], earlier), (TEXTS[3], now)]
    with EditLog(log, model.masks, SCHEMA.concepts) as edits:
        corrected = dataclasses.replace(model, masks=edits.replay(model.masks))
    read = predict(corrected, [one["text"] for one in corrections]).concepts[:, 1]
    assert [SCHEMA.classes[index] for index in read] == [earlier, now]
    # Undone, and then the same text to another class, with the file next to the log.
    (edit,) = edits.edits
    undone = run_main("edits.py", f"--model={folder / 'model'}", f"--log={log}", f"--undo={edit.id}")
    assert undone.returncode == 0, undone.stderr
    again = run_main("intervene.py", *asked[:2], "--concept=ambiance", f"--target={earlier}", f"--log={log}")
    assert again.returncode == 0 and "(continual: margin 0.5" in again.stdout, again.stderr
    assert len(kept.read_text().splitlines()) == 3
    kept.write_text('{"text": "fine", "concept": "food"}\n')
    refused = run_main("intervene.py", *asked, f"--requests={kept}")
    assert refused.returncode == 2 and f"{kept}: line 1: expected a JSON object" in refused.stderr


def test_the_live_page_keeps_corrections_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "launch" / "serve.py"), f"--model={folder / 'model'}", "--port=0"]
    lines = []
    with subprocess.Popen([*command, f"--edits={tmp_path / 'edits.log'}"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                lines.append(line)
                if line.endswith("kept\n") or "serving" in line:
                    break
        finally:
            server.kill()
    assert lines[-1] == f"0 earlier corrections of {tmp_path / 'corrections.jsonl'} kept\n", lines
