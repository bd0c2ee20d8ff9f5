"""Times pruning, an intervention and the training step with a backbone of a published shape on the local device.

python launch/benchmarks/device.py --backbone=facebook/opt-1.3b --output=runs/device.json
python launch/benchmarks/device.py --backbone=facebook/opt-6.7b --parts=intervention --param_dtype=bfloat16
python launch/benchmarks/device.py --parts=step --batch=256 --length=64 --torch

K = 4, as in CEBaB. No data or checkpoint is read: weights, masks at the final sparsity 1 − 1/K and tokens are random.

- pruner: WoodFisher scores of all maskable weights from dense masks, and the cut, concept by concept; `least_bytes` in
  device_pruner.py lists the bytes that are counted. --passes=N times the first N passes of one concept, where all
  would take too long, and extrapolates.
- intervention: one text through all subnetworks, `intervene` with the signed saliency, and `minimal_edit`.
- step: the jitted training step; model flops are those of matrix products, without recomputation. With --torch the same
  step in PyTorch afterwards: both do not fit in memory at once, so they cannot take turns.

Each part has a process of its own, and so a peak of memory of its own. Shares of peaks are left out on devices whose
peaks `runtime/accelerators.py` does not list. XLA_PYTHON_CLIENT_MEM_FRACTION is 0.95 if it is not set.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from sparsecbm_jax.cli import command_line
from sparsecbm_jax.runtime.json_files import write_json

if typing.TYPE_CHECKING:
    from sparsecbm_jax.config.run_config import RunConfig

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
PARTS = ("pruner", "intervention", "step")
flags.DEFINE_list("parts", list(PARTS), "Some of the parts.")
flags.DEFINE_string("backbone", "facebook/opt-1.3b", "Name of a published shape, or a folder with a config.json.")
flags.DEFINE_integer("num_layers", None, "Number of layers; by default all of the backbone.", lower_bound=1)
flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Type of the computation.")
flags.DEFINE_enum("param_dtype", "float32", ["bfloat16", "float32"], "Type of the weights in part 'intervention'.")
flags.DEFINE_integer("tokens", 64, "Tokens of a text in 'pruner' and 'intervention'.", lower_bound=3)
flags.DEFINE_integer("rows", 8, "Texts of a gradient.", lower_bound=1)
flags.DEFINE_integer("num_grads", 128, "Gradients m of a concept.", lower_bound=1)
flags.DEFINE_integer("block_size", 64, "Weights b of a Fisher block.", lower_bound=1)
flags.DEFINE_float("fisher_memory", None, "GiB for pruning; by default the memory that the model leaves.")
flags.DEFINE_integer("passes", None, "Passes of one concept to time; by default all.", lower_bound=1)
flags.DEFINE_integer("concepts", None, "Concepts to score and cut; by default all.", lower_bound=1)
flags.DEFINE_float("drop_fraction", 1e-4, "Share of the backbone's weights that is dropped, and grown.")
flags.DEFINE_integer("batch", 32, "Texts of a training step.", lower_bound=1)
flags.DEFINE_integer("length", 128, "Tokens of a text of a training step.", lower_bound=3)
flags.DEFINE_enum("remat", "selective", ["none", "selective", "full"], "Part of our layers that is computed again.")
flags.DEFINE_bool("unroll_layers", False, "Our layers are unrolled, which takes longer to compile.")
flags.DEFINE_bool("dropout", True, "The step has the backbone's dropout.")
flags.DEFINE_bool("torch", False, "Also time the step in PyTorch.")
flags.DEFINE_list("torch_modes", ["default"], "Modes of torch.compile to try, or 'none'.")
flags.DEFINE_integer("num_rounds", 10, "Timed rounds of an intervention or of steps.", lower_bound=1)
flags.DEFINE_integer("num_steps", 4, "Steps of a round.", lower_bound=1)
flags.DEFINE_string("output", None, "JSON file, written again after each part.")


def main() -> None:
    """Runs the command; see the docstring of this file."""
    command_line.check_names("parts", PARTS)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    report: dict[str, Any] = {"command": " ".join(sys.argv[1:]), "backbone": FLAGS.backbone}
    with tempfile.TemporaryDirectory() as folder:
        # Programs that are compiled for their memory are not compiled again to run.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder, "compiled")))
        backbone = _backbone(Path(folder))
        for part in FLAGS.parts:
            measure = {"pruner": _pruner, "intervention": _intervention, "step": _step}[part]
            report[part] = in_a_process(part, measure, backbone)
            _write(report)
        if "step" in FLAGS.parts and FLAGS.torch:
            report["torch_step"] = in_a_process("step: torch", _torch_step, backbone)
            if "error" not in report["step"] and "error" not in report["torch_step"]:
                ratio = report["torch_step"]["median_seconds"] / report["step"]["median_seconds"]
                report["torch_over_ours"] = ratio
                print(f"step: torch / ours {ratio:.2f}, one after the other", flush=True)
            _write(report)


def _write(report: dict[str, Any]) -> None:
    if FLAGS.output:
        write_json(FLAGS.output, report)


def in_a_process(name: str, measure: Callable[[str], dict[str, Any]], backbone: str) -> dict[str, Any]:
    """Runs a part in a process of its own, whose memory is released; returns its result, or the error that ended it.

    The process is forked: this file must not start JAX's devices, which do not survive a fork.

    Args:
        name: Name of the part.
        measure: Measures the part.
        backbone: Name of a published shape, or a folder with a config.json.
    """
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(_attempt, name, measure, backbone).result()
        except concurrent.futures.process.BrokenProcessPool:
            print(f"{name}: its process was ended", flush=True)
            return {"error": "its process was ended"}


def _attempt(name: str, measure: Callable[[str], dict[str, Any]], backbone: str) -> dict[str, Any]:
    from launch.benchmarks.device_model import attempt

    return attempt(name, lambda: measure(backbone))


def _backbone(folder: Path) -> str:
    """Returns the backbone's name, or a folder with the config.json of one with fewer layers."""
    if FLAGS.num_layers is None:
        return FLAGS.backbone
    from sparsecbm_jax.backbones import config_to_hf
    from sparsecbm_jax.planning.programs import model_config

    backbone = dataclasses.replace(model_config(_run(FLAGS.backbone)).backbone, num_layers=FLAGS.num_layers)
    (folder / "config.json").write_text(json.dumps(config_to_hf(backbone)), encoding="utf-8")
    return str(folder)


