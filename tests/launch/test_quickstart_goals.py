"""The quickstart says which of its goals are met, and which are not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sparsecbm_jax.data.words import Word
from sparsecbm_jax.explanation.pathways import DecisionPathway, explain
from sparsecbm_jax.model import saved_model

from launch.quickstart_goals import READ, TEXT, reading_goals, score_goals
from tests.support.mains import run_main
from tests.support.tiny_model import TEXTS, tiny_model


def scores(concept: float, task: float) -> dict[str, Any]:
    return {
        "concept": {"accuracy": concept, "majority_accuracy": 0.5},
        "task": {"accuracy": task, "majority_accuracy": 0.25},
    }


@pytest.mark.parametrize(("concept", "task"), [(0.85, 0.6), (0.84, 0.6), (0.85, 0.59)])
def test_scores(concept: float, task: float) -> None:
    found = list(score_goals(scores(concept, task)))
    assert [is_met for is_met, _ in found] == [concept >= 0.85, task >= 0.6]
    assert found[1][1] == f"{100 * task:.1f}% of the labels are correct (goal 60%, the most frequent class 25.0%)"


def read_as_it_should_be() -> DecisionPathway:
    """A pathway of two words for each of the goals' concepts, of which the first carries it."""
    (pathway,) = explain(tiny_model(num_layers=1), TEXTS[:1])
    lane = pathway.concepts[0]
    lanes, words = [], []
    for name, (predicted, raises, carriers) in READ.items():
        lanes.append((name, predicted, 0.5 if raises else -0.5))
        words.append(carriers[-1])
    return dataclasses.replace(
        pathway,
        words=tuple(Word(word, 0, 1, is_read=True) for word in words),
        concepts=tuple(
            dataclasses.replace(
                lane,
                name=name,
                predicted_class=predicted,
                effect=effect,
                shows_words=True,
                word_scores=tuple(1.0 if n == k else 0.1 for n in range(len(words))),
            )
            for k, (name, predicted, effect) in enumerate(lanes)
        ),
    )


def test_readings() -> None:
    pathway = read_as_it_should_be()
    assert [is_met for is_met, _ in reading_goals(pathway)] == [True] * 6
    food, service = pathway.concepts
    wrong = {
        0: dataclasses.replace(food, predicted_class="Negative"),
        1: dataclasses.replace(food, effect=-0.1),
        2: dataclasses.replace(food, word_scores=(0.1, 1.0)),
    }
    for n, lane in wrong.items():
        found = list(reading_goals(dataclasses.replace(pathway, concepts=(lane, service))))
        assert [is_met for is_met, _ in found] == [k != n for k in range(6)]
    silent = dataclasses.replace(food, shows_words=False)
    found = list(reading_goals(dataclasses.replace(pathway, concepts=(silent, service))))
    assert found[2] == (False, "food is carried most by 'no word' (goal: food or delicious)")


def test_a_run_that_falls_short_says_so(tmp_path: Path) -> None:
    model = tiny_model(num_layers=1)
    schema = dataclasses.replace(model.schema, labels=("1", "2", "3")[: model.schema.num_labels])
    saved_model.save(dataclasses.replace(model, schema=schema), tmp_path / "model")
    (tmp_path / "metrics.json").write_text(json.dumps({"test": scores(0.4, 0.9)}))
    done = run_main("quickstart_goals.py", f"--run={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("MISSED: 40.0% of the concepts") and lines[1].startswith("met:    90.0% of the labels")
    assert len(lines) == 9 and lines[-1].endswith("of 8 goals are met. This run fell short.")
    assert "food" in TEXT
