"""Measures the host's memory while a large checkpoint is loaded onto eight devices.

python launch/benchmark_loading.py --workdir=runs/loading                 # OPT-1.3B: 2.6 GB on the disk, 8 GB of memory

Makes a random checkpoint of the shape of --backbone, in float16 and in files of at most --shard_gb, and loads it in
another process onto a mesh of eight virtual CPU devices, whose arrays lie in the host's memory, too. What the host
needs beside the arrays is the largest growth of its memory less the arrays. Pages of the checkpoint's files are not
counted, which the system drops where it needs room. Linux only.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
import typing
from pathlib import Path

import command_line
from absl import flags

if typing.TYPE_CHECKING:
    from sparsecbm_jax.backbones import BackboneConfig

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("backbone", "facebook/opt-1.3b", "Whose shape the checkpoint has.")
flags.DEFINE_string("workdir", None, "Folder to write the checkpoint to, which is deleted in the end.")
flags.DEFINE_float("shard_gb", 1.0, "Largest file, in units of 10^9 bytes.", lower_bound=1e-6)
flags.DEFINE_integer("fsdp", 8, "Devices that parameters are spread over.", lower_bound=1)
flags.DEFINE_integer("tensor", 1, "Devices that heads and hidden units are spread over.", lower_bound=1)

_GB = 1e9


class Measured(typing.NamedTuple):
    """In bytes.

    Attributes:
        arrays: of all devices.
        largest: the largest tensor of the checkpoint, as float32.
        growth: the most that the process held more than before.
        seconds: that loading took.
    """

    arrays: int
    largest: int
    growth: int
    seconds: float


def main() -> None:
    if not FLAGS.workdir:
        raise ValueError("--workdir is missing; expected a folder to write the checkpoint to")
    folder = Path(FLAGS.workdir) / "checkpoint"
    spawning = multiprocessing.get_context("spawn")
    try:
        with spawning.Pool(1, maxtasksperchild=1) as pool:
            on_disk = pool.apply(make, (folder, FLAGS.backbone, int(FLAGS.shard_gb * _GB)))
            # In a process of its own, whose memory making the checkpoint has not touched.
            found = pool.apply(load, (folder, FLAGS.fsdp, FLAGS.tensor))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    beside = found.growth - found.arrays
    devices = f"{FLAGS.fsdp * FLAGS.tensor} devices (fsdp {FLAGS.fsdp} x tensor {FLAGS.tensor})"
    print(
        f"{FLAGS.backbone}: {on_disk / _GB:.2f} GB on the disk, loaded in {found.seconds:.0f} s to arrays of "
        f"{found.arrays / _GB:.2f} GB on {devices}\n"
        f"the host's memory grew by at most {found.growth / _GB:.2f} GB: beside the arrays {beside / _GB:.2f} GB, "
        f"{beside / found.largest:.2f} times the largest tensor ({found.largest / _GB:.2f} GB)"
    )


def make(folder: Path, backbone: str, max_bytes: int) -> int:
    """Writes a random checkpoint, file by file; returns its bytes."""
    import numpy as np
    from safetensors.numpy import save_file

    from sparsecbm_jax.backbones import config_to_hf, published_config
    from sparsecbm_jax.backbones.names import tensor_names

    config, rng = published_config(backbone), np.random.default_rng(0)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)), encoding="utf-8")
    weight_map: dict[str, str] = {}
    tensors: dict[str, np.ndarray] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
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
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    import jax
    from flax import traverse_util

    from sparsecbm_jax.backbones import init_params

    tree = jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def load(folder: Path, fsdp: int, tensor: int) -> Measured:
    """Loads a checkpoint, and watches the memory of this process meanwhile."""
    from sparsecbm_jax import host_memory

    host_memory.give_back_freed()
    import jax

    jax.config.update("jax_num_cpu_devices", fsdp * tensor)

    from sparsecbm_jax import backbones, sharding
    from sparsecbm_jax.backbones.readers import open_checkpoint

    mesh = sharding.make_mesh(fsdp=fsdp, tensor=tensor)
    reader = open_checkpoint(folder)
    largest = max(4 * math.prod(shape) for shape in reader.shapes.values())
    del reader
    before, started = _held(), time.monotonic()
    peak, is_done = [before], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.005):
            peak.append(max(peak.pop(), _held()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        _, params = backbones.load_pretrained(
            folder, shardings=lambda tree: sharding.shardings(mesh, sharding.param_specs(tree))
        )
        jax.block_until_ready(params)
    finally:
        is_done.set()
        watcher.join()
    leaves = jax.tree.leaves(params)
    arrays = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    return Measured(arrays, largest, max(*peak, _held()) - before, time.monotonic() - started)


def _held() -> int:
    """Bytes of this process that lie in memory and are no file's."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon; expected Linux")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    command_line.run(main, keeps_memory=False)
