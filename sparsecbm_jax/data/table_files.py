"""Local files: the file of each split, and rows from JSON, JSONL, CSV or Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsecbm_jax.config.names import did_you_mean
from sparsecbm_jax.data.schema import SPLITS, DataError
from sparsecbm_jax.runtime.json_files import read_json, read_json_lines, read_text

Row = dict[str, Any]

SPLIT_WORDS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def find_files(path: Path, named: Mapping[str, str], chosen: Mapping[str, str] | None = None) -> dict[str, Path]:
    """Returns the file of each split.

    Args:
        path: A directory with a file for each split, or one of those files. Its name tells the split; a name that tells
            none stands for train.
        named: File names, with or without suffix, of the splits that are known by name. For every other split, the file
            whose name holds the split as a word ('reviews-dev.csv'; validation, valid, val and dev are one).
        chosen: Names that take precedence over `named`, and over the file that `path` may be.

    Raises:
        DataError: If there is no such path, or not exactly one file for a split; the message lists the files.
    """
    if not path.exists():
        raise DataError(
            f"config.data.path = {str(path)!r} does not exist; expected a folder with a file for each split (train, "
            f"validation and test in their names; {', '.join(READERS)}), or one of these files"
        )
    named = dict(named)
    if path.is_file():
        own = [split for split, words in SPLIT_WORDS.items() if _split_words(path.stem) & set(words)]
        named[own[0] if len(own) == 1 else "train"] = path.name
        path = path.parent
    named.update(chosen or {})
    held = sorted(p.name for p in path.iterdir() if p.suffix.lower() in READERS)
    found = {}
    for split in SPLITS:
        name = named.get(split)
        if name is not None:
            matches = [n for n in held if name in (n, Path(n).stem)]
            expected = f"file {name!r}{did_you_mean(name, held)}"
        else:
            matches = [n for n in held if _split_words(Path(n).stem) & set(SPLIT_WORDS[split])]
            expected = f"file with {' or '.join(SPLIT_WORDS[split])} in its name"
        if len(matches) != 1:
            what = f"{len(matches)} files fit ({', '.join(matches)})" if matches else f"no {expected}"
            raise DataError(
                f"{path}: {what} for the {split} split; name one with config.data.{split}_split. "
                f"The directory holds {', '.join(held) or 'no ' + ', '.join(READERS)}"
            )
        found[split] = path / matches[0]
    return found


def read_rows(path: Path) -> list[Row]:
    """Reads a file's rows as dicts from column to cell.

    Raises:
        DataError: If the file's format is not that of its suffix, the file is not UTF-8, or a row has other columns
            than the header.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read {path.suffix!r}; expected one of {', '.join(READERS)}")
    return reader(path)


def _split_words(stem: str) -> set[str]:
    return set(re.split(r"[^a-z]+", stem.lower()))


def _read_json(path: Path) -> list[Row]:
    expected = "an array of objects, one for each row (where every line is an object of its own, name the file .jsonl)"
    rows = read_json(path, expected, error=DataError)
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds one {type(rows).__name__}; expected {expected}")
    return [_as_row(f"{path}: row {i}", row) for i, row in enumerate(rows)]


def _read_jsonl(path: Path) -> list[Row]:
    lines = read_json_lines(path, "an object on each line", is_by_hand=True, error=DataError)
    return [_as_row(where, value) for where, value in lines]


def _as_row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}; expected an object with a key for each column")
    return value


def _read_csv(path: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(read_text(path, "a table", error=DataError), newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        if not any(header):
            what = "the first line" if path.stat().st_size else "the file"
            raise DataError(f"{path}: {what} is empty; expected a header with a name for each column")
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"{path}: the header names {twice} more than once")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}: row {len(rows)} (to line {reader.line_num}) has {len(cells)} cells, the header "
                    f"{len(header)}; text with commas or line breaks needs double quotes"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}: row {len(rows)} (near line {reader.line_num}): {error}") from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
