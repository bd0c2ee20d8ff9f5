"""The embedded reviews: CEBaB's schema, the same everywhere, siblings that differ in one aspect, readable sentences."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from sparsecbm_jax.config.run_config import DataConfig
from sparsecbm_jax.data.presets import PRESETS
from sparsecbm_jax.data.sources import load_dataset
from sparsecbm_jax.data.statistics import shared_values
from sparsecbm_jax.data.synthetic.lexicon import ASPECTS, PLAIN_ADJECTIVES
from sparsecbm_jax.data.synthetic.reviews import (
    LARGE_SIZES,
    MAX_WORDS,
    MIN_PLAIN_WORDS,
    NO_MAJORITY,
    SIZES,
    sample_reviews,
    synthetic_reviews,
)

Rows = list[dict[str, str]]

# Figures of the documentation are of these very reviews: the first of the tutorials, the second of the quickstart.
FINGERPRINT = "e71cdaf836416503"
LARGE_FINGERPRINT = "7622455ad1a02c3f"


@pytest.fixture(scope="module")
def reviews() -> dict[str, Rows]:
    return sample_reviews()


def test_sizes_and_columns(reviews: dict[str, Rows]) -> None:
    assert (
        {split: len(rows) for split, rows in reviews.items()} == SIZES == {"train": 320, "validation": 120, "test": 160}
    )
    schema = PRESETS["sample"].schema
    assert schema == PRESETS["cebab"].schema
    columns = {schema.text_column, schema.label_column, schema.group_column, schema.id_column, *schema.concept_columns}
    assert all(columns <= row.keys() for rows in reviews.values() for row in rows)


def test_same_seed_same_reviews(reviews: dict[str, Rows]) -> None:
    assert hashlib.sha256(json.dumps(reviews).encode()).hexdigest()[:16] == FINGERPRINT
    assert sample_reviews(1)["train"][0] != reviews["train"][0]


def test_groups_and_texts_stay_within_their_split(reviews: dict[str, Rows]) -> None:
    for column in ("original_id", "description", "id"):
        shared = shared_values({split: [row[column] for row in rows] for split, rows in reviews.items()})
        assert all(pair["values"] == 0 for pair in shared.values()), column
    texts = [row["description"] for rows in reviews.values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_siblings_differ_in_the_edited_aspect_alone(reviews: dict[str, Rows]) -> None:
    num_siblings = 0
    for rows in reviews.values():
        groups = defaultdict(list)
        for row in rows:
            groups[row["original_id"]].append(row)
        for original, *edits in groups.values():
            assert original["is_original"] == "True" and original["edit_type"] == ""
            for edit in edits:
                num_siblings += 1
                assert edit["description"] != original["description"]
                for aspect in ASPECTS:
                    cells = [row[f"{aspect}_aspect_majority"] for row in (original, edit)]
                    if aspect == edit["edit_type"]:
                        assert cells[1] in (edit["edit_goal"], NO_MAJORITY, "")
                    elif NO_MAJORITY not in cells:
                        assert cells[0] == cells[1]
    assert num_siblings > 250


def test_lengths_vary_between_5_and_50_words(reviews: dict[str, Rows]) -> None:
    lengths = [len(row["description"].split()) for rows in reviews.values() for row in rows]
    assert min(lengths) >= 5 and max(lengths) <= 50 and np.std(lengths) > 8


def test_every_kind_of_cell_occurs(reviews: dict[str, Rows]) -> None:
    for aspect in ASPECTS:
        cells = Counter(row[f"{aspect}_aspect_majority"] for row in reviews["train"])
        assert set(cells) == {"Negative", "Positive", "unknown", "", NO_MAJORITY}
        assert cells[NO_MAJORITY] < 15
    assert set(Counter(row["review_majority"] for row in reviews["train"])) == {*"12345", NO_MAJORITY}
    assert {row["review_majority"] for row in reviews["test"]} == set("12345")


def test_sentiment_is_mixed_negated_and_contrasted(reviews: dict[str, Rows]) -> None:
    rows = [row for split in reviews.values() for row in split]
    mixed = [
        row for row in rows if {"Negative", "Positive"} <= {row[f"{aspect}_aspect_majority"] for aspect in ASPECTS}
    ]
    assert len(mixed) > 0.4 * len(rows)
    for pattern, share in (
        ("not .* at all|anything but|far from|nobody could call|I would not call", 0.2),
        (r"\bbut\b", 0.2),
    ):
        assert sum(bool(re.search(pattern, row["description"])) for row in rows) > share * len(rows), pattern


def test_text_is_well_formed(reviews: dict[str, Rows]) -> None:
    for row in (row for rows in reviews.values() for row in rows):
        text = row["description"]
        assert not re.search(r"[{}|*+]|  | ,|\.\.", text), text
        assert text.endswith(".") and all(part[0].isupper() for part in text.split(". ")), text
        assert not re.search(r"\b(\w+) (and )?\1\b", text), text


@pytest.mark.parametrize("concept", [0, 1, 2, 3])
def test_majority_baseline_leaves_room(concept: int) -> None:
    dataset = load_dataset(DataConfig(preset="sample"))
    assert dataset.name == "sample (synthetic)"
    counts = np.bincount(dataset.splits["test"].concepts[:, concept], minlength=3)
    assert counts.min() > 0.15 * counts.sum() and counts.max() < 0.6 * counts.sum()


def test_the_large_set_is_the_same_everywhere() -> None:
    large = synthetic_reviews()
    assert hashlib.sha256(json.dumps(large).encode()).hexdigest()[:16] == LARGE_FINGERPRINT
    assert {split: len(rows) for split, rows in large.items()} == LARGE_SIZES
    for column in ("original_id", "description", "id"):
        shared = shared_values({split: [row[column] for row in rows] for split, rows in large.items()})
        assert all(pair["values"] == 0 for pair in shared.values()), column
    texts = [row["description"] for rows in large.values() for row in rows]
    lengths = np.array([len(text.split()) for text in texts])
    assert len(set(texts)) == len(texts) and lengths.min() >= MIN_PLAIN_WORDS and lengths.max() <= MAX_WORDS
    assert 0.25 < (lengths <= 12).mean() < 0.6, "short texts beside long ones"
    labels = Counter(row["review_majority"] for row in large["test"])
    assert max(labels.values()) < 0.4 * LARGE_SIZES["test"]


def test_plain_texts_say_what_their_cells_say() -> None:
    rows = [row for row in synthetic_reviews()["test"] if len(row["description"].split()) <= 5]
    assert len(rows) > 30
    for row in rows:
        cells = {aspect: row[f"{aspect}_aspect_majority"] for aspect in ASPECTS}
        said = [aspect for aspect, cell in cells.items() if cell in ("Negative", "Positive")]
        assert said, row["description"]
        if len(said) == 1 and " not " not in row["description"]:
            words, state = row["description"].lower().rstrip("."), int(cells[said[0]] == "Positive")
            own = (*ASPECTS[said[0]].adjectives[state], *ASPECTS[said[0]].strong[state])
            assert any(word in words for word in (*own, *PLAIN_ADJECTIVES[said[0]][state])), words
