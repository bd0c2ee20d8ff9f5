"""Evaluation against row-by-row scoring on the host, and the tables made of it."""

import json
from collections import Counter
from typing import Any

import chex
import jax
import numpy as np
import pytest

from sparsecbm_jax.backbones import init_params, maskable_paths
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.sharding import make_mesh, put
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.data.schema import Schema
from sparsecbm_jax.evaluation.run_summary import render_summary, summarise_runs
from sparsecbm_jax.evaluation.scores import batch_sums, evaluate
from sparsecbm_jax.evaluation.tables import render_table
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.heads import init_heads
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.runtime.run_directory import check_same_run

from tests.support.mains import run_main

SCHEMA = Schema(
    concepts=("food", "ambiance", "service", "noise"),
    labels=("1", "2", "3", "4", "5"),
    text_column="text",
    label_column="label",
    concept_columns=("a", "b", "c", "d"),
)
NUM_ROWS = 22
# Another batch shape may round the last bit of a float32 logit otherwise.
SHAPE_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def model(tiny_backbone_config):
    config = CBMConfig(tiny_backbone_config, num_concepts=4, num_classes=3, num_labels=5)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), tiny_backbone_config)
    masks = masks_lib.create(params, maskable_paths(tiny_backbone_config), 4)
    masks = {
        path: jax.random.bernoulli(jax.random.fold_in(jax.random.key(1), index), 0.3, mask.shape)
        for index, (path, mask) in enumerate(masks.items())
    }
    # Sharper heads than at initialisation, so that the classes predicted differ from row to row.
    heads = jax.tree.map(lambda leaf: 8 * leaf, init_heads(jax.random.key(2), config))
    return config, params, masks, heads


def make_rows(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(5, 40, size=(NUM_ROWS, 16)).astype(np.int32),
        "attention_mask": (np.arange(16) < rng.integers(3, 17, size=(NUM_ROWS, 1))).astype(np.int32),
        "concepts": rng.integers(-1, 3, size=(NUM_ROWS, 4)).astype(np.int32),
        "label": rng.integers(-1, 5, size=NUM_ROWS).astype(np.int32),
    }


def make_batches(rows, batch_size):
    for start in range(0, NUM_ROWS, batch_size):
        part = {name: value[start : start + batch_size] for name, value in rows.items()}
        fill = batch_size - len(part["label"])
        # Padding rows carry labels here, so that only their weight can keep them out.
        padded = {name: np.concatenate([value, np.repeat(value[:1], fill, axis=0)]) for name, value in part.items()}
        weight = np.concatenate([np.ones(batch_size - fill), np.zeros(fill)]).astype(np.float32)
        yield Batch(**padded, example_weight=weight, row_ids=np.arange(batch_size, dtype=np.int32))


def by_hand(logits, target):
    keep = target >= 0
    guess, truth = logits[keep].argmax(-1), target[keep]
    f1 = []
    for c in range(logits.shape[-1]):
        hits, either = np.sum((guess == c) & (truth == c)), np.sum(guess == c) + np.sum(truth == c)
        f1.append(2 * hits / either if either else 0.0)
    probabilities = np.exp(logits[keep]) / np.exp(logits[keep]).sum(-1, keepdims=True)
    return {
        "accuracy": np.mean(guess == truth),
        "macro_f1": np.mean(f1),
        "log_loss": -np.log(probabilities[np.arange(keep.sum()), truth]).mean(),
        "num": keep.sum(),
    }


def assert_scores(scores, expected):
    for key, value in expected.items():
        assert scores[key] == pytest.approx(value, rel=1e-5), key


def test_report_matches_scoring_row_by_row(model):
    config, params, masks, heads = model
    rows = make_rows()
    report = evaluate(config, ModelArrays(params, masks, heads), make_batches(rows, 8), SCHEMA)
    (whole,) = make_batches(rows, NUM_ROWS)
    output = make_forward(config)(ModelArrays(params, masks, heads), whole)
    u, y = np.asarray(output.concept_logits, np.float64), np.asarray(output.label_logits, np.float64)
    assert report["num_examples"] == NUM_ROWS
    assert_scores(report["task"], by_hand(y, rows["label"]))
    for k, name in enumerate(SCHEMA.concepts):
        assert_scores(report["concepts"][name], by_hand(u[:, k], rows["concepts"][:, k]))
    assert_scores(report["concept"], by_hand(u.reshape(-1, 3), rows["concepts"].reshape(-1)))
    mean = np.mean([report["concepts"][name]["accuracy"] for name in SCHEMA.concepts])
    assert report["concept"]["mean_accuracy"] == pytest.approx(mean, rel=1e-12)
    baseline = majority_shares(rows["concepts"], rows["label"])
    assert report["concept"]["majority_accuracy"] == pytest.approx(baseline["concept"], rel=1e-12)
    assert report["task"]["majority_accuracy"] == pytest.approx(baseline["task"], rel=1e-12)
    for name, value in baseline["concepts"].items():
        assert report["concepts"][name]["majority_accuracy"] == pytest.approx(value, rel=1e-12)


