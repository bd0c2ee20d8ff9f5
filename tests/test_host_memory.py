"""What is freed is kept or given back, as was said, for the whole process or for a while."""

import subprocess
import sys

import pytest

MIB = 2**20
_CHILD = """
import ctypes

from sparsecbm_jax import host_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


def held():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def held_after_freeing(start, last_stays):
    blocks = [libc.malloc(2**20) for _ in range(100)]
    for block in blocks:
        ctypes.memset(block, 1, 2**20)
    # With the last block in use nothing can be cut off the end of the heap.
    for block in blocks[: -1 if last_stays else None]:
        libc.free(block)
    return held() - start


start = held()
with host_memory.giving_back():
    pass
host_memory.keep_freed()
kept = held_after_freeing(start, last_stays=False)
with host_memory.giving_back():
    before = held() - start
    within = held_after_freeing(start, last_stays=True)
again = held_after_freeing(start, last_stays=False)
print(kept, before, within, again)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="speaks to glibc")
def test_freed_memory_is_kept_or_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True)
    kept, before, within, again = map(int, done.stdout.split())
    assert kept > 90 * MIB and again > 90 * MIB
    assert before < 10 * MIB and within < 12 * MIB
