"""The device benchmark on a tiny OPT on CPU: what it prints and writes, and whether PyTorch's step is the same step."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sparsecbm_jax.config.run_config import OptimConfig, PrunerConfig, from_config_dict
from sparsecbm_jax.core import masks, sharding
from sparsecbm_jax.core.trees import path_string
from sparsecbm_jax.model.heads import init_heads
from sparsecbm_jax.planning import programs
from sparsecbm_jax.runtime import accelerators
from sparsecbm_jax.training import train_step

from launch.benchmarks.device_model import random_batch, random_masks, random_params
from launch.benchmarks.device_pruner import least_bytes
from tests.support.mains import run_main

ROWS, LENGTH = 3, 12
SHAPE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 24}
LOSS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of an OPT."""
    path = tmp_path_factory.mktemp("opt")
    config = {"model_type": "opt", "vocab_size": 96, "max_position_embeddings": 32, "attention_dropout": 0.0, **SHAPE}
    (path / "config.json").write_text(json.dumps(config))
    return path


def _run(folder: Path, output: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    small = ("--num_layers=1", "--tokens=6", "--rows=2", "--num_grads=3", "--block_size=2", "--batch=2", "--length=6")
    # Dropout's generator takes long to compile.
    few = ("--nodropout", "--num_rounds=1", "--num_steps=1", f"--output={output}")
    result = run_main("benchmarks/device.py", f"--backbone={folder}", *small, *few, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(output.read_text())


def test_a_text_and_a_step_are_timed_on_a_tiny_shape(folder: Path, tmp_path: Path) -> None:
    has_torch = importlib.util.find_spec("torch") is not None
    asked = ("--parts=intervention,step", *(("--torch", "--torch_modes=none") if has_torch else ()))
    printed, report = _run(folder, tmp_path / "all.json", *asked)
    edited, trained = report["intervention"], report["step"]
    for name in ("forward", "intervene", "minimal_edit"):
        assert edited[name]["median_ms"] > 0
        assert edited[name]["wanted_bytes"]["peak"] > 0
    assert trained["median_seconds"] > 0
    assert trained["model_flops"] > 0
    # CPUs have no peaks that shares could be of.
    assert trained["mfu"] is trained["peak_bytes"] is None
    assert "peak of this device not known" in printed
    assert ("torch / ours" in printed) == has_torch
    if has_torch:
        ratio = report["torch_step"]["median_seconds"] / trained["median_seconds"]
        assert report["torch_over_ours"] == pytest.approx(ratio)


def test_some_passes_are_extrapolated(folder: Path, tmp_path: Path) -> None:
    printed, report = _run(folder, tmp_path / "some.json", "--parts=pruner", "--passes=1", "--fisher_memory=6e-5")
    pruned = report["pruner"]
    assert pruned["planned_passes"] > 1
    assert set(pruned["seconds_a_concept"]) == set(pruned["least_bytes_a_concept"]) == set(pruned["bandwidth_share"])
    assert pruned["bandwidth_share"]["whole"] is None, "CPUs have no peaks that shares could be of"
    assert [found["num_passes"] for found in pruned["by_concept"]] == [1]
    assert pruned["is_extrapolated"]
    assert "extrapolated" in printed
    for name in ("gradients", "scoring"):
        measured = pruned["by_concept"][0]["seconds"][name]
        assert pruned["seconds_a_concept"][name] == pytest.approx(pruned["planned_passes"] * measured)


@pytest.mark.parametrize("recomputes", [False, True])
def test_three_steps_are_the_same_in_pytorch(recomputes: bool, folder: Path) -> None:
    torch = pytest.importorskip("torch", reason="the benchmark compares with PyTorch")
    from launch.benchmarks import device_torch

    data = {"preset": "cebab", "concepts": ("food", "noise")}
    run = from_config_dict({"backbone": {"name": str(folder), "dropout": 0.0}, "data": data})
    config = programs.model_config(run)
    optim = OptimConfig(learning_rate=1e-2, head_learning_rate=1e-1, warmup_fraction=0.0, decay="constant")
    # Weights of the usual size leave so small a network all but blind to its input.
    params = jax.tree.map(lambda leaf: leaf * 8.0 if leaf.ndim > 1 else leaf, random_params(config))
    heads, packed = init_heads(jax.random.key(2), config), masks.pack(random_masks(config, params, 0.5))
    batch = random_batch(config, ROWS, LENGTH, 0)
    seen = np.arange(LENGTH)[None] < np.array([LENGTH, LENGTH - 3, 5])[:, None]
    batch = batch._replace(attention_mask=seen.astype(np.int32))

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    tx = train_step.make_optimizer(optim, num_steps=10)
    state = train_step.init_state(params, heads, tx, mesh)._replace(packed=packed)
    step_fn = train_step.make_train_step(config, tx, mesh, dropout=False)

    def by_path(tree: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_string(path): torch.from_numpy(np.array(leaf)) for path, leaf in leaves}

    how = device_torch.Settings(is_compiled=False, recomputes=recomputes, has_dropout=False)
    theirs = device_torch.TorchStep(config, by_path(params), by_path(heads), by_path(packed), optim, how)
    for _ in range(3):
        state, metrics = step_fn(state, sharding.put_batch(batch, mesh), jax.random.key(0))
        assert float(theirs(theirs.put(batch))) == pytest.approx(float(metrics["loss"]), rel=LOSS_TOLERANCE)


def test_bytes_are_counted_as_said() -> None:
    pruner = PrunerConfig(num_grads=128, block_size=64)
    moved = least_bytes(1000, pruner, num_passes=2)
    assert moved["gradients"] == 128 * 2 * 14_000
    assert moved["scoring"] == 1000 * (4 * 128 + 2 * 4 * 4 * 64 + 8)
    assert moved["whole"] == sum(moved[name] for name in ("gradients", "scoring", "selection"))
    dual = least_bytes(1000, dataclasses.replace(pruner, num_grads=32), num_passes=2)
    assert dual["scoring"] == 1000 * (4 * 32 + 8)


def test_peaks_are_those_of_the_very_board() -> None:
    assert accelerators.accelerator_of_kind("NVIDIA H100 80GB HBM3") == accelerators.ACCELERATORS["h100"]
    assert accelerators.accelerator_of_kind("NVIDIA H100 PCIe") is accelerators.accelerator_of_kind("cpu") is None
