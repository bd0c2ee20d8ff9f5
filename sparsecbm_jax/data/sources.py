"""Reading of data sets from the hub, local files or the embedded texts; mistakes are named by file, row and column."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sparsecbm_jax.config.names import did_you_mean
from sparsecbm_jax.config.run_config import DataConfig
from sparsecbm_jax.data.presets import COLUMNS, EMBEDDED, SAMPLE, SYNTHETIC, configured_schema, find_preset
from sparsecbm_jax.data.schema import (
    MISSING,
    SPLITS,
    UNKNOWN,
    DataError,
    Dataset,
    Examples,
    Respelling,
    Schema,
    cell_text,
)
from sparsecbm_jax.data.synthetic.reviews import sample_reviews, synthetic_reviews
from sparsecbm_jax.data.table_files import Row, find_files, read_rows

MAX_INFERRED = 100
SHOWN_ROWS = 10
# A class that is this many times rarer than the most frequent one may be a typing error.
_RARE = 10

logger = logging.getLogger(__name__)


class Table(NamedTuple):
    """Rows of one split as they stand in the source, and the source's name."""

    source: str
    rows: Sequence[Row]


def load_dataset(config: DataConfig) -> Dataset:
    """Reads a data set and checks that it can be trained on.

    Train rows without a task label are left out unless `config.keep_unlabelled` is set. Validation and test rows
    without one have the label -1 and count for the concepts alone. Missing concept cells become the class 'unknown' if
    `config.missing_as_unknown` is set and there is such a class.

    Raises:
        DataError: If the source contradicts the schema; the message names file, row and column.
    """
    dataset = read_dataset(config)
    check_trainable(dataset)
    return dataset


def read_dataset(config: DataConfig) -> Dataset:
    """Reads a data set as `load_dataset` does, but accepts a concept or a task with one class only.

    Raises:
        DataError: As `load_dataset`.
    """
    tables = _read_tables(config)
    for split, table in tables.items():
        if not table.rows:
            raise DataError(f"{table.source}: the {split} split has no rows; expected at least one")
    schema = configured_schema(config)
    # Before anything is said of what the columns hold.
    for table in tables.values():
        _check_columns(schema, table)
    schema = _infer_names(schema, tables["train"])
    splits, respellings, num_skipped = {}, [], {}
    for split, table in tables.items():
        examples, found = _parse(schema, split, table)
        if config.missing_as_unknown and schema.unknown_class is not None:
            concepts = np.where(examples.concepts == MISSING, schema.unknown_class, examples.concepts)
            examples = examples._replace(concepts=concepts.astype(np.int32))
        is_used = examples.labels != MISSING
        if split != "train" or config.keep_unlabelled:
            is_used[:] = True
        elif not is_used.any():
            raise DataError(
                f"{table.source}: no train row has a label in column {schema.label_column!r}; "
                "config.data.keep_unlabelled keeps such rows for the concepts alone"
            )
        splits[split] = _take(examples, is_used)
        respellings += found
        num_skipped[split] = int((~is_used).sum())
    return Dataset(
        schema=schema,
        splits=splits,
        name=_dataset_name(config),
        sources={split: table.source for split, table in tables.items()},
        respellings=tuple(respellings),
        num_skipped=num_skipped,
    )


def check_trainable(dataset: Dataset) -> None:
    """Checks that every concept and the task have at least two classes in the train split.

    Raises:
        DataError: If one has fewer; the message names the file and the column.
    """
    schema, train = dataset.schema, dataset.splits["train"]
    columns = [
        (f"concept {name!r}", column, schema.classes, train.concepts[:, k])
        for k, (name, column) in enumerate(zip(schema.concepts, schema.concept_columns, strict=True))
    ]
    columns.append(("the task", schema.label_column, schema.labels, train.labels))
    for what, column, names, values in columns:
        present = np.unique(values[values != MISSING])
        if len(present) < 2:
            only = f"is {names[present[0]]!r} in every labelled row" if len(present) else "has no label in any row"
            raise DataError(
                f"{dataset.sources.get('train', dataset.name)}: column {column!r}, {what}, {only} of the train split; "
                f"at least two of {', '.join(names)} are expected: leave it out or add rows"
            )


def _dataset_name(config: DataConfig) -> str:
    if config.preset == SAMPLE:
        return "sample (synthetic)"
    if config.preset == SYNTHETIC:
        return "synthetic reviews"
    return config.preset if config.preset != COLUMNS else str(config.path or config.name)


