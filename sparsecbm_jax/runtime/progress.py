"""Progress bars, and lines in their place where nobody watches."""

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


_LINE_SECONDS = 30.0


def progress(
    items: Iterable[T] | None = None, *, description: str, total: int | None = None, initial: int = 0, unit: str = "it"
) -> Any:
    """A bar with rate and time left; in a file or a pipe, a line every half minute instead of a redrawn one.

    Without items, it is moved by its `update(n)` and ended by its `close()`.
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
        position=0,  # a bar inside another would be drawn below it
        file=_LineWriter(),
    )


class _LineWriter:
    """Gives every state of a bar a line of its own, on what is standard error by then."""

    def write(self, text: str) -> None:
        shown = text.strip()
        if shown:
            sys.stderr.write(f"{shown}\n")

    def flush(self) -> None:
        sys.stderr.flush()
