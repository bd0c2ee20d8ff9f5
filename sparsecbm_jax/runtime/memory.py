"""Memory that is freed on the host, where XLA computes on CPU: the C library keeps it or returns it to the system.

XLA allocates all temporaries of a program again for every call. A training step repeats one program: memory returned
in between costs page faults in every step. Pruning runs programs of many sizes: memory that stays in between is
fragmented, and takes several times the bytes in use. So training keeps freed memory, while there is enough, and pruning
returns it.

Settings are made for glibc alone; with another C library the functions change nothing.

Reference: mallopt(3), malloc_trim(3); proc(5) for the memory of a process, and the kernel's `cgroup-v2` documentation
for that of a container.
"""

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_NEVER_TRIMMED, _DEFAULT_MMAP_MAX, _LARGE = -1, 2**16, 2**18
# Share of the machine's memory that a process may hold before it returns freed memory.
_MOST = 0.5
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_is_kept = False


def keep_freed() -> None:
    """Keeps the memory that is freed for the next allocation. Call before JAX starts its threads."""
    global _is_kept
    # One arena for all threads, no separate mapping for large blocks, no trimming.
    _mallopt({_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER_TRIMMED})
    _is_kept = True


def give_back_freed() -> None:
    """Returns large blocks to the system as soon as they are freed. Call before JAX starts its threads.

    By default glibc learns to keep ever larger blocks, in an arena for every thread.
    """
    global _is_kept
    _mallopt({_ARENA_MAX: 1, _MMAP_MAX: _DEFAULT_MMAP_MAX, _MMAP_THRESHOLD: _LARGE})
    _is_kept = False


@contextlib.contextmanager
def giving_back() -> Iterator[None]:
    """Returns freed memory to the system within the context, if it stays otherwise; trims memory first and last."""
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


def stops_keeping() -> bool:
    """Returns freed memory from now on if the process holds half of the machine's memory; True if that begins now."""
    held = resident()
    if not _is_kept or not held or held <= _MOST * available():
        return False
    _trim()
    give_back_freed()
    return True


def resident() -> int:
    """Returns the bytes of memory that this process has now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def available() -> int:
    """Returns the bytes of memory that the machine has, or that the container may have, free or not."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in map(Path, _LIMITS):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            found.append(int(limit.read_text()))
    return min(found)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _mallopt(settings: dict[int, int]) -> None:
    if (mallopt := _glibc("mallopt")) is not None:
        for parameter, value in settings.items():
            mallopt(parameter, value)


def _trim() -> None:
    if (malloc_trim := _glibc("malloc_trim")) is not None:
        malloc_trim(0)


def peak_memory() -> int:
    """Returns the most bytes in use at once so far: on the first device, or on CPU in this process."""
    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return stats["peak_bytes_in_use"]
