"""A run's programs, compiled for a mesh that need not be available: memory, bytes that travel, and time.

Memory is what the compiler assigns; flops and bytes that travel are counted in the compiled text (`compiled_cost`).
"""

import dataclasses
import importlib.util
import math
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sparsecbm_jax.config.run_config import MeshConfig, RunConfig, check_batch_sizes
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.trees import path_string
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.planning import compiled_cost
from sparsecbm_jax.planning.programs import (
    LARGE,
    Part,
    Shapes,
    abstract_mesh,
    bytes_of,
    held_in_training,
    model_config,
    model_flops,
    parts_of,
)
from sparsecbm_jax.pruning import cholesky
from sparsecbm_jax.runtime.accelerators import Accelerator, Roofline, Topology, roofline

# Memory that a layer needs until its backward pass, in hidden states: a rough estimate, by which meshes are ranked.
_ACTIVATIONS_OF_A_LAYER = {"none": 30, "selective": 10, "full": 1}


def devices_of(topology: Topology) -> list[Any]:
    """Returns the devices to compile for: those of a TPU topology that need not be available, or virtual CPU devices.

    Raises:
        ImportError: The compiler for TPUs is not installed.
        ValueError: There is no such topology, or JAX was started with fewer CPU devices.
    """
    if topology.chip.is_compiled_for:
        if importlib.util.find_spec("libtpu") is None:
            raise ImportError(f"compiling for {topology} needs libtpu: pip install 'sparsecbm-jax[tpu-plan]'")
        from jax.experimental import topologies

        more = {"chip_config_name": "megacore"} if topology.family == "v4" else {}
        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=str(topology), wrap=topology.wrap, **more
            )
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            cause = str(error).splitlines()[0]
            if "lockfile" in cause:
                cause = f"another process is using libtpu; expected none ({cause})"
            raise ValueError(f"libtpu does not give the topology {topology}: {cause}") from error
        return list(found.devices)
    devices = jax.devices("cpu")
    if len(devices) < topology.num_devices:
        raise ValueError(
            f"{topology} needs {topology.num_devices} CPU devices, but JAX has {len(devices)}: set JAX_NUM_CPU_DEVICES"
        )
    return devices[: topology.num_devices]


def check_mesh(run: RunConfig, topology: Topology) -> None:
    """Checks that the run's mesh has as many devices as the topology, and that its batches divide over it.

    Args:
        run: The run's settings.
        topology: The devices.

    Raises:
        ValueError: It has not, or they do not.
    """
    sizes = dataclasses.asdict(run.mesh)
    if math.prod(sizes.values()) != topology.num_devices:
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"config.mesh is {shape}; expected a product of {topology.num_devices}, the devices of {topology}: set "
            "--config.mesh.fsdp and so on, or --mesh=auto"
        )
    check_batch_sizes(run)


def mesh_of(run: RunConfig, topology: Topology) -> Mesh:
    """Makes the run's mesh on the devices of a topology.

    Raises:
        ValueError: As `check_mesh`; or the mesh cannot be laid on the topology's dimensions.
    """
    check_mesh(run, topology)
    try:
        return sharding.make_mesh(**dataclasses.asdict(run.mesh), devices=devices_of(topology))
    except NotImplementedError as error:
        raise ValueError(f"the mesh cannot be laid on {topology}: {str(error).splitlines()[0]}") from error


class Measured(NamedTuple):
    """One compiled part: bytes of a device by kind, the cost of a run, and seconds of compilation."""

    arguments: float
    outputs: float
    temporaries: float
    peak: float
    cost: compiled_cost.Cost
    seconds: float


