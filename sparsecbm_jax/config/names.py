"""Names that people type: their position among the valid ones, and the nearest valid one where they are misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def or_known(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def nearest_name(name: str, valid: Iterable[str]) -> str | None:
    """Returns the valid name that `name` most likely stands for, or None where none is near.

    For dotted keys the right last part in the wrong section counts as near.

    >>> nearest_name('traning.batch_size', key_names())
    'training.batch_size'
    >>> nearest_name('learning_rate', key_names())
    'optim.learning_rate'
    """
    names = list(valid)
    last = name.rpartition(".")[2]
    same_last = [n for n in names if n.rpartition(".")[2] == last]
    close = difflib.get_close_matches(name, same_last or names, n=1, cutoff=0.0 if same_last else 0.5)
    return close[0] if close else None


def name_index(kind: str, name: str, names: Sequence[str]) -> int:
    """Position of a name among the schema's `names` of that kind.

    Raises:
        ValueError: if it is not there; the nearest one is given.
    """
    if name not in names:
        expected = ", ".join(map(repr, names))
        raise ValueError(f"there is no {kind} {name!r}{did_you_mean(name, names)}; expected one of {expected}")
    return list(names).index(name)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `" (did you mean 'x'?)"` for the nearest known name, or nothing where none is near."""
    folded = {k.casefold(): k for k in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return f" (did you mean {folded[close[0]]!r}?)" if close else ""
