"""Compiles a run's programs for accelerators that need not be available, and prints whether they fit and their cost.

python launch/plan.py --config=configs/cebab_opt.py:66b --topology=v5p:4x4x4 --json=runs/plan.json
python launch/plan.py --config=configs/cebab_opt.py:1_3b --topology=v5e:4x4 --mesh=auto

A topology is v4, v5p or tpu7x:XxYxZ, v5e or v6e:XxY (chips; extra `tpu-plan`), or a100, h100, h200 or cpu:N. For the
latter, programs are compiled for virtual CPU devices, and the figures are estimates. The mesh is the config's, or the
best of several proposed ones. No arrays are allocated, no data or weights are read; each program is compiled in a
process of its own, which takes a minute or two and 2 GB.

Bytes are those of one chip. `held` is the memory of arrays that are not arguments of the program, such as Adam's
moments during pruning. Flops are those of matrix products, also as a ratio to those of the model without recomputation.
Time is the least that the chip's peaks allow, if it computes and communicates at once.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from sparsecbm_jax.cli import command_line
from sparsecbm_jax.runtime.json_files import write_json

if TYPE_CHECKING:
    from sparsecbm_jax.config.run_config import MeshConfig, RunConfig
    from sparsecbm_jax.runtime.accelerators import Topology

FLAGS = flags.FLAGS
command_line.define_config()
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("topology", None, "Chips, such as v5p:4x4x4, v5e:4x4 or h100:8.")
flags.DEFINE_enum("mesh", "config", ["config", "auto"], "The config's mesh, or the best of those proposed.")
flags.DEFINE_list("programs", None, "Some of the programs; all by default.")
flags.DEFINE_string("json", None, "JSON file to write.")

# Number of meshes for which --mesh=auto compiles the training step.
_NUM_PROPOSED = 3
_GB = 1e9


def main() -> None:
    """Runs the command; see the docstring of this file."""
    run = command_line.run_config()
    if not FLAGS.topology:
        raise ValueError("--topology is missing; expected chips such as v5p:4x4x4, v5e:4x4 or h100:8")

    from sparsecbm_jax.planning import plan, programs
    from sparsecbm_jax.runtime.accelerators import parse_topology

    command_line.check_names("programs", programs.PROGRAMS)
    topology = parse_topology(FLAGS.topology)
    prepare_environment(topology)
    found: dict[str, Any] = {}
    if FLAGS.mesh == "auto":
        run, found["train_step"] = best_mesh(run, topology)
    plan.check_mesh(run, topology)
    print(heading(run, topology), flush=True)
    for leaf in programs.left_whole(programs.Shapes(run, programs.abstract_mesh(run.mesh))):
        print(f"warning: every chip has the whole of {leaf}")
    for name in FLAGS.programs or programs.PROGRAMS:
        if name not in found:
            found[name] = in_a_process(run, topology, name)
        print("\n".join(lines(name, found[name], run, topology)), flush=True)
    if FLAGS.json:
        write_json(FLAGS.json, report(run, topology, found))


def prepare_environment(topology: Topology) -> None:
    """Sets variables that JAX reads when a compiling process starts; they are only for compilation ahead of time."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.chip.is_compiled_for:
        # libtpu ends a process that has flags of another compiler; its own flags are in LIBTPU_INIT_ARGS.
        os.environ.pop("XLA_FLAGS", None)
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_ID": "0",
        }
    else:
        os.environ["JAX_NUM_CPU_DEVICES"] = str(topology.num_devices)


def in_a_process(run: RunConfig, topology: Topology, program: str) -> dict[str, Any]:
    """Runs `plan.measure` in a process of its own, since a compiler may end its process and does not free memory."""
    from sparsecbm_jax.planning import plan

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(plan.measure, run, topology, program).result()
        except concurrent.futures.process.BrokenProcessPool:
            return {"fits": False, "peak_bytes_per_chip": None, "error": "the compiler ended its process"}
        except (ValueError, ImportError) as error:
            # Raised again here, so that it is printed in one line; --debug shows its origin.
            raise type(error)(str(error)) from error


