"""What is freed is kept or given back, as was said, for the whole process or for a while."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparsecbm_jax.runtime import memory

MIB = 2**20
_CHILD = """
import ctypes

from sparsecbm_jax.runtime import memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


held = memory.resident


def held_after_freeing(start, last_stays):
    blocks = [libc.malloc(2**20) for _ in range(100)]
    for block in blocks:
        ctypes.memset(block, 1, 2**20)
    # With the last block in use nothing can be cut off the end of the heap.
    for block in blocks[: -1 if last_stays else None]:
        libc.free(block)
    return held() - start


start = held()
with memory.giving_back():
    pass
memory.keep_freed()
kept = held_after_freeing(start, last_stays=False)
with memory.giving_back():
    before = held() - start
    within = held_after_freeing(start, last_stays=True)
again = held_after_freeing(start, last_stays=False)
assert not memory.stops_keeping()
memory.available = held
stopped = memory.stops_keeping() and not memory.stops_keeping()
after = held_after_freeing(start, last_stays=True)
print(kept, before, within, again, int(stopped), after)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="speaks to glibc")
def test_freed_memory_is_kept_or_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True)
    kept, before, within, again, has_stopped, after = map(int, done.stdout.split())
    assert kept > 90 * MIB and again > 90 * MIB
    assert before < 10 * MIB and within < 12 * MIB
    assert has_stopped and after < 12 * MIB


def test_a_container_has_what_it_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, none = tmp_path / "memory.max", tmp_path / "missing"
    monkeypatch.setattr(memory, "_LIMITS", (none, limit))
    limit.write_text("max\n")
    whole = memory.available()
    assert whole > 100 * MIB
    limit.write_text(f"{64 * MIB}\n")
    assert memory.available() == 64 * MIB
    limit.write_text(f"{2 * whole}\n")
    assert memory.available() == whole
