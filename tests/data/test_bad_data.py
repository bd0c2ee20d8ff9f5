"""Every mistake in a data set, a schema or a tokeniser is named by its place."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecbm_jax.config.run_config import DataConfig
from sparsecbm_jax.data.schema import DataError, Schema
from sparsecbm_jax.data.sources import check_trainable, load_dataset, read_dataset
from sparsecbm_jax.data.statistics import dataset_statistics
from sparsecbm_jax.data.tokenizers import load_tokenizer, train_wordpiece

from tests.data.test_sources import row_of, three_splits, write, write_csv, write_json, write_jsonl


# One mistake each: what is done to the folder, what is changed of the config, and what the message must say.
def _no_text_column(folder: Path) -> None:
    rows = [{"reviews" if k == "review" else k: v for k, v in row.items()} for row in three_splits()["train"]]
    write_csv(folder / "train.csv", rows)


def _unknown_spelling(folder: Path) -> None:
    rows = three_splits()["test"] + [row_of("Meh.", "1", "Postive", "Negative", "z")]
    write_csv(folder / "test_v2.csv", rows)


def _unknown_label(folder: Path) -> None:
    write_csv(folder / "test_v2.csv", [row_of("Meh.", "six", "Positive", "Negative", "z")])


def _empty_split(folder: Path) -> None:
    (folder / "reviews-dev.csv").write_text("review,stars,food,service,of\n")


def _empty_file(folder: Path) -> None:
    (folder / "reviews-dev.csv").write_text("")


def _one_class(folder: Path) -> None:
    write_csv(folder / "train.csv", [row | {"service": "Negative"} for row in three_splits()["train"]])


def _one_label(folder: Path) -> None:
    write_csv(folder / "train.csv", [row | {"stars": "5"} for row in three_splits()["train"]])


def _no_label_at_all(folder: Path) -> None:
    write_csv(folder / "train.csv", [row | {"stars": ""} for row in three_splits()["train"]])


def _missing_file(folder: Path) -> None:
    (folder / "test_v2.csv").unlink()


def _two_files(folder: Path) -> None:
    write_csv(folder / "train_more.csv", three_splits()["train"])


def _broken_jsonl(folder: Path) -> None:
    lines = [json.dumps(row) for row in three_splits()["train"]]
    (folder / "train.csv").unlink()
    (folder / "train.jsonl").write_text("\n".join([*lines[:2], "", lines[2][:-9], lines[3]]))


def _jsonl_of_lists(folder: Path) -> None:
    (folder / "train.csv").unlink()
    (folder / "train.jsonl").write_text('{"review": "x"}\n["x"]\n')


def _broken_json(folder: Path) -> None:
    (folder / "train.csv").unlink()
    (folder / "train.json").write_text(json.dumps(three_splits()["train"], indent=0)[:-20])


def _jsonl_named_json(folder: Path) -> None:
    (folder / "train.csv").unlink()
    write_jsonl(folder / "train.json", three_splits()["train"])


def _json_object(folder: Path) -> None:
    (folder / "train.csv").unlink()
    (folder / "train.json").write_text('{"rows": []}')


def _json_row_without_key(folder: Path) -> None:
    rows = three_splits()["train"]
    del rows[2]["service"]
    (folder / "train.csv").unlink()
    write_json(folder / "train.json", rows)


def _not_parquet(folder: Path) -> None:
    (folder / "train.csv").rename(folder / "train.parquet")


def _latin1(folder: Path) -> None:
    content = (folder / "reviews-dev.csv").read_text(encoding="utf-8")
    (folder / "reviews-dev.csv").write_bytes(content.encode("latin-1"))


def _unquoted_comma(folder: Path) -> None:
    with (folder / "train.csv").open("a") as file:
        file.write("Soup, good,5,Positive,Negative,q\n")


def _open_quote(folder: Path) -> None:
    with (folder / "train.csv").open("a") as file:
        file.write('"Soup,5,Positive,Negative,q\n')


def _header_twice(folder: Path) -> None:
    content = (folder / "train.csv").read_text()
    (folder / "train.csv").write_text(content.replace("stars,food", "stars,stars", 1))


def _empty_texts(folder: Path) -> None:
    rows = three_splits()["train"]
    rows[1]["review"], rows[3]["review"] = "", "  \t"
    write_csv(folder / "train.csv", rows)


def _too_many_labels(folder: Path) -> None:
    rows = [row_of(f"Text {i}.", f"{i}.5", "Positive", "Negative", str(i)) for i in range(101)]
    write_csv(folder / "train.csv", rows)


def _nothing(folder: Path) -> None:
    pass


MISTAKES: list[tuple[Callable[[Path], None], dict[str, Any], list[str]]] = [
    (_no_text_column, {}, ["train.csv", "no column 'review'", "config.data.text_column", "did you mean 'reviews'?"]),
    (_nothing, {"concept_columns": ("food", "servise")}, ["no column 'servise'", "did you mean 'service'?"]),
    (_nothing, {"group_column": "off"}, ["no column 'off'", "config.data.group_column", "did you mean 'of'?"]),
    (
        _unknown_spelling,
        {},
        ["test_v2.csv", "row 1", "'food'", "'Postive'", "'Negative', 'Positive', 'unknown', ''", "mean 'Positive'?"],
    ),
    (_unknown_label, {}, ["test_v2.csv", "row 0", "'stars'", "'six'", "known are '1', '5', ''"]),
    (_empty_split, {}, ["reviews-dev.csv", "validation split has no rows"]),
    (_empty_file, {}, ["reviews-dev.csv", "the file is empty", "expected a header"]),
    (_one_class, {}, ["train.csv", "column 'service'", "concept 'service'", "'Negative' in every labelled row"]),
    (_one_label, {"labels": ("1", "5")}, ["train.csv", "column 'stars'", "the task", "'5' in every labelled row"]),
    (_no_label_at_all, {"labels": ("1", "5")}, ["train.csv", "no train row has a label", "'stars'", "keep_unlabelled"]),
    (
        _missing_file,
        {},
        ["no file with test in its name", "test split", "config.data.test_split", "reviews-dev.csv, train.csv"],
    ),
    (_nothing, {"test_split": "test_v1.csv"}, ["no file 'test_v1.csv' (did you mean 'test_v2.csv'?)", "train.csv"]),
    (_two_files, {}, ["2 files fit (train.csv, train_more.csv)", "config.data.train_split"]),
    (_nothing, {"path": "no/such/folder"}, ["config.data.path = 'no/such/folder' does not exist; expected a folder"]),
    (_broken_jsonl, {}, ["train.jsonl", "line 4", "is not JSON"]),
    (_jsonl_of_lists, {}, ["train.jsonl", "line 2 is a list", "expected an object"]),
    (_broken_json, {}, ["train.json", "line 27", "is not JSON"]),
    (_jsonl_named_json, {}, ["train.json", "line 2", "name the file .jsonl"]),
    (_json_object, {}, ["train.json", "holds one dict", "expected an array"]),
    (_json_row_without_key, {}, ["train.json", "row 2", "no 'service'", "null"]),
    (_not_parquet, {}, ["train.parquet", "not a readable Parquet file"]),
    (_latin1, {}, ["reviews-dev.csv", "line 3 is not UTF-8", "0xfc", "iconv"]),
    (_unquoted_comma, {}, ["train.csv", "row 4", "line 7", "6 cells", "header 5", "quotes"]),
    (_open_quote, {}, ["train.csv", "row 4", "unexpected end of data"]),
    (_header_twice, {}, ["train.csv", "['stars'] more than once"]),
    (_empty_texts, {}, ["train.csv", "'review' is empty in rows 1, 3", "counted from 0"]),
    (_too_many_labels, {}, ["train.csv", "'stars' has 101 different values", "config.data.labels"]),
    (_nothing, {"preset": "cebap"}, ["config.data.preset = 'cebap'", "did you mean 'cebab'?", "imdb_c_manual"]),
    (_nothing, {"text_column": None, "label_column": None}, ["config.data.text_column, config.data.label_column"]),
    (_nothing, {"path": None}, ["config.data.path is not set", "one file for each split"]),
    (_nothing, {"path": None, "preset": "imdb_c_manual"}, ["no hub name", "IMDB-dev-manual.csv"]),
    (_nothing, {"preset": "sample"}, ["'sample' is embedded", "'columns'"]),
]


@pytest.mark.parametrize(
    ("spoil", "changes", "parts"), MISTAKES, ids=[f"{i}{spoil.__name__}" for i, (spoil, _, _) in enumerate(MISTAKES)]
)
def test_mistakes_are_named(
    tmp_path: Path, spoil: Callable[[Path], None], changes: dict[str, Any], parts: list[str]
) -> None:
    config = dataclasses.replace(write(tmp_path), **changes)
    spoil(tmp_path)
    with pytest.raises(DataError) as caught:
        load_dataset(config)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message


def test_one_class_is_no_mistake_to_the_statistics(tmp_path: Path) -> None:
    config = write(tmp_path)
    _one_class(tmp_path)
    dataset = read_dataset(config)
    assert dataset_statistics(dataset)["concepts"]["service"]["train"]["Negative"] == 3
    with pytest.raises(DataError, match="at least two of"):
        check_trainable(dataset)


def test_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"(?s)'train_exclusive' of 'CEBaB/CEBaB'.*no route.*config\.data\.path=DIR"):
        load_dataset(DataConfig(preset="cebab"))


@pytest.mark.parametrize(("cell", "what"), [(["a"], "a list"), ({"k": 1}, "a dict"), ("\ud800", "a lone surrogate")])
def test_cells_that_are_no_text_are_named(cell: Any, what: str, tmp_path: Path) -> None:
    config, splits = write(tmp_path), three_splits()
    splits["train"][1]["review"] = cell
    (tmp_path / "train.csv").unlink()
    write_json(tmp_path / "train.json", splits["train"])
    with pytest.raises(DataError, match=rf"row 1 .*'review'.*{what}"):
        load_dataset(config)


def test_a_tokenisers_own_code_is_not_run(tmp_path: Path) -> None:
    train_wordpiece(["a b", "a b"]).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text("raise SystemExit('the code of the folder was run')")
    with pytest.raises(DataError, match="no tokeniser at"):
        load_tokenizer(tmp_path)


def test_names_that_cannot_be_printed_are_refused() -> None:
    with pytest.raises(DataError, match="cannot be printed"):
        Schema(("fo\x1b[31mod",), ("1", "2"), "text", "stars", ("food",))


def test_a_tokeniser_needs_a_pad_token(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(["the soup was good"] * 2)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(str(tmp_path / "no_pad"))
    with pytest.raises(DataError, match=r"no_pad' has no pad token.*save_pretrained"):
        load_tokenizer(tmp_path / "no_pad")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("nothing here")
    with pytest.raises(DataError, match=r"no tokeniser at .*it holds readme\.txt"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(DataError, match="no directory here, and the hub did not return it"):
        load_tokenizer("no-such/tokeniser")
