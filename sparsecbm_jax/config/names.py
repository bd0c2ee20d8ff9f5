"""Names that people type: their position among the valid ones, and the nearest valid one where they are misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence


def nearest_name(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the known name that `name` most likely stands for, or None where none is near.

    Case does not count. Of dotted names, the only one with the same last part is near, whatever its section.

    Args:
        name: as it was typed.
        known: the names it may stand for.
        cutoff: least similarity, in [0, 1]; among thousands of names a high one is much faster.

    >>> nearest_name('traning.batch_size', ['training.batch_size', 'training.eval_batch_size'])
    'training.batch_size'
    >>> nearest_name('learning_rate', ['optim.learning_rate', 'optim.decay'])
    'optim.learning_rate'
    """
    folded = {one.casefold(): one for one in known}
    name = name.casefold()
    same_last = [one for one in folded if one.rpartition(".")[2] == name.rpartition(".")[2]]
    if len(same_last) == 1:
        return folded[same_last[0]]
    close = difflib.get_close_matches(name, folded, n=1, cutoff=cutoff)
    return folded[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str], words: str = " (did you mean {!r}?)") -> str:
    """Return the end of a message about a misspelt name, or nothing where no known name is near.

    Args:
        name: as it was typed.
        known: the names it may stand for.
        words: of the hint, with a place for the nearest name.
    """
    near = nearest_name(name, known)
    return "" if near is None else words.format(near)


def check_name(kind: str, name: str, known: Collection[str]) -> None:
    """Check that a name is one of the known names of that kind.

    Raises:
        ValueError: if it is not; the nearest one is given.
    """
    if name not in known:
        expected = ", ".join(map(repr, known))
        raise ValueError(f"there is no {kind} {name!r}{did_you_mean(name, known)}; expected one of {expected}")


def name_index(kind: str, name: str, names: Sequence[str]) -> int:
    """Return the position of a name among the schema's `names` of that kind.

    Raises:
        ValueError: if it is not there; the nearest one is given.
    """
    check_name(kind, name, names)
    return names.index(name)
