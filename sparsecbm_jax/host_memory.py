"""What the C library does with memory that is freed on the host, where XLA computes on CPU.

XLA allocates all temporaries of a program anew for every call. A training step repeats one program: memory given back
in between costs page faults in every step. Pruning runs programs of many sizes: what is kept in between is full of
holes, several times what is in use. So training keeps freed memory, and pruning gives it back.

Only glibc is spoken to; with another C library nothing happens. Reference: mallopt(3), malloc_trim(3).
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_NEVER_TRIMMED, _DEFAULT_MMAP_MAX, _LARGE = -1, 2**16, 2**18
_is_kept = False


def keep_freed() -> None:
    """Keeps the memory that is freed for the next allocation. Call before JAX starts its threads."""
    global _is_kept
    # One arena for all threads, no mapping apart for large blocks, no trimming.
    _mallopt({_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER_TRIMMED})
    _is_kept = True


def give_back_freed() -> None:
    """Gives large blocks back to the system as soon as they are freed. Call before JAX starts its threads.

    By default glibc learns to keep ever larger ones, in an arena for every thread.
    """
    global _is_kept
    _mallopt({_ARENA_MAX: 1, _MMAP_MAX: _DEFAULT_MMAP_MAX, _MMAP_THRESHOLD: _LARGE})
    _is_kept = False


@contextlib.contextmanager
def giving_back() -> Iterator[None]:
    """Gives freed memory back for a while, if it is kept otherwise; what was kept until now is given back first."""
    if not _is_kept:
        yield
        return
    _trim()
    give_back_freed()
    try:
        yield
    finally:
        _trim()
        keep_freed()


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _mallopt(settings: dict[int, int]) -> None:
    if (mallopt := _glibc("mallopt")) is not None:
        for parameter, value in settings.items():
            mallopt(parameter, value)


def _trim() -> None:
    if (malloc_trim := _glibc("malloc_trim")) is not None:
        malloc_trim(0)