def _read_tables(config: DataConfig) -> dict[str, Table]:
    preset = find_preset(config)
    chosen = {s: name for s in SPLITS if (name := getattr(config, f"{s}_split"))}
    if config.preset in EMBEDDED:
        if config.path or config.name or chosen:
            raise DataError(
                f"config.data.preset = {config.preset!r} is embedded and reads nothing else, but a path, a hub name or "
                f"a split is set; choose the preset that describes it, or {COLUMNS!r} and name its columns"
            )
        reviews = sample_reviews() if config.preset == SAMPLE else synthetic_reviews()
        return {split: Table(f"{config.preset}/{split}", rows) for split, rows in reviews.items()}
    if config.path:
        files = find_files(Path(config.path), preset.files if preset else {}, chosen)
        return {split: Table(str(file), read_rows(file)) for split, file in files.items()}
    hub_name = config.name or (preset.hub_name if preset else None)
    if hub_name is None:
        expected = ", ".join(preset.files.values()) if preset else "one file for each split"
        raise DataError(
            f"config.data.path is not set, and preset {config.preset!r} has no hub name: pass the directory that holds "
            f"{expected}, or config.data.name"
        )
    hub_splits = {**(preset.hub_splits if preset else dict(zip(SPLITS, SPLITS, strict=True))), **chosen}
    return {split: _read_hub(hub_name, hub_splits[split], config) for split in SPLITS}


def _read_hub(name: str, split: str, config: DataConfig) -> Table:
    try:
        import datasets

        rows = datasets.load_dataset(name, split=split)
    # The hub's client passes on errors of every layer below it, and all of them mean the same to the caller.
    except Exception as error:
        raise DataError(
            f"cannot load split {split!r} of {name!r} from the hub ({type(error).__name__}: {error}). Check the name, "
            "the split and the network; without a network, download its files elsewhere and pass config.data.path=DIR"
        ) from error
    schema = configured_schema(config)
    needed = {schema.text_column, schema.label_column, *schema.concept_columns}
    if schema.group_column is not None:
        needed.add(schema.group_column)
    # If one is missing all columns stay, for the message that will name them.
    if needed <= set(rows.column_names):
        rows = rows.select_columns(sorted(needed))
    return Table(f"{name}/{split}", rows.to_list())


def _infer_names(schema: Schema, train: Table) -> Schema:
    if not schema.classes:
        cells = [cell for column in schema.concept_columns for cell in _cells(train, column, "concept_columns")]
        names = _distinct(cells, schema.missing, train.source, f"concept columns {schema.concept_columns}", "classes")
        schema = dataclasses.replace(schema, classes=names)
        logger.info("classes found in %s: %s", train.source, ", ".join(names))
    if not schema.labels:
        cells = _cells(train, schema.label_column, "label_column")
        names = _distinct(cells, schema.no_label, train.source, f"column {schema.label_column!r}", "labels")
        schema = dataclasses.replace(schema, labels=names)
        logger.info("labels found in %s: %s", train.source, ", ".join(names))
    return schema


def _distinct(cells: Iterable[Any], missing: Sequence[str], source: str, where: str, key: str) -> tuple[str, ...]:
    spellings: dict[str, Counter[str]] = {}
    says_nothing = {cell_text(spelling).casefold() for spelling in missing}
    for cell in map(cell_text, cells):
        if cell.casefold() not in says_nothing:
            spellings.setdefault(cell.casefold(), Counter())[cell] += 1
    if len(spellings) > MAX_INFERRED:
        raise DataError(
            f"{source}: {where} has {len(spellings)} different values, too many to be classes; is it the right column? "
            "If so, name them in config.data.classes or config.data.labels"
        )
    names = [counts.most_common(1)[0][0] for counts in spellings.values()]
    totals = {name: counts.total() for name, counts in zip(names, spellings.values(), strict=True)}
    rare = [name for name, total in totals.items() if total * _RARE < max(totals.values())]
    for name in rare:
        others = [other for other in names if other not in rare]
        logger.warning(
            "%s: %s: %r stands in %d of %d cells and is taken for one of the %s%s; to refuse it, name them in "
            "config.data.%s",
            source,
            where,
            name,
            totals[name],
            sum(totals.values()),
            key,
            did_you_mean(name, others),
            key,
        )
    return tuple(sorted(names, key=_natural))


def _natural(name: str) -> tuple[bool, bool, float, str]:
    try:
        return (False, False, float(name), name)
    except ValueError:
        return (name.casefold() == UNKNOWN, True, 0.0, name)


