"""Schemas, sources and statistics: every format gives the same data. Mistakes are the matter of test_bad_data."""

from __future__ import annotations

import csv
import dataclasses
import doctest
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsecbm_jax.config.run_config import DataConfig
from sparsecbm_jax.data.presets import PRESETS, configured_schema
from sparsecbm_jax.data.schema import DataError, Schema
from sparsecbm_jax.data.sources import load_dataset, read_dataset
from sparsecbm_jax.data.statistics import dataset_statistics, render_statistics
from sparsecbm_jax.data.table_files import find_files

Rows = list[dict[str, Any]]

COLUMNS = DataConfig(
    preset="columns",
    text_column="review",
    label_column="stars",
    concept_columns=("food", "service"),
    group_column="of",
)
FILE_NAMES = {"train": "train", "validation": "reviews-dev", "test": "test_v2"}


def row_of(text: str, stars: Any, food: str, service: str, of: str) -> dict[str, Any]:
    return {"review": text, "stars": stars, "food": food, "service": service, "of": of}


def three_splits() -> dict[str, Rows]:
    return {
        "train": [
            row_of("Good soup, kind waiter.", "5", "Positive", "Positive", "a"),
            row_of('He said "no",\nthen left.', "1", "", "Negative ", "b"),
            row_of("Nothing to say.", "", "unknown", "positive", "c"),
            row_of("Bad soup, slow waiter.", "1", "Negative", "Negative", "a"),
        ],
        "validation": [
            row_of("Fine.", "", "Positive", "", "d"),
            row_of("Fine ünd dandy.", "5", "Positive", "unknown", "e"),
        ],
        "test": [row_of("Never again.", "1", "Negative", "Negative", "f")],
    }


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    # Parquet has numbers and nulls where text formats have spellings.
    typed = [row | {"stars": float(row["stars"]) if row["stars"] else None} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(typed), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "csv": write_csv,
    "json": write_json,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


def write(folder: Path, splits: dict[str, Rows] | None = None, suffix: str = "csv") -> DataConfig:
    for split, rows in (splits or three_splits()).items():
        WRITERS[suffix](folder / f"{FILE_NAMES[split]}.{suffix}", rows)
    return dataclasses.replace(COLUMNS, path=str(folder))


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_data(tmp_path: Path, suffix: str) -> None:
    dataset = load_dataset(write(tmp_path, suffix=suffix))
    assert dataset.schema.classes == ("Negative", "Positive", "unknown")
    assert dataset.schema.labels == ("1", "5")
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    assert train.texts == ("Good soup, kind waiter.", 'He said "no",\nthen left.', "Bad soup, slow waiter.")
    np.testing.assert_array_equal(train.concepts, [[1, 1], [2, 0], [0, 0]])
    np.testing.assert_array_equal(train.labels, [1, 0, 0])
    np.testing.assert_array_equal(train.row_ids, [0, 1, 3])
    assert train.groups == ("a", "b", "a")
    assert validation.texts[1] == "Fine ünd dandy."
    np.testing.assert_array_equal(validation.labels, [-1, 1])
    np.testing.assert_array_equal(validation.concepts, [[1, 2], [1, 2]])
    assert dataset.num_skipped == {"train": 1, "validation": 0, "test": 0}
    assert dataset.sources["train"] == str(tmp_path / f"train.{suffix}")


def test_missing_cells_and_unlabelled_rows_are_kept_on_demand(tmp_path: Path) -> None:
    config = dataclasses.replace(write(tmp_path), missing_as_unknown=False, keep_unlabelled=True)
    train = load_dataset(config).splits["train"]
    np.testing.assert_array_equal(train.concepts, [[1, 1], [-1, 0], [2, 1], [0, 0]])
    np.testing.assert_array_equal(train.labels, [1, 0, -1, 0])
    assert train.concepts.dtype == train.labels.dtype == np.int32


def test_missing_stays_missing_without_a_class_unknown(tmp_path: Path) -> None:
    rows = {split: [row for row in rows if "unknown" not in row.values()] for split, rows in three_splits().items()}
    rows["train"].append(row_of("Kind waiter.", "5", "Negative", "Positive", "g"))
    dataset = load_dataset(write(tmp_path, rows))
    assert dataset.schema.classes == ("Negative", "Positive")
    assert dataset.splits["train"].concepts[1, 0] == -1


def test_every_other_spelling_is_reported(tmp_path: Path) -> None:
    dataset = read_dataset(write(tmp_path))
    assert [tuple(r) for r in dataset.respellings if r.split == "train"] == [
        ("train", "food", "", "missing", 1),
        ("train", "service", "Negative ", "Negative", 1),
        ("train", "service", "positive", "Positive", 1),
        ("train", "stars", "", "missing", 1),
    ]


def test_names_given_are_not_inferred(tmp_path: Path) -> None:
    config = write(tmp_path)
    config = dataclasses.replace(
        config, classes=("unknown", "Positive", "Negative"), labels=("5", "1"), concepts=("kitchen", "waiters")
    )
    dataset = load_dataset(config)
    assert dataset.schema.concepts == ("kitchen", "waiters")
    np.testing.assert_array_equal(dataset.splits["train"].labels, [0, 1, 1])
    np.testing.assert_array_equal(dataset.splits["train"].concepts[0], [1, 1])


def test_inferred_numbers_are_in_their_order(tmp_path: Path) -> None:
    splits = three_splits()
    splits["train"] += [
        row_of("Ten.", "10", "Negative", "Positive", "g"),
        row_of("Two.", "2", "Negative", "Positive", "h"),
    ]
    assert load_dataset(write(tmp_path, splits)).schema.labels == ("1", "2", "5", "10")


def test_a_rare_class_is_doubted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = three_splits()
    splits["train"] += [row_of(f"{i}.", "5", "Negative", "Positive", f"g{i}") for i in range(20)]
    splits["train"] += [row_of("Slip.", "5", "Pozitive", "Positive", "slip")]
    dataset = load_dataset(write(tmp_path, splits))
    assert "'Pozitive' stands in 1 of" in caplog.text and "did you mean 'Positive'?" in caplog.text
    assert "config.data.classes" in caplog.text and "'5'" not in caplog.text
    assert "of classes Negative, Positive, Pozitive" in dataset.describe()


def test_splits_can_be_named(tmp_path: Path) -> None:
    config = write(tmp_path)
    (tmp_path / "test_v2.csv").rename(tmp_path / "held-out.csv")
    assert len(load_dataset(dataclasses.replace(config, test_split="held-out")).splits["test"].texts) == 1
    (tmp_path / "test_a.csv").write_bytes((tmp_path / "train.csv").read_bytes())
    with_a_file = dataclasses.replace(config, path=str(tmp_path / "train.csv"), test_split="held-out.csv")
    assert load_dataset(with_a_file).splits["test"].texts == ("Never again.",)


def test_a_single_file_takes_the_place_of_the_presets(tmp_path: Path) -> None:
    for name in ("train_exclusive", "train_inclusive", "dev", "test"):
        (tmp_path / f"{name}.json").write_text("[]")
    preset = {"train": "train_exclusive.json", "validation": "dev.json", "test": "test.json"}
    assert find_files(tmp_path / "train_inclusive.json", preset)["train"].name == "train_inclusive.json"
    chosen = find_files(tmp_path / "train_inclusive.json", preset, {"train": "train_exclusive"})
    assert chosen["train"].name == "train_exclusive.json"


def test_hub_rows_are_read_like_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list([row | {"more": {"x": 1}} for row in three_splits()[split]])

    monkeypatch.setattr(datasets, "load_dataset", load)
    dataset = load_dataset(dataclasses.replace(COLUMNS, name="someone/reviews"))
    assert asked == [("someone/reviews", split) for split in ("train", "validation", "test")]
    assert dataset.splits["train"].groups == ("a", "b", "a")
    assert dataset.sources["test"] == "someone/reviews/test"
    with pytest.raises(DataError, match=r"someone/reviews/train: no column 'reviw'.*'more'.*did you mean 'review'"):
        load_dataset(dataclasses.replace(COLUMNS, name="someone/reviews", text_column="reviw"))


@pytest.mark.parametrize("name", PRESETS)
def test_schemas_survive_json(name: str) -> None:
    schema = PRESETS[name].schema
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    assert (schema.num_classes, schema.unknown_class) == (3, 2)
    assert schema.num_concepts == (10 if name == "cebab_augmented" else 4)


def test_impossible_schemas_are_refused() -> None:
    fields = PRESETS["cebab"].schema.to_dict()
    for changes, message in (
        ({"concept_columns": ["a"]}, "4 concepts .* for 1 concept columns"),
        ({"classes": ["x", "x"]}, r"classes named twice: \['x'\]"),
        ({"aliases": [["Negtive", "Negativ"]]}, "alias 'Negtive' .* did you mean 'Negative'"),
        ({"conceptz": []}, "no field 'conceptz' .did you mean 'concepts'"),
    ):
        with pytest.raises(DataError, match=message.replace(" .* did", ".*did")):
            Schema.from_dict(fields | changes)
    del fields["text_column"]
    with pytest.raises(DataError, match="lacks text_column"):
        Schema.from_dict(fields)


def test_a_config_changes_a_preset() -> None:
    schema = configured_schema(DataConfig(preset="cebab", concepts=("noise", "food"), labels=("1", "5")))
    assert schema.concept_columns == ("noise_aspect_majority", "food_aspect_majority")
    assert schema.labels == ("1", "5") and schema.text_column == "description"
    with pytest.raises(DataError, match=r"'nois' is no concept of preset 'cebab'.*did you mean 'noise'"):
        configured_schema(DataConfig(preset="cebab", concepts=("nois",)))
    renamed = configured_schema(DataConfig(preset="imdb_c_manual", classes=("Negative", "Positive")))
    assert renamed.aliases == ()


def test_statistics_find_duplicates_and_leaks(tmp_path: Path) -> None:
    splits = three_splits()
    splits["test"] += [
        row_of("FINE.", "5", "Positive", "Negative", "a"),
        row_of("fine. ", "5", "Positive", "Negative", "i"),
    ]
    config = dataclasses.replace(write(tmp_path, splits), missing_as_unknown=False, keep_unlabelled=True)
    statistics = dataset_statistics(read_dataset(config), count_tokens=lambda texts: [len(t) for t in texts])
    assert statistics["rows"] == {"train": 4, "validation": 2, "test": 3}
    assert statistics["concepts"]["food"]["all"] == {"Negative": 2, "Positive": 5, "unknown": 1, "missing": 1}
    assert statistics["labels"]["train"] == {"1": 2, "5": 1, "missing": 1}
    assert statistics["missing_share"] == {"train": 0.125, "validation": 0.25, "test": 0.0}
    assert statistics["duplicates"]["within"] == {"train": 0, "validation": 0, "test": 1}
    assert statistics["duplicates"]["across"]["validation/test"] == {"values": 1, "validation_rows": 1, "test_rows": 2}
    assert statistics["leakage"]["train/test"] == {"values": 1, "train_rows": 2, "test_rows": 1}
    assert statistics["lengths"]["tokens"]["test"]["max"] == 12.0
    json.dumps(statistics)
    text = render_statistics(statistics)
    for line in (
        "food     all         2 (22.2 %)   5 (55.6 %)   2 (22.2 %)   1",
        "train       service  'Negative '  Negative   1",
        "within test: 1 row\n",
        "train/test: 1 group, 2 and 1 rows",
    ):
        assert line in text, text


def test_statistics_without_groups(tmp_path: Path) -> None:
    config = dataclasses.replace(write(tmp_path), group_column=None)
    assert "no group column" in render_statistics(dataset_statistics(read_dataset(config)))


@pytest.mark.parametrize("name", ["schema", "batches", "statistics"])
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"sparsecbm_jax.data.{name}"))
    assert result.attempted and not result.failed