def compile_part(part: Part, topology: Topology) -> Measured:
    """Compiles a part and reads its memory and cost.

    Raises:
        jax.errors.JaxRuntimeError: The part does not fit the chip; see `memory_wanted`.
    """
    started = time.monotonic()
    with cholesky.compiling_for("tpu" if topology.chip.is_compiled_for else None):
        lowered = part.lower()
    with tempfile.TemporaryDirectory() as folder:
        # The executable does not always give the text of a large program.
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options if topology.chip.is_compiled_for else None)
        dumps = sorted(Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        text = dumps[-1].read_text() if dumps else compiled.as_text()
    memory = compiled.memory_analysis()
    # Every compiler that a plan may use has both.
    assert memory is not None and text is not None
    arguments, outputs, temporaries = (
        float(getattr(memory, f"{kind}_size_in_bytes")) for kind in ("argument", "output", "temp")
    )
    # Outputs are written over donated arguments.
    peak = arguments + outputs - float(memory.alias_size_in_bytes) + temporaries
    return Measured(arguments, outputs, temporaries, peak, compiled_cost.cost(text), time.monotonic() - started)


def memory_wanted(error: Exception) -> float | None:
    """Returns the bytes that a program needs, from the compiler's message; None where the message does not say."""
    found = re.search(r"(\d+(?:\.\d+)?)([KMGT])\)? (?:of|exceeds)", str(error))
    return float(found[1]) * 2 ** (10 * ("KMGT".index(found[2]) + 1)) if found else None


def measure(run: RunConfig, topology: Topology, program: str, mesh: Mesh | None = None) -> dict[str, Any]:
    """Compiles one of `PROGRAMS` and measures memory, cost and time, as plain data.

    Args:
        run: The run's settings.
        topology: The devices to compile for.
        program: The program's name.
        mesh: The run's mesh on these devices; None makes it.

    Returns:
        peak_bytes_per_chip, which includes arrays that a device holds next to the program; argument, output and
        temporary bytes of the part with the largest peak; fits; flops_per_chip, and flops_ratio to the model's;
        wire_bytes_per_chip, by kind and in all; times by roofline; warnings; and the same of each part. Only `fits`,
        the peak and `error` where the program does not fit; empty for a program that the run does not have.
    """
    mesh = mesh_of(run, topology) if mesh is None else mesh
    shapes = Shapes(run, mesh)
    chip = topology.chip
    parts: dict[str, dict[str, Any]] = {}
    total, seconds, compile_seconds = compiled_cost.Cost(), Roofline(0.0, 0.0, 0.0), 0.0
    for part in parts_of(program, shapes):
        try:
            found = compile_part(part, topology)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = memory_wanted(error)
            peak = None if needed is None else needed + part.beside
            return {"fits": False, "peak_bytes_per_chip": peak, "error": f"{part.name}: {_brief(error)}"}
        time_of = roofline(chip, found.cost.flops, found.cost.memory_bytes, found.cost.total_wire_bytes)
        seconds = Roofline(*(sum_ + part.times * one for sum_, one in zip(seconds, time_of, strict=True)))
        total.add(found.cost, part.times)
        compile_seconds += found.seconds
        parts[part.name] = {
            "times": part.times,
            "argument_bytes_per_chip": found.arguments,
            "output_bytes_per_chip": found.outputs,
            "temporary_bytes_per_chip": found.temporaries,
            "held_bytes_per_chip": part.beside,
            "peak_bytes_per_chip": found.peak + part.beside,
            "seconds": time_of.seconds,
            "cost": compiled_cost.as_json(found.cost),
        }
    if not parts:
        return {}
    fullest = max(parts.values(), key=lambda part: part["peak_bytes_per_chip"])
    model = model_flops(program, shapes)
    kinds = ("argument", "output", "temporary", "held", "peak")
    return {
        **{f"{kind}_bytes_per_chip": fullest[f"{kind}_bytes_per_chip"] for kind in kinds},
        "fits": fullest["peak_bytes_per_chip"] <= chip.memory_bytes,
        "flops_per_chip": total.flops,
        "flops_ratio": total.flops * mesh.size / model if model else None,
        "wire_bytes_per_chip": total.total_wire_bytes,
        "wire_bytes_by_kind": dict(total.wire_bytes),
        "num_collectives": dict(total.num_collectives),
        "roofline_seconds": seconds._asdict(),
        "seconds": sum(part["times"] * part["seconds"] for part in parts.values()),
        "bound": seconds.bound,
        "compile_seconds": compile_seconds,
        "warnings": list(_warnings(program, shapes, total)),
        "parts": parts,
    }


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _warnings(program: str, shapes: Shapes, cost: compiled_cost.Cost) -> Iterator[str]:
    leaves = jax.tree_util.tree_leaves_with_path(shapes.params)
    # Bytes of one layer of a kernel, or of an embedding, in float32: a larger gather takes several layers at once.
    whole = max(
        4 * math.prod(leaf.shape[1:] if path_string(path).startswith("layers/") else leaf.shape)
        for path, leaf in leaves
    )
    limit = LARGE if program == "select" else whole
    gathered = {size: count for size, count in cost.gathers.items() if size > limit}
    if gathered:
        largest = max(gathered)
        count = sum(gathered.values())
        yield f"gathers {largest / 1e9:.2f} GB at once ({count:.0f} gathers of more than {limit / 1e9:.2f} GB)"
    moved = cost.wire_bytes["all-to-all"] + cost.wire_bytes["collective-permute"]
    if moved > 0.1 * cost.total_wire_bytes and moved > LARGE:
        of_all = f"{moved / 1e9:.2f} of {cost.total_wire_bytes / 1e9:.2f} GB"
        yield f"reshards: {of_all} travel in all-to-all and permutes"
    if cost.unknown_loops:
        yield f"{cost.unknown_loops} loops run as often as their data says; counted as once"


def advice(program: str, run: RunConfig, chip: Accelerator, peak: float | None) -> list[str]:
    """Lists settings that save memory, the cheapest first, for a program that needs more than its chip has.

    Args:
        program: The program's name.
        run: The run's settings.
        chip: One device.
        peak: Bytes that the program needs; None where they are not known.
    """
    found = list[str]()
    if program == "prune_pass":
        bound = chip.memory_bytes - held_in_training(Shapes(run, abstract_mesh(run.mesh)))
        found.append(
            f"--config.pruner.fisher_memory below {max(bound, 0):.0f}: more passes over the gradients"
            if bound > 0
            else "training's state and masks alone fill the memory: prune a saved model with launch/prune.py"
        )
    if program in ("train_step", "prune_pass", "intervene") and run.backbone.remat != "full":
        found.append("--config.backbone.remat=full: layers computed again in the backward pass")
    if run.backbone.dtype == "float32":
        found.append("--config.backbone.dtype=bfloat16")
    name = {"train_step": "training.batch_size", "eval_step": "training.eval_batch_size"}.get(program)
    rows = run.mesh.data * run.mesh.fsdp
    if name and (size := getattr(run.training, name.rpartition(".")[2])) > rows:
        found.append(f"--config.{name} below {size}, down to {rows}")
    if run.mesh.data > 1:
        found.append(
            f"--config.mesh.fsdp={run.mesh.fsdp * run.mesh.data} --config.mesh.data=1: no copies of parameters"
        )
    times = "more chips" if peak is None else f"{peak / chip.memory_bytes:.1f} times the chips"
    return [*found, f"{times}, along mesh.fsdp or mesh.tensor"]


def propose_meshes(run: RunConfig, topology: Topology) -> list[MeshConfig]:
    """Lists meshes of a topology's devices that the model and batches divide over, the most promising first.

    They are ranked by an estimate of one training step. First, the state, one layer's weights and the rows of a device
    must fit. Among meshes that fit, the time decides: that of products, and that of bytes that travel. Weights travel
    twice and gradients once over `fsdp`, hidden states over `tensor`.
    """
    config = model_config(run)
    backbone, k = config.backbone, config.num_concepts if STRATEGIES[run.strategy].is_sparse else 1
    ranked = []
    for mesh in _factorisations(topology.num_devices):
        rows = mesh.data * mesh.fsdp
        is_even = not (run.training.batch_size % rows or run.training.eval_batch_size % rows or k % mesh.concept)
        if not is_even or backbone.num_heads % mesh.tensor or backbone.intermediate_size % mesh.tensor:
            continue
        try:
            shapes = Shapes(dataclasses.replace(run, mesh=mesh), abstract_mesh(mesh))
        except ValueError:
            continue
        ranked.append((_estimate(shapes, topology.chip), mesh))
    return [mesh for _, mesh in sorted(ranked, key=lambda pair: pair[0])]


def _factorisations(count: int) -> Iterator[MeshConfig]:
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    for tensor in (size for size in divisors if size <= 16):
        for concept in (size for size in divisors if count % (tensor * size) == 0):
            for data in (size for size in divisors if count % (tensor * concept * size) == 0):
                yield MeshConfig(data=data, fsdp=count // (tensor * concept * data), tensor=tensor, concept=concept)


def _estimate(shapes: Shapes, chip: Accelerator) -> tuple[float, float]:
    """Estimates the bytes of a training step beyond the chip's memory, and its seconds."""
    run, mesh, backbone = shapes.run, shapes.run.mesh, shapes.config.backbone
    k = shapes.config.num_concepts if shapes.is_sparse else 1
    tokens = run.training.batch_size * shapes.length / (mesh.data * mesh.fsdp)
    width = 2 if run.backbone.dtype == "bfloat16" else 4
    activations = tokens * backbone.hidden_size * width * k / mesh.concept * backbone.num_layers
    activations *= _ACTIVATIONS_OF_A_LAYER[run.backbone.remat]
    gathered = 2 * 4 * backbone.vocab_size * backbone.embedding_size
    memory = bytes_of(shapes.state) + bytes_of(shapes.params) + activations + gathered
    weights = sum(math.prod(leaf.shape) for leaf in shapes.kernels.values()) / mesh.tensor
    travels = weights * (3 * width + 2) * (mesh.fsdp - 1) / mesh.fsdp
    hidden = tokens * backbone.hidden_size * width * k / mesh.concept
    travels += 6 * 2 * backbone.num_layers * hidden * (mesh.tensor - 1) / mesh.tensor
    travels += 2 * bytes_of(shapes.params) * (mesh.data * mesh.concept > 1)
    flops = 4 / 3 * model_flops("train_step", shapes) / math.prod(dataclasses.asdict(mesh).values())
    return max(0.0, memory - 0.9 * chip.memory_bytes), flops / chip.flops + travels / chip.link_bandwidth


def as_mapping(mesh: MeshConfig) -> Mapping[str, int]:
    """Returns the axes that have more than one device, with their sizes."""
    return {name: size for name, size in dataclasses.asdict(mesh).items() if size > 1} or {"data": 1}
