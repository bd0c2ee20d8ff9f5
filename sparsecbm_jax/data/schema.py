"""The schema of a data set: its concepts, their classes, the task's labels, and the spellings of each.

A cell of a table is a class, a label, *missing* (no annotator said), or a mistake. A schema decides which; all later
code has integers, with -1 for missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sparsecbm_jax.config.names import did_you_mean

MISSING = -1
UNKNOWN = "unknown"
SPLITS = ("train", "validation", "test")


class DataError(ValueError):
    """Input data that cannot be used as it stands; the message names the file, the row and the column."""


def cell_text(value: Any) -> str:
    """Returns a cell as text without surrounding space, whatever type the file format gave it.

    >>> [cell_text(v) for v in (' Negative ', None, 3, 4.0, float('nan'))]
    ['Negative', '', '3', '4', '']
    """
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


@dataclasses.dataclass(frozen=True)
class Schema:
    """The columns, concepts, classes and labels of a data set.

    Spellings are compared without surrounding space and without regard to case.

    Args:
        concepts: Names of the K concepts.
        labels: Names of the Y task labels, in the order of their indices.
        text_column: Column that holds the text.
        label_column: Column that holds the task label.
        concept_columns: Column of each concept; K of them.
        classes: Names of the C classes that every concept shares, in the order of their indices.
        missing: Spellings of a concept cell without any annotation; a text that does not mention the concept has the
            class 'unknown' instead.
        aliases: Pairs (spelling, class or label) for stray spellings.
        no_label: Spellings of a label cell without a task label.
        group_column: Column whose equal values mark rows that belong together, such as edits of one text.
        id_column: Column with a name for each row.

    Raises:
        DataError: If the fields contradict each other.
    """

    concepts: tuple[str, ...]
    labels: tuple[str, ...]
    text_column: str
    label_column: str
    concept_columns: tuple[str, ...]
    classes: tuple[str, ...] = ("Negative", "Positive", UNKNOWN)
    missing: tuple[str, ...] = ("",)
    aliases: tuple[tuple[str, str], ...] = ()
    no_label: tuple[str, ...] = ("",)
    group_column: str | None = None
    id_column: str | None = None

    def __post_init__(self) -> None:
        if len(self.concepts) != len(self.concept_columns):
            raise DataError(
                f"{len(self.concepts)} concepts {self.concepts} for {len(self.concept_columns)} concept columns "
                f"{self.concept_columns}: one column per concept is expected"
            )
        for what, names in (("concepts", self.concepts), ("labels", self.labels), ("classes", self.classes)):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise DataError(f"{what} named twice: {twice}")
            unprintable = [name for name in names if not name.isprintable()]
            if unprintable:
                raise DataError(f"{what}: {unprintable} hold characters that cannot be printed")
        for spelling, target in self.aliases:
            if target not in self.classes + self.labels:
                raise DataError(
                    f"alias {spelling!r} stands for {target!r}, which is no class {self.classes} and no label "
                    f"{self.labels}{did_you_mean(target, self.classes + self.labels)}"
                )

    @property
    def num_concepts(self) -> int:
        """Number of concepts, K."""
        return len(self.concepts)

    @property
    def num_classes(self) -> int:
        """Number of classes of a concept, C."""
        return len(self.classes)

    @property
    def num_labels(self) -> int:
        """Number of task labels, Y."""
        return len(self.labels)

    @property
    def unknown_class(self) -> int | None:
        """Index of the class 'unknown', or None where the classes have none."""
        return self.classes.index(UNKNOWN) if UNKNOWN in self.classes else None

    def class_spellings(self) -> dict[str, int]:
        """Returns every accepted spelling of a concept cell, case folded, with its class (-1 for missing)."""
        return _spellings(self.classes, self.aliases, self.missing)

    def label_spellings(self) -> dict[str, int]:
        """Returns every accepted spelling of a label cell, case folded, with its label (-1 for none)."""
        return _spellings(self.labels, self.aliases, self.no_label)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data that JSON can hold."""
        return {
            name: [list(v) if isinstance(v, tuple) else v for v in value] if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Schema:
        """Makes a schema from plain data: the inverse of `to_dict`.

        Raises:
            DataError: If a field is missing or unknown.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise DataError(f"schema has no field {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}")
        absent = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
        if absent:
            raise DataError(f"schema lacks {', '.join(absent)}; it has {', '.join(fields) or 'nothing'}")
        return cls(**{name: _as_tuple(value) for name, value in fields.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


def _spellings(
    names: tuple[str, ...], aliases: tuple[tuple[str, str], ...], missing: tuple[str, ...]
) -> dict[str, int]:
    spellings = {cell_text(spelling).casefold(): MISSING for spelling in missing}
    spellings |= {cell_text(a).casefold(): names.index(target) for a, target in aliases if target in names}
    return spellings | {name.casefold(): index for index, name in enumerate(names)}


class Examples(NamedTuple):
    """The rows of one split, in memory.

    `row_ids` are positions in the source, counted from 0 without a header, so that a row can be found again.
    """

    texts: tuple[str, ...]
    concepts: Int[np.ndarray, "N K"]
    labels: Int[np.ndarray, " N"]
    groups: tuple[str, ...] | None
    row_ids: Int[np.ndarray, " N"]


class Respelling(NamedTuple):
    """A spelling in the source that is not the name of its class, the class that it stands for, and its count."""

    split: str
    column: str
    spelling: str
    meaning: str
    num_rows: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three splits that share a schema.

    Args:
        schema: Meaning of the integers.
        splits: Examples of 'train', 'validation' and 'test'.
        name: The data set's name in reports.
        sources: File, hub split or description that each split was read from.
        respellings: Every spelling that the loader did not find word for word in the schema.
        num_skipped: Number of rows of each split that were left out because they have no task label.
    """

    schema: Schema
    splits: dict[str, Examples]
    name: str
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    respellings: tuple[Respelling, ...] = ()
    num_skipped: dict[str, int] = dataclasses.field(default_factory=dict)

    def describe(self) -> str:
        """Returns rows, concepts, classes and labels, in a line."""
        rows = ", ".join(f"{len(examples.texts)} {split}" for split, examples in self.splits.items())
        return (
            f"{self.name}: {rows} rows; concepts {', '.join(self.schema.concepts)} of classes "
            f"{', '.join(self.schema.classes)}; labels {', '.join(self.schema.labels)}"
        )
