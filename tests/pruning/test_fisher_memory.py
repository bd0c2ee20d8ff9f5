"""What scoring takes stays within `fisher_memory`, measured on a process of its own."""

import os
import subprocess
import sys

MIB = 2**20
_CHILD = """
import resource

import jax
import jax.numpy as jnp
import numpy as np

from sparsecbm_jax.config.run_config import PrunerConfig
from sparsecbm_jax.pruning.woodfisher_scores import woodfisher_scores

kernel = jnp.asarray(np.random.default_rng(0).normal(size=(6, 384, 384)).astype(np.float32))
make = jax.jit(lambda shift: {"layers/kernel": jnp.roll(kernel, 1 + shift, axis=1)})


class Stream:
    def __iter__(self):
        return map(make, range(32))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


peaks = []
# The first time compiles, and holds little else.
for limit in (64, 128):
    config = PrunerConfig(num_grads=32, block_size=32, fisher_memory=limit * 2**20)
    jax.block_until_ready(woodfisher_scores({"layers/kernel": kernel}, Stream(), config=config))
    peaks.append(peak())
print(peaks[1] - peaks[0])
"""


def test_scoring_grows_the_process_by_no_more_than_its_allowance():
    # All at once would take 232 MiB by the plan. What is freed goes back, as in `launch/prune.py`.
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    command = [sys.executable, "-c", _CHILD]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | allocator)
    # Linux counts in KiB, macOS in bytes.
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert 0 <= grown < 128 * MIB, f"{grown / MIB:.0f} MiB"