def best_mesh(run: RunConfig, topology: Topology) -> tuple[RunConfig, dict[str, Any]]:
    """Chooses, among the proposed meshes that fit, the one with the fastest training step.

    Args:
        run: The run's settings.
        topology: The devices.

    Returns:
        The run on that mesh, and the measurements of its training step.

    Raises:
        ValueError: No mesh divides the model and the batches.
    """
    from sparsecbm_jax.planning import plan

    tried: list[tuple[bool, float, int, RunConfig, dict[str, Any]]] = []
    for mesh in plan.propose_meshes(run, topology)[:_NUM_PROPOSED]:
        placed = dataclasses.replace(run, mesh=mesh)
        try:
            found = in_a_process(placed, topology, "train_step")
        except ValueError as error:
            print(f"{named(mesh)}: {error}", flush=True)
            continue
        does = "fits" if found["fits"] else "does not fit"
        step = f", {found['seconds']:.3f} s a step" if "seconds" in found else ""
        print(f"{named(mesh)}: {does}, peak {_gigabytes(found['peak_bytes_per_chip'])} GB{step}", flush=True)
        tried.append((not found["fits"], found.get("seconds", float("inf")), len(tried), placed, found))
    if not tried:
        raise ValueError(
            f"no mesh of {topology} divides the model's layers, the concepts and batches of "
            f"{run.training.batch_size} and {run.training.eval_batch_size} rows"
        )
    *_, placed, found = min(tried, key=lambda one: one[:3])
    return placed, found


def named(mesh: MeshConfig) -> str:
    """Formats the axes of a mesh that have more than one device."""
    from sparsecbm_jax.planning import plan

    return " x ".join(f"{name} {size}" for name, size in plan.as_mapping(mesh).items())


def heading(run: RunConfig, topology: Topology) -> str:
    """Formats the description of the plan, and the table's columns."""
    from sparsecbm_jax.planning import programs

    config, chip = programs.model_config(run), topology.chip
    estimate = "" if chip.is_compiled_for else " (estimates: compiled for virtual CPU devices)"
    length = min(run.data.max_length, config.backbone.max_length)
    columns = ("argument", "output", "temporary", "held", "peak", "of chip", "flops x", "wire", "seconds", "bound")
    how = f"{run.backbone.dtype}{'' if run.backbone.remat == 'none' else f', remat {run.backbone.remat}'}"
    return "\n".join(
        [
            f"{run.backbone.name}, K = {config.num_concepts}, {length} tokens, batch {run.training.batch_size}, {how}, "
            f"on {topology}: {named(run.mesh)}{estimate}",
            f"GB a chip, of {chip.memory_bytes / _GB:.1f}",
            f"{'program':<11}" + "".join(f"{column:>10}" for column in columns),
        ]
    )


def lines(name: str, found: dict[str, Any], run: RunConfig, topology: Topology) -> list[str]:
    """Formats a program's row of the table, and its traffic, warnings and advice."""
    from sparsecbm_jax.planning import plan

    if not found:
        return [f"{name:<11}  this run has none"]
    peak = found["peak_bytes_per_chip"]
    share = "?" if peak is None else f"{peak / topology.chip.memory_bytes:.0%}"
    if "error" in found:
        cells = [""] * 4 + [_gigabytes(peak), share]
        rest = [f"  {found['error']}"]
    else:
        kinds = ("argument", "output", "temporary", "held")
        ratio = found["flops_ratio"]
        cells = [_gigabytes(found[f"{kind}_bytes_per_chip"]) for kind in kinds]
        cells += [_gigabytes(peak), share, "-" if ratio is None else f"{ratio:.2f}"]
        cells += [_gigabytes(found["wire_bytes_per_chip"]), f"{found['seconds']:.3g}", found["bound"]]
        kinds_of_wire = sorted(found["wire_bytes_by_kind"].items(), key=lambda item: -item[1])
        by_kind = [
            f"{kind} {size / _GB:.2f} GB in {found['num_collectives'][kind]:.0f}" for kind, size in kinds_of_wire
        ]
        rest = [f"  {', '.join(by_kind)}"] if by_kind else []
        rest += [f"  warning: {warning}" for warning in found["warnings"]]
    if not found["fits"]:
        rest += [f"  to change: {change}" for change in plan.advice(name, run, topology.chip, peak)]
    return [f"{name:<11}" + "".join(f"{cell:>10}" for cell in cells), *rest]


def _gigabytes(size: float | None) -> str:
    return "?" if size is None else f"{size / _GB:.2f}"


def report(run: RunConfig, topology: Topology, found: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of the file of --json."""
    from sparsecbm_jax.planning import programs

    shapes = programs.Shapes(run, programs.abstract_mesh(run.mesh))
    return {
        "topology": str(topology),
        "is_estimate": not topology.chip.is_compiled_for,
        "chip_memory_bytes": topology.chip.memory_bytes,
        "mesh": dataclasses.asdict(run.mesh),
        "backbone": run.backbone.name,
        "num_concepts": shapes.config.num_concepts,
        "num_tokens": shapes.length,
        "batch_size": run.training.batch_size,
        "command": " ".join(sys.argv[1:]),
        "left_whole": programs.left_whole(shapes),
        "shardings": programs.describe_shardings(shapes),
        "programs": found,
    }


if __name__ == "__main__":
    command_line.run(main)