def _run(backbone: str, **sections: dict[str, Any]) -> RunConfig:
    from sparsecbm_jax.config.run_config import from_config_dict

    chosen = {"name": backbone, "dtype": FLAGS.dtype, "remat": FLAGS.remat}
    return from_config_dict({"backbone": chosen, **sections, "data": {"preset": "cebab", **sections.get("data", {})}})


def _pruner(backbone: str) -> dict[str, Any]:
    from launch.benchmarks import device_pruner

    pruner = {
        "num_grads": FLAGS.num_grads,
        "block_size": FLAGS.block_size,
        "grad_batch_size": FLAGS.rows,
        "fisher_memory": None if FLAGS.fisher_memory is None else int(FLAGS.fisher_memory * 2**30),
    }
    run = _run(backbone, data={"max_length": FLAGS.tokens}, pruner=pruner)
    return device_pruner.time_pruner(run, most_passes=FLAGS.passes, most_concepts=FLAGS.concepts)


def _intervention(backbone: str) -> dict[str, Any]:
    from launch.benchmarks import device_ours

    return device_ours.time_text(
        _run(backbone, data={"max_length": FLAGS.tokens}),
        param_dtype=FLAGS.param_dtype,
        drop_fraction=FLAGS.drop_fraction,
        num_rounds=FLAGS.num_rounds,
    )


def _step_run(backbone: str) -> RunConfig:
    return _run(backbone, data={"max_length": FLAGS.length}, training={"batch_size": FLAGS.batch})


def _step(backbone: str) -> dict[str, Any]:
    from launch.benchmarks import device_ours

    return device_ours.time_train_step(
        _step_run(backbone),
        dropout=FLAGS.dropout,
        unroll_layers=FLAGS.unroll_layers,
        num_rounds=FLAGS.num_rounds,
        num_steps=FLAGS.num_steps,
    )


def _torch_step(backbone: str) -> dict[str, Any]:
    import jax

    # JAX computes only shapes here.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        from launch.benchmarks import device_torch
    except ModuleNotFoundError:
        raise ImportError("--torch needs PyTorch: pip install torch") from None
    from sparsecbm_jax.core.trees import path_string
    from sparsecbm_jax.planning import programs
    from sparsecbm_jax.planning.programs import Shapes, abstract_mesh

    from launch.benchmarks.device_model import density_of, random_batch

    run = _step_run(backbone)
    shapes = Shapes(run, abstract_mesh(run.mesh))
    trees = {"params": shapes.params, "heads": shapes.heads, "packed": shapes.packed}
    by_path = {
        name: {path_string(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for name, tree in trees.items()
    }
    config = programs.model_config(run)
    modes = FLAGS.torch_modes
    settings = [
        device_torch.Settings(is_compiled=mode != "none", mode=mode, has_dropout=FLAGS.dropout) for mode in modes
    ]
    return device_torch.time_steps(
        lambda how: device_torch.random_step(config, by_path, density_of(run, config), run.optim, how),
        [random_batch(config, FLAGS.batch, FLAGS.length, seed) for seed in range(FLAGS.num_steps)],
        settings,
        num_rounds=FLAGS.num_rounds,
    )


if __name__ == "__main__":
    command_line.run(main)