def majority_shares(concepts: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy of always predicting the most frequent class of each concept, and the most frequent label."""

    def count(values: np.ndarray) -> int:
        return max(Counter(values[values >= 0].tolist()).values())

    counts = [count(column) for column in concepts.T]
    of_concepts = zip(SCHEMA.concepts, counts, np.sum(concepts >= 0, axis=0), strict=True)
    return {
        "concept": sum(counts) / np.sum(concepts >= 0),
        "task": count(labels) / np.sum(labels >= 0),
        "concepts": {name: most / total for name, most, total in of_concepts},
    }


def test_pooled_accuracy_is_the_mean_over_concepts_when_no_cell_is_missing(model):
    config, params, masks, heads = model
    rows = make_rows()
    rows["concepts"] = np.abs(rows["concepts"])
    scores = evaluate(config, ModelArrays(params, masks, heads), make_batches(rows, 8), SCHEMA)["concept"]
    assert scores["num"] == 4 * NUM_ROWS
    assert scores["accuracy"] == pytest.approx(scores["mean_accuracy"], rel=1e-12)


@pytest.mark.parametrize("batch_size", [5, 32])
def test_batching_changes_nothing(model, batch_size):
    config, params, masks, heads = model
    rows = make_rows()
    report = evaluate(config, ModelArrays(params, masks, heads), make_batches(rows, 8), SCHEMA)
    other = evaluate(config, ModelArrays(params, masks, heads), make_batches(rows, batch_size), SCHEMA)
    chex.assert_trees_all_close(other, report, rtol=SHAPE_TOLERANCE, atol=SHAPE_TOLERANCE)


def test_packed_masks_and_repeated_calls_need_no_new_compilation(model):
    config, params, masks, heads = model
    rows = make_rows()
    report = evaluate(config, ModelArrays(params, masks, heads), make_batches(rows, 8), SCHEMA)
    forward = make_forward(config)
    compiled = forward._cache_size(), batch_sums._cache_size()
    packed = evaluate(config, ModelArrays(params, masks_lib.pack(masks), heads), make_batches(rows, 8), SCHEMA)
    assert packed == report
    assert compiled == (forward._cache_size(), batch_sums._cache_size())


def test_dense_and_standard_models(model):
    config, params, _, heads = model
    rows = make_rows()
    dense = evaluate(config, ModelArrays(params, None, heads), make_batches(rows, 8), SCHEMA)
    assert dense["concept"]["num"] == np.sum(rows["concepts"] >= 0)
    standard_heads = init_heads(jax.random.key(3), config, has_bottleneck=False)
    standard = evaluate(config, ModelArrays(params, None, standard_heads), make_batches(rows, 8), SCHEMA)
    assert set(standard) == {"num_examples", "task"}
    assert standard["task"]["num"] == np.sum(rows["label"] >= 0)
    (whole,) = make_batches(rows, NUM_ROWS)
    logits = make_forward(config)(ModelArrays(params, None, standard_heads), whole).label_logits
    assert_scores(standard["task"], by_hand(np.asarray(logits, np.float64), rows["label"]))


def test_a_mesh_gives_the_same_report(model):
    config, params, masks, heads = model
    mesh = make_mesh(data=2, fsdp=2, concept=2)
    rows = make_rows()
    report = evaluate(config, ModelArrays(params, masks, heads), make_batches(rows, 8), SCHEMA)
    packed = masks_lib.pack(masks)
    forward = make_forward(config, mesh)
    placed = ModelArrays(put(params, mesh), packed, put(heads, mesh))
    sharded = evaluate(config, placed, make_batches(rows, 8), SCHEMA, forward_fn=forward)
    chex.assert_trees_all_close(sharded, report, rtol=SHAPE_TOLERANCE, atol=SHAPE_TOLERANCE)


def test_what_nobody_labelled_is_none_and_json(model):
    config, params, masks, heads = model
    rows = make_rows()
    rows["label"][:], rows["concepts"][:, 3] = -1, -1
    report = evaluate(config, ModelArrays(params, masks, heads), make_batches(rows, 8), SCHEMA)
    assert report["task"]["accuracy"] is None and report["task"]["num"] == 0
    assert report["concepts"]["noise"]["ece"] is None
    assert report["concept"]["mean_accuracy"] == pytest.approx(
        np.mean([report["concepts"][name]["accuracy"] for name in SCHEMA.concepts[:3]])
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert render_table(report).splitlines()[-1].split() == ["task", "-", "-", "-", "-", "-", "0"]


def test_wrong_number_of_concepts_and_no_batches_are_refused(model):
    config, params, masks, heads = model
    short = Schema(("food",), ("1", "2"), "text", "label", ("a",))
    with pytest.raises(ValueError, match="4 concepts, expected the schema's 1"):
        evaluate(config, ModelArrays(params, masks, heads), make_batches(make_rows(), 8), short)
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate(config, ModelArrays(params, masks, heads), [], SCHEMA)


def make_report(concept, task):
    def scores(value, num):
        return {
            "accuracy": value,
            "macro_f1": value - 0.05,
            "paper_macro_f1": value + 0.05,
            "ece": 0.031,
            "log_loss": 0.4,
            "majority_accuracy": 0.5,
            "num": num,
        }

    return {
        "num_examples": 10,
        "concept": {**scores(concept, 20.0), "mean_accuracy": concept},
        "concepts": {"food": scores(concept, 10.0), "noise level": scores(concept, 10.0)},
        "task": scores(task, 9.0),
    }


def test_table_is_aligned_with_the_baseline_beside_the_accuracy():
    assert render_table(make_report(0.876, 0.6)) == "\n".join(
        [
            "%             accuracy  majority  macro-F1  paper F1  ECE  labelled",
            "food              87.6      50.0      82.6      92.6  3.1        10",
            "noise level       87.6      50.0      82.6      92.6  3.1        10",
            "all concepts      87.6      50.0      82.6      92.6  3.1        20",
            "task              60.0      50.0      55.0      65.0  3.1         9",
        ]
    )


@pytest.fixture
def runs(tmp_path):
    workdirs = []
    for seed, accuracy in enumerate((0.60, 0.62, 0.67)):
        workdir = tmp_path / f"seed{seed}"
        check_same_run(workdir, {"seed": seed, "optim": {"learning_rate": 1e-4}})
        (workdir / "metrics.json").write_text(json.dumps({"test": make_report(0.8, accuracy), "epoch": 3}))
        workdirs.append(workdir)
    return workdirs


def test_runs_are_summarised_to_mean_and_deviation(runs):
    summary = summarise_runs(runs)
    assert summary["num_runs"] == 3
    assert summary["test"]["task"]["accuracy"]["mean"] == pytest.approx(0.63)
    assert summary["test"]["task"]["accuracy"]["sd"] == pytest.approx(np.std([0.60, 0.62, 0.67], ddof=1))
    table = render_summary(summary).splitlines()
    assert table[0] == "| test (3 runs) | accuracy | majority | macro-F1 | paper F1 | ECE |"
    assert table[-1].startswith("| task | 63.0 ± 3.6 | 50.0 ± 0.0 |")
    assert "| task | 60.0 | 50.0 |" in render_summary(summarise_runs(runs[:1]))


def test_runs_that_are_not_seeds_of_one_another_are_refused(runs, tmp_path):
    check_same_run(tmp_path / "other", {"seed": 9, "optim": {"learning_rate": 3e-4}})
    (tmp_path / "other" / "metrics.json").write_text((runs[0] / "metrics.json").read_text())
    with pytest.raises(ValueError, match=r"optim\.learning_rate: saved 0\.0001, current 0\.0003"):
        summarise_runs([*runs, tmp_path / "other"])
    with pytest.raises(FileNotFoundError, match=r"nowhere.metrics\.json does not exist"):
        summarise_runs([*runs, tmp_path / "nowhere"])
    (runs[1] / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"seed1.metrics\.json is not JSON"):
        summarise_runs(runs)


def test_launch_summarise_prints_the_table(runs):
    shown = run_main("summarise.py", *map(str, runs))
    assert shown.stdout.startswith("| test (3 runs) |"), shown.stderr
    data = run_main("summarise.py", *map(str, runs), "--json")
    assert json.loads(data.stdout)["num_runs"] == 3, data.stderr


def test_majority_baseline_of_real_cebab(cebab_dir):
    columns = [f"{name}_aspect_majority" for name in SCHEMA.concepts]
    classes = {"Negative": 0, "Positive": 1}
    cells = json.loads((cebab_dir / "test.json").read_text())
    concepts = np.array([[classes.get(row[column], 2) for column in columns] for row in cells])
    labels = np.array([int(row["review_majority"]) - 1 if row["review_majority"].isdigit() else -1 for row in cells])
    baseline = majority_shares(concepts, labels)
    assert baseline["concept"] == pytest.approx(0.592, abs=5e-4)
    assert baseline["concepts"]["noise"] == pytest.approx(0.786, abs=5e-4)
    assert baseline["task"] == pytest.approx(0.273, abs=5e-4)
