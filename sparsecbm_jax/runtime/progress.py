"""Progress bars on a terminal, and lines in their place elsewhere."""

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


_LINE_SECONDS = 30.0


def progress(
    items: Iterable[T] | None = None, *, description: str, total: int | None = None, initial: int = 0, unit: str = "it"
) -> Any:
    """Makes a bar with rate and time left; in a file or a pipe, it prints a line every half minute instead.

    Without items, its `update(n)` moves it and its `close()` ends it.

    Args:
        items: Items to iterate over; None for a bar that is moved by hand.
        description: Words before the bar.
        total: Number of items; None takes the length of `items`.
        initial: Number of items that are done already.
        unit: Name of one item.
    """
    if sys.stderr.isatty():
        return tqdm(
            items, desc=description, total=total, initial=initial, unit=unit, mininterval=0.5, dynamic_ncols=True
        )
    return tqdm(
        items,
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        leave=False,
        mininterval=_LINE_SECONDS,
        maxinterval=2 * _LINE_SECONDS,
        miniters=1,
        delay=_LINE_SECONDS,
        ascii=True,
        position=0,  # else a bar inside another is drawn below it
        file=_LineWriter(),
    )


class _LineWriter:
    """A file that writes every state of a bar on a line of its own, to the current standard error."""

    def write(self, text: str) -> None:
        """Writes one state."""
        shown = text.strip()
        if shown:
            sys.stderr.write(f"{shown}\n")

    def flush(self) -> None:
        """Flushes standard error."""
        sys.stderr.flush()
