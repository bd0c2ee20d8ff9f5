"""Statistics of a data set: the counts of the paper's Table 1, missing cells, duplicate texts, and leakage."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from sparsecbm_jax.data.schema import MISSING, SPLITS, Dataset

ALL = "all"


def dataset_statistics(dataset: Dataset, count_tokens: Callable[[Sequence[str]], Sequence[int]] | None = None) -> dict:
    """Returns all statistics of a data set as plain data.

    Missing cells are counted as such, so read the data set with `missing_as_unknown = False` and, to see every row,
    with `keep_unlabelled = True`.

    Args:
        dataset: The data set, as `read_dataset` returns it.
        count_tokens: Maps texts to their numbers of tokens; None gives lengths in words alone.
    """
    schema, splits = dataset.schema, {split: dataset.splits[split] for split in SPLITS}
    texts = {split: examples.texts for split, examples in splits.items()}
    lengths = {"words": {split: length_summary([len(t.split()) for t in texts[split]]) for split in SPLITS}}
    if count_tokens is not None:
        lengths["tokens"] = {split: length_summary(count_tokens(texts[split])) for split in SPLITS}
    labels = {split: class_counts(examples.labels, schema.labels) for split, examples in splits.items()}
    concepts = {
        name: _with_total({split: class_counts(e.concepts[:, k], schema.classes) for split, e in splits.items()})
        for k, name in enumerate(schema.concepts)
    }
    groups = {split: examples.groups for split, examples in splits.items()}
    return {
        "name": dataset.name,
        "sources": dict(dataset.sources),
        "rows": {split: len(examples.texts) for split, examples in splits.items()},
        "skipped": dict(dataset.num_skipped),
        "labels": _with_total(labels),
        "concepts": concepts,
        "missing_share": {
            split: float(np.mean(examples.concepts == MISSING)) if examples.concepts.size else 0.0
            for split, examples in splits.items()
        },
        "respellings": [respelling._asdict() for respelling in dataset.respellings],
        "duplicates": {
            "within": {split: num_repeated(texts[split]) for split in SPLITS},
            "across": shared_values({split: [_fold(t) for t in texts[split]] for split in SPLITS}),
        },
        "leakage": None
        if None in groups.values()
        else shared_values({s: g for s, g in groups.items() if g is not None}),
        "lengths": lengths,
    }


def class_counts(values: Int[np.ndarray, " N"], names: Sequence[str]) -> dict[str, int]:
    """Counts the occurrences of each class, and the missing values.

    >>> class_counts(np.array([0, 1, 1, -1]), ("Negative", "Positive"))
    {'Negative': 1, 'Positive': 2, 'missing': 1}
    """
    counts = {name: int(np.sum(values == index)) for index, name in enumerate(names)}
    return counts | {"missing": int(np.sum(values == MISSING))}


def num_repeated(texts: Sequence[str]) -> int:
    """Counts the texts that repeat an earlier one, without regard to case and spacing.

    >>> num_repeated(["Nice soup.", "nice  soup.", "Bad soup."])
    1
    """
    return len(texts) - len({_fold(text) for text in texts})


def shared_values(splits: dict[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    """Counts, for each pair of splits, the values that both have and the rows of each that have such a value.

    >>> shared_values({"train": ["a", "a", "b"], "test": ["a", "c"]})
    {'train/test': {'values': 1, 'train_rows': 2, 'test_rows': 1}}
    """
    shared = {}
    for first, second in itertools.combinations(splits, 2):
        both = set(splits[first]) & set(splits[second])
        shared[f"{first}/{second}"] = {
            "values": len(both),
            f"{first}_rows": sum(value in both for value in splits[first]),
            f"{second}_rows": sum(value in both for value in splits[second]),
        }
    return shared


def length_summary(lengths: Sequence[int]) -> dict[str, float]:
    """Computes minimum, mean, median, 95th percentile and maximum.

    >>> length_summary([1, 2, 3, 10])
    {'min': 1.0, 'mean': 4.0, 'median': 2.5, 'p95': 8.95, 'max': 10.0}
    """
    values = np.asarray(lengths)
    figures = (values.min(), values.mean(), np.median(values), np.percentile(values, 95), values.max())
    return {name: round(float(v), 4) for name, v in zip(("min", "mean", "median", "p95", "max"), figures, strict=True)}


def render_statistics(statistics: dict[str, Any]) -> str:
    """Renders the result of `dataset_statistics` as tables for a terminal."""
    splits = list(statistics["rows"])
    lines = [f"Data set {statistics['name']}", ""]
    rows = [
        [s, n, statistics["skipped"].get(s, 0), statistics["sources"].get(s, "")] for s, n in statistics["rows"].items()
    ]
    lines += _table(["split", "rows", "left out", "source"], rows)

    lines += ["", "Task labels"]
    names = list(statistics["labels"][ALL])
    lines += _table(["split", *names], [[s, *map(_share_of(c), c.values())] for s, c in statistics["labels"].items()])

    lines += ["", "Concepts (a missing cell counts as 'unknown' in the paper's Table 1, and by default in training)"]
    rows = []
    for concept, by_split in statistics["concepts"].items():
        for split, counts in by_split.items():
            by_class = _as_unknown(counts)
            rows.append([concept, split, *map(_share_of(by_class), by_class.values()), counts["missing"]])
            concept = ""
    classes = list(_as_unknown(next(iter(statistics["concepts"].values()))[ALL])) if statistics["concepts"] else []
    lines += _table(["concept", "split", *classes, "of it missing"], rows)
    shares = ", ".join(f"{split} {100 * share:.1f} %" for split, share in statistics["missing_share"].items())
    lines += [f"Missing concept cells: {shares}"]

    lines += ["", "Spellings that were normalised"]
    rows = [
        [r["split"], r["column"], repr(r["spelling"]), r["meaning"], r["num_rows"]] for r in statistics["respellings"]
    ]
    lines += _table(["split", "column", "spelling", "taken for", "rows"], rows) if rows else ["none"]

    lines += ["", "Duplicate texts (case and spacing aside)"]
    lines += [f"within {s}: {n} row{'s' * (n != 1)}" for s, n in statistics["duplicates"]["within"].items()]
    lines += _shared_lines(statistics["duplicates"]["across"], "text")
    lines += ["", "Leakage by group (rows whose group is also in another split)"]
    leakage = statistics["leakage"]
    lines += ["no group column, so leakage is not known"] if leakage is None else _shared_lines(leakage, "group")

    for unit, by_split in statistics["lengths"].items():
        lines += ["", f"Length in {unit}"]
        heads = ["split", *next(iter(by_split.values()))]
        lines += _table(heads, [[split, *(f"{v:.1f}" for v in by_split[split].values())] for split in splits])
    return "\n".join(lines)


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


def _with_total(by_split: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    total: Counter[str] = Counter()
    for counts in by_split.values():
        total.update(counts)
    return {ALL: {name: total[name] for name in next(iter(by_split.values()))}, **by_split}


def _as_unknown(counts: dict[str, int]) -> dict[str, int]:
    if "unknown" not in counts:
        return counts
    known = {name: count for name, count in counts.items() if name != "missing"}
    return known | {"unknown": counts["unknown"] + counts["missing"]}


def _share_of(counts: dict[str, int]) -> Callable[[int], str]:
    total = max(sum(counts.values()), 1)
    return lambda count: f"{count} ({100 * count / total:.1f} %)"


def _shared_lines(shared: dict[str, dict[str, int]], what: str) -> list[str]:
    lines = []
    for pair, counts in shared.items():
        first, second = pair.split("/")
        values = f"{counts['values']} {what}{'s' * (counts['values'] != 1)}"
        lines.append(f"{pair}: {values}, {counts[f'{first}_rows']} and {counts[f'{second}_rows']} rows")
    return lines


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [list(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]