def _raw(preset: str, folder: Path) -> dict[str, Any]:
    config = DataConfig(preset=preset, path=str(folder), missing_as_unknown=False, keep_unlabelled=True)
    return dataset_statistics(read_dataset(config))


def _table_1(statistics: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    counts = {name: by_split["all"] for name, by_split in statistics["concepts"].items()}
    return {name: (c["Negative"], c["Positive"], c["unknown"] + c["missing"]) for name, c in counts.items()}


def test_cebab_counts(cebab_dir: Path) -> None:
    statistics = _raw("cebab", cebab_dir)
    assert statistics["rows"] == {"train": 1755, "validation": 1673, "test": 1689}
    assert statistics["labels"]["train"]["missing"] == 292
    assert _table_1(statistics) == {
        "food": (1694, 2088, 1335),
        "ambiance": (787, 994, 3336),
        "service": (1249, 1397, 2471),
        "noise": (645, 442, 4030),
    }
    assert round(statistics["missing_share"]["test"], 2) == 0.27
    assert all(pair["values"] == 0 for pair in statistics["leakage"].values())
    dataset = load_dataset(DataConfig(preset="cebab", path=str(cebab_dir)))
    assert len(dataset.splits["train"].texts) == 1463 and dataset.num_skipped["train"] == 292
    test = dataset.splits["test"]
    assert test.groups is not None and len(set(test.groups)) == 272
    majority = [np.bincount(column).max() for column in test.concepts.T]
    assert round(100 * sum(majority) / test.concepts.size, 1) == 59.2
    assert round(100 * majority[3] / len(test.texts), 1) == 78.6
    assert round(100 * np.bincount(test.labels).max() / len(test.labels), 1) == 27.3


def test_cebab_train_split_can_be_the_inclusive_one(cebab_dir: Path) -> None:
    config = DataConfig(preset="cebab", path=str(cebab_dir), train_split="train_inclusive")
    assert len(load_dataset(config).splits["train"].texts) > 1463


def test_imdb_c_counts(imdb_c_dir: Path) -> None:
    statistics = _raw("imdb_c_manual", imdb_c_dir)
    assert statistics["rows"] == {"train": 150, "validation": 25, "test": 25}
    assert _table_1(statistics) == {
        "acting": (58, 66, 76),
        "storyline": (80, 43, 77),
        "emotional arousal": (73, 53, 74),
        "cinematography": (39, 43, 118),
    }
    assert [tuple(r.values()) for r in statistics["respellings"]] == [
        ("test", "acting", "Negative ", "Negative", 3),
        ("test", "storyline", "Unkown", "unknown", 1),
    ]
    generated = _raw("imdb_c_generated", imdb_c_dir)
    assert generated["rows"] == {"train": 2000, "validation": 500, "test": 500}
    assert generated["respellings"] == []


def test_augmented_cebab_counts_are_those_of_table_1(cebab_augmented_dir: Path) -> None:
    statistics = _raw("cebab_augmented", cebab_augmented_dir)
    assert statistics["rows"] == {"train": 1755, "validation": 1673, "test": 1685}
    counts = _table_1(statistics)
    assert list(counts)[4:] == ["cleanliness", "price", "location", "menu variety", "waiting time", "waiting area"]
    # The paper's Table 1 was counted on these files, which have four rows fewer than the published test split.
    assert list(counts.values())[:4] == [(1693, 2087, 1333), (787, 994, 3332), (1249, 1397, 2467), (645, 442, 4026)]
    assert load_dataset(DataConfig(preset="cebab_augmented", path=str(cebab_augmented_dir))).schema.num_concepts == 10
