"""The data sets known by name: their columns, classes and files, and the changes that a config makes to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from sparsecbm_jax.config.names import did_you_mean
from sparsecbm_jax.config.run_config import DataConfig
from sparsecbm_jax.data.schema import SPLITS, DataError, Schema

COLUMNS = "columns"
SAMPLE = "sample"
SYNTHETIC = "synthetic"
EMBEDDED = (SAMPLE, SYNTHETIC)


class Preset(NamedTuple):
    """A known data set: its schema, its files in a directory, and its name and splits on the hub if it has any."""

    schema: Schema
    files: Mapping[str, str]
    hub_name: str | None = None
    hub_splits: Mapping[str, str] = dict(zip(SPLITS, SPLITS, strict=True))


_CEBAB = Schema(
    concepts=("food", "ambiance", "service", "noise"),
    labels=("1", "2", "3", "4", "5"),
    text_column="description",
    label_column="review_majority",
    concept_columns=tuple(f"{c}_aspect_majority" for c in ("food", "ambiance", "service", "noise")),
    missing=("", "no majority"),
    no_label=("", "no majority"),
    group_column="original_id",
    id_column="id",
)

# The files have nine machine-labelled columns; ten concepts take the first six of them. The other three are nearly
# constant over all 5,113 rows: parking has 31 cells that are not 'unknown', wi-fi 20, kids-friendly 131.
_AUGMENTED = ("cleanliness", "price", "location", "menu variety", "waiting time", "waiting area")

# The files have four more columns (soundtrack, directing, background setting, editing); the paper uses these four.
_IMDB_CONCEPTS = ("acting", "storyline", "emotional arousal", "cinematography")
_IMDB = Schema(
    concepts=_IMDB_CONCEPTS,
    labels=("Negative", "Positive"),
    text_column="review",
    label_column="sentiment",
    concept_columns=_IMDB_CONCEPTS,
    aliases=(("Unkown", "unknown"),),
)


def _imdb_files(kind: str) -> dict[str, str]:
    return {s: f"IMDB-{name}-{kind}.csv" for s, name in zip(SPLITS, ("train", "dev", "test"), strict=True)}


PRESETS: Mapping[str, Preset] = {
    SAMPLE: Preset(_CEBAB, files={}),
    SYNTHETIC: Preset(_CEBAB, files={}),
    "cebab": Preset(
        _CEBAB,
        files={"train": "train_exclusive.json", "validation": "dev.json", "test": "test.json"},
        hub_name="CEBaB/CEBaB",
        hub_splits={"train": "train_exclusive", "validation": "validation", "test": "test"},
    ),
    "cebab_augmented": Preset(
        dataclasses.replace(
            _CEBAB,
            concepts=_CEBAB.concepts + _AUGMENTED,
            concept_columns=_CEBAB.concept_columns + _AUGMENTED,
            group_column=None,
            id_column=None,
        ),
        files={
            s: f"{name}_cebab_new_concept_single.csv" for s, name in zip(SPLITS, ("train", "dev", "test"), strict=True)
        },
    ),
    "imdb_c_manual": Preset(_IMDB, files=_imdb_files("manual")),
    "imdb_c_generated": Preset(_IMDB, files=_imdb_files("generated")),
}


def find_preset(config: DataConfig) -> Preset | None:
    """Returns the preset that `config.preset` names, or None for 'columns': a table described by the config alone.

    Raises:
        DataError: If there is no such preset.
    """
    if config.preset == COLUMNS:
        return None
    if config.preset not in PRESETS:
        known = [*PRESETS, COLUMNS]
        raise DataError(
            f"config.data.preset = {config.preset!r} is none of {', '.join(known)}{did_you_mean(config.preset, known)}"
        )
    return PRESETS[config.preset]


def configured_schema(config: DataConfig) -> Schema:
    """Returns the schema that the config describes; classes and labels are empty where they are to be inferred.

    With a preset, a column that the config names replaces the preset's column; `concepts` alone selects some of the
    preset's concepts.

    Raises:
        DataError: If a required key is missing.
    """
    preset = find_preset(config)
    if preset is None:
        absent = [
            f"config.data.{key}"
            for key in ("text_column", "label_column", "concept_columns")
            if not getattr(config, key)
        ]
        if absent:
            raise DataError(f"preset {COLUMNS!r} describes a table by its columns, but {', '.join(absent)} is not set")
        base = Schema((), (), str(config.text_column), str(config.label_column), (), classes=())
    else:
        base = preset.schema
    changes = {
        key: value
        for key in ("text_column", "label_column", "classes", "labels", "group_column")
        if (value := getattr(config, key))
    }
    if config.concept_columns:
        changes["concept_columns"] = config.concept_columns
        changes["concepts"] = config.concepts or config.concept_columns
    elif config.concepts:
        columns = dict(zip(base.concepts, base.concept_columns, strict=True))
        for concept in config.concepts:
            if concept not in columns:
                raise DataError(
                    f"config.data.concepts: {concept!r} is no concept of preset {config.preset!r}; it has "
                    f"{', '.join(columns)}{did_you_mean(concept, columns)}"
                )
        changes["concepts"] = config.concepts
        changes["concept_columns"] = tuple(columns[c] for c in config.concepts)
    if changes.get("classes") or changes.get("labels"):
        # Aliases of a preset do not apply to classes that the config names itself.
        names = (changes.get("classes") or base.classes) + (changes.get("labels") or base.labels)
        changes["aliases"] = tuple(alias for alias in base.aliases if alias[1] in names)
    return dataclasses.replace(base, **changes)
