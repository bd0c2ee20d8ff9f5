"""Measures the host's memory while a large checkpoint is converted, and loaded onto eight devices.

python launch/benchmarks/loading.py --workdir=runs/loading        # OPT-1.3B: 5.3 GB on the disk, 6 GB of memory

Makes a random checkpoint of the shape of --backbone as PyTorch writes it, in float16 and in files of at most --shard_gb
(extra torch; --format=safetensors does not need it), converts it to safetensors, and loads these onto a mesh of eight
virtual CPU devices, whose arrays lie in the host's memory, too. Each step runs in a process of its own. The host's need
is the largest growth of its memory, less the arrays. Pages of the checkpoint's files, which the system drops when
memory is short, are not counted; nor is the import of torch. Linux only.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
import typing
from collections.abc import Callable
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line

if typing.TYPE_CHECKING:
    from sparsecbm_jax.backbones import BackboneConfig

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("backbone", "facebook/opt-1.3b", "Backbone whose shape the checkpoint has.")
flags.DEFINE_string("workdir", None, "Folder to write the checkpoint to, which is deleted in the end.")
flags.DEFINE_enum("format", "bin", ["bin", "safetensors"], "Format of the checkpoint before it is converted.")
flags.DEFINE_float("shard_gb", 1.0, "Largest file, in units of 10^9 bytes.", lower_bound=1e-6)
flags.DEFINE_integer("fsdp", 8, "Devices that parameters are spread over.", lower_bound=1)
flags.DEFINE_integer("tensor", 1, "Devices that heads and hidden units are spread over.", lower_bound=1)

_GB = 1e9
T = typing.TypeVar("T")


class Measured(typing.NamedTuple):
    """Measurements of one step, in bytes.

    Attributes:
        arrays: Arrays of all devices.
        largest: Largest tensor of the checkpoint, in the precision that it is read to.
        growth: Largest growth of the process's memory.
        seconds: Duration in seconds.
    """

    arrays: int
    largest: int
    growth: int
    seconds: float

    def __str__(self) -> str:
        rest = self.growth - self.arrays
        with_arrays = f"{self.growth / _GB:.2f} GB: without the arrays by " if self.arrays else ""
        of_largest = f"{rest / self.largest:.2f} times the largest tensor ({self.largest / _GB:.2f} GB)"
        return f"the host's memory grew by at most {with_arrays}{rest / _GB:.2f} GB, {of_largest}"


def main() -> None:
    """Runs the command; see the docstring of this file."""
    if not FLAGS.workdir:
        raise ValueError("--workdir is missing; expected a folder to write the checkpoint to")
    source, converted = (Path(FLAGS.workdir) / name for name in ("source", "converted"))
    try:
        # A process for each step, so that none starts with another's memory.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            on_disk = pool.apply(make, (source, FLAGS.backbone, FLAGS.format, int(FLAGS.shard_gb * _GB)))
            print(f"{FLAGS.backbone}: {on_disk / _GB:.2f} GB of {FLAGS.format} on the disk", flush=True)
            found = pool.apply(convert, (source, converted))
            print(f"converted in {found.seconds:.0f} s: {found}", flush=True)
            found = pool.apply(load, (converted, FLAGS.fsdp, FLAGS.tensor))
            mesh = f"fsdp {FLAGS.fsdp} x tensor {FLAGS.tensor}"
            print(f"loaded in {found.seconds:.0f} s to arrays of {found.arrays / _GB:.2f} GB, {mesh}: {found}")
    finally:
        for folder in (source, converted):
            shutil.rmtree(folder, ignore_errors=True)


def make(folder: Path, backbone: str, kind: str, max_bytes: int) -> int:
    """Writes a random checkpoint, file by file; returns its bytes."""
    import numpy as np
    from safetensors.numpy import save_file

    from sparsecbm_jax.backbones import config_to_hf, published_config
    from sparsecbm_jax.backbones.tensor_names import tensor_names

    config, rng = published_config(backbone), np.random.default_rng(0)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)), encoding="utf-8")
    stem, suffix = {"bin": ("pytorch_model", "bin"), "safetensors": ("model", "safetensors")}[kind]
    weight_map: dict[str, str] = {}
    tensors: dict[str, np.ndarray] = {}

    def flush() -> None:
        name = f"{stem}-{len(set(weight_map.values())) + 1:05d}.{suffix}"
        if kind == "bin":
            import torch

            torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, folder / name)
        else:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        tensors.clear()

    shapes = _shapes(config)
    for tensor in tensor_names(config):
        shape = shapes[tensor.path][tensor.is_stacked :]
        for name in tensor.names:
            values = rng.integers(-8, 8, shape[::-1] if tensor.is_transposed else shape, np.int8).astype(np.float16)
            if sum(value.nbytes for value in tensors.values()) + values.nbytes > max_bytes and tensors:
                flush()
            tensors[f"model.decoder.{name}"] = values
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.glob(f"*.{suffix}"))


def _shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    import jax
    from flax import traverse_util

    from sparsecbm_jax.backbones import init_params

    tree = jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def convert(source: Path, target: Path) -> Measured:
    """Converts a checkpoint to safetensors."""
    from sparsecbm_jax import backbones

    if importlib.util.find_spec("torch"):
        importlib.import_module("torch")
    _, growth, seconds = _watched(lambda: backbones.convert(source, target))
    return Measured(0, _largest(target, 2), growth, seconds)


def load(folder: Path, fsdp: int, tensor: int) -> Measured:
    """Loads a checkpoint onto a mesh, in float32."""
    import jax

    jax.config.update("jax_num_cpu_devices", fsdp * tensor)

    from sparsecbm_jax import backbones
    from sparsecbm_jax.core import sharding

    mesh = sharding.make_mesh(fsdp=fsdp, tensor=tensor)

    def shardings(tree: typing.Any) -> typing.Any:
        return sharding.shardings(mesh, sharding.param_specs(tree))

    (_, params), growth, seconds = _watched(lambda: backbones.load_pretrained(folder, shardings=shardings))
    leaves = jax.tree.leaves(params)
    arrays = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    return Measured(arrays, _largest(folder, 4), growth, seconds)


def _largest(folder: Path, itemsize: int) -> int:
    from sparsecbm_jax.backbones.checkpoint_readers import open_checkpoint

    return itemsize * max(math.prod(shape) for shape in open_checkpoint(folder).shapes.values())


def _watched(function: Callable[[], T]) -> tuple[T, int, float]:
    """Runs a function; returns its result, the largest growth of this process's memory meanwhile, and the seconds."""
    from sparsecbm_jax.runtime import memory

    memory.give_back_freed()
    before, started = _held(), time.monotonic()
    peak, is_done = [before], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.005):
            peak.append(max(peak.pop(), _held()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = function()
    finally:
        is_done.set()
        watcher.join()
    return result, max(*peak, _held()) - before, time.monotonic() - started


def _held() -> int:
    """Returns the bytes of this process that lie in memory and belong to no file."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon; expected Linux")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    command_line.run(main, keeps_memory=False)
