"""Common functions of the parts of `benchmarks/device.py`: a random model, and facts of the device and the compiler.

Every part makes a random model and calls the functions that training, pruning and intervening call. It prints each
result at once, and returns all of them as JSON. Peaks of memory are those of the process, so each part needs a process
of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparsecbm_jax import backbones
from sparsecbm_jax.config.run_config import RunConfig
from sparsecbm_jax.core.masks import Masks
from sparsecbm_jax.core.trees import Params, leaf_at
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.pruning.schedule import final_sparsity
from sparsecbm_jax.runtime.accelerators import Accelerator, accelerator_of_kind

GB = 1e9


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


class Compiler:
    """A counter of the seconds of XLA's compiler, so that they can be reported apart.

    Attributes:
        seconds: Seconds so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration_secs


def about_device() -> dict[str, Any]:
    """Returns kind, memory in bytes (None on CPU) and library of the local device."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {"device_kind": device.device_kind, "bytes_limit": stats.get("bytes_limit"), "jax": jax.__version__}


def peak_bytes() -> int | None:
    """Returns the most bytes of the device in use at once by this process; None where the device does not say (CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def available_chip() -> Accelerator | None:
    """Returns the local device's peaks; None where they are not known."""
    return accelerator_of_kind(jax.devices()[0].device_kind)


def in_gb(size: float | None) -> str:
    """Formats bytes in GB."""
    return "not reported by this device" if size is None else f"{size / GB:.2f} GB"


def share_of(amount: float, seconds: float, peak: float | None) -> float | None:
    """Computes a rate as a share of its peak; None where the peak is not known."""
    return None if peak is None else amount / seconds / peak


def percent(share: float | None) -> str:
    """Formats a share of a peak in percent."""
    return "peak of this device not known" if share is None else f"{share:.1%} of the peak"


def wanted_bytes(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Returns the bytes that the compiler assigns a program, by kind; 'peak' is the most at once."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    kinds = ("argument", "output", "temp", "alias")
    sizes = {kind: int(getattr(memory, f"{kind}_size_in_bytes")) for kind in kinds}
    # Outputs are written over donated arguments.
    return sizes | {"peak": sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]}


def attempt(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns a measurement's result, or its error: one that has too little memory does not stop the others."""
    try:
        return measure()
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        say(f"{name}: failed: {first}")
        return {"error": first}


def random_batch(config: CBMConfig, rows: int, length: int, seed: int) -> Batch:
    """Makes rows of random tokens without padding, every cell and row labelled."""
    rng, backbone = np.random.default_rng(seed), config.backbone
    # The first few ids stand for padding and the like.
    return Batch(
        rng.integers(4, backbone.vocab_size, (rows, length), np.int32),
        np.ones((rows, length), np.int32),
        rng.integers(0, config.num_classes, (rows, config.num_concepts), np.int32),
        rng.integers(0, config.num_labels, rows, np.int32),
        np.ones(rows, np.float32),
        np.arange(rows, dtype=np.int32),
    )


def init(config: CBMConfig, dtype: str, rng: jax.Array) -> Params:
    """Makes the weights of `random_params`, to be traced."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), backbones.init_params(rng, config.backbone))


def random_params(config: CBMConfig, dtype: str = "float32") -> Params:
    """Makes the weights of a fresh backbone, as float32 or rounded to another type."""
    return jax.jit(functools.partial(init, config, dtype))(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_mask(key: jax.Array, shape: tuple[int, ...], density: float) -> jax.Array:
    # A kernel at a time: random bits of all would take four times the memory of the masks.
    *stacked, inputs, outputs = shape
    keys = jax.random.split(key, math.prod(stacked))
    return jax.lax.map(lambda one: jax.random.bernoulli(one, density, (inputs, outputs)), keys).reshape(shape)


def random_masks(config: CBMConfig, params: Params, density: float) -> Masks:
    """Makes boolean masks that keep about a share `density` of the weights."""
    paths, k = backbones.maskable_paths(config.backbone), config.num_concepts
    keys = jax.random.split(jax.random.key(1), len(paths))
    shapes = {path: (k, *leaf_at(params, path).shape) for path in paths}
    return {path: _random_mask(key, shapes[path], density) for path, key in zip(paths, keys, strict=True)}


def density_of(run: RunConfig, config: CBMConfig) -> float:
    """Returns the share of the weights that a subnetwork keeps in the end, 1/K unless the run sets another."""
    return 1 - final_sparsity(run.sparsity, config.num_concepts)[0]