def _check_columns(schema: Schema, table: Table) -> None:
    """Raises DataError where a column of the schema is not in a table."""
    named = [("text_column", schema.text_column), ("label_column", schema.label_column)]
    named += [("concept_columns", column) for column in schema.concept_columns]
    if schema.group_column is not None:
        named.append(("group_column", schema.group_column))
    columns = dict.fromkeys(name for row in table.rows for name in row)
    for key, column in named:
        if column not in columns:
            raise DataError(
                f"{table.source}: no column {column!r} (config.data.{key}); it has {', '.join(map(repr, columns))}"
                f"{did_you_mean(column, columns)}"
            )


def _cells(table: Table, column: str, key: str) -> list[Any]:
    for index, row in enumerate(table.rows):
        if column not in row:
            raise DataError(
                f"{table.source}: row {index} (counted from 0) has no {column!r} (config.data.{key}) where other rows "
                "do; write null or '' for a cell that says nothing"
            )
        cell = row[column]
        if isinstance(cell, (list, dict)) or (isinstance(cell, str) and _is_broken(cell)):
            what = "not valid Unicode (a lone surrogate)" if isinstance(cell, str) else f"a {type(cell).__name__}"
            raise DataError(
                f"{table.source}: row {index} (counted from 0), column {column!r} (config.data.{key}) is {what}; "
                "expected a text, a number or nothing"
            )
    return [row[column] for row in table.rows]


def _is_broken(cell: str) -> bool:
    try:
        cell.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _parse(schema: Schema, split: str, table: Table) -> tuple[Examples, list[Respelling]]:
    texts = ["" if cell is None else str(cell) for cell in _cells(table, schema.text_column, "text_column")]
    empty = [str(index) for index, text in enumerate(texts) if not text.strip()]
    if empty:
        more = f" and {len(empty) - SHOWN_ROWS} more" if len(empty) > SHOWN_ROWS else ""
        raise DataError(
            f"{table.source}: column {schema.text_column!r} is empty in row{'s' * (len(empty) > 1)} "
            f"{', '.join(empty[:SHOWN_ROWS])}{more} (counted from 0); fill or remove them"
        )
    respellings: list[Respelling] = []
    columns = [
        _indices(table, split, column, "concept_columns", schema.classes, schema.class_spellings(), respellings)
        for column in schema.concept_columns
    ]
    labels = _indices(
        table, split, schema.label_column, "label_column", schema.labels, schema.label_spellings(), respellings
    )
    groups = None
    if schema.group_column is not None:
        cells = map(cell_text, _cells(table, schema.group_column, "group_column"))
        # A row without a group is a group of its own; such rows do not form one group.
        groups = tuple(cell or f"{table.source}#{index}" for index, cell in enumerate(cells))
    examples = Examples(
        texts=tuple(texts),
        concepts=np.stack(columns, axis=1) if columns else np.zeros((len(texts), 0), np.int32),
        labels=labels,
        groups=groups,
        row_ids=np.arange(len(texts), dtype=np.int32),
    )
    return examples, respellings


def _indices(
    table: Table,
    split: str,
    column: str,
    key: str,
    names: tuple[str, ...],
    spellings: Mapping[str, int],
    respellings: list[Respelling],
) -> Int[np.ndarray, " N"]:
    # Counted as they stand in the file: 'Negative ' with its space is a spelling of its own.
    cells = [cell if isinstance(cell, str) else cell_text(cell) for cell in _cells(table, column, key)]
    for spelling, count in sorted(Counter(cells).items()):
        index = spellings.get(spelling.strip().casefold())
        if index is None:
            known = [*names, *(s for s, i in spellings.items() if i == MISSING)]
            raise DataError(
                f"{table.source}: row {cells.index(spelling)} (counted from 0), column {column!r}: unknown spelling "
                f"{spelling!r}, {count} time{'s' * (count > 1)}; known are {', '.join(map(repr, known))}"
                f"{did_you_mean(spelling, names)}"
            )
        meaning = "missing" if index == MISSING else names[index]
        if spelling != meaning:
            respellings.append(Respelling(split, column, spelling, meaning, count))
    return np.array([spellings[cell.strip().casefold()] for cell in cells], np.int32)


def _take(examples: Examples, is_used: np.ndarray) -> Examples:
    def pick(values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(value for value, used in zip(values, is_used, strict=True) if used)

    return Examples(
        texts=pick(examples.texts),
        concepts=examples.concepts[is_used],
        labels=examples.labels[is_used],
        groups=None if examples.groups is None else pick(examples.groups),
        row_ids=examples.row_ids[is_used],
    )
