"""The benchmark's two sides compute the same step, or their times could not be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import chex
import jax
import numpy as np
import pytest
from test_cbm import build, random_batch

from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.config import OptimConfig
from sparsecbm_jax.masks import leaf_at

torch = pytest.importorskip("torch", reason="the benchmark compares with PyTorch")

import benchmark
import benchmark_torch

LOSS_TOLERANCE, MOMENT_TOLERANCE, PARAMETER_TOLERANCE = 1e-5, 1e-5, 1e-4
# Adam's first step is lr · g / (|g| + 1e-8): where rounding is a part of g, it is a part of the step.
SMALLEST_GRADIENT = 1e-6


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The threads of so small a step would only wait for each other, for minutes where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def workload(backbone: BackboneConfig) -> benchmark.Workload:
    config, params, masks, heads = build(backbone, k=4, density=0.25)
    # Weights of the usual size leave so small a network all but blind to its input.
    params = jax.tree.map(lambda leaf: leaf * 8.0 if leaf.ndim > 1 else leaf, params)
    optim = OptimConfig(learning_rate=1e-2, head_learning_rate=1e-1, warmup_fraction=0.0, decay="constant")
    batch = random_batch(0, rows=8, k=4)
    return benchmark.Workload(config, params, heads, masks, optim, [batch], batch)


def by_their_names(work: benchmark.Workload, tree: Any) -> dict[str, Any]:
    paths = [tensor.path for tensor in benchmark_torch.tensor_names(work.config.backbone)]
    tensors = benchmark_torch.to_torch(work.config, {path: leaf_at(tree["backbone"], path) for path in paths})
    heads = {f"{part}/{name}": leaf for part, leaves in tree["heads"].items() for name, leaf in leaves.items()}
    return {name: np.asarray(leaf) for name, leaf in (tensors | heads).items()}


@pytest.mark.parametrize(
    "change",
    [{}, {"attention": "eager", "masking": "multiply", "embedding": "each", "optimizer": "foreach"}],
    ids=["defaults", "alternatives"],
)
def test_one_step_is_the_same_in_pytorch(change: dict[str, str], tiny_backbone_config: BackboneConfig) -> None:
    work = workload(tiny_backbone_config)
    ours = benchmark.OurStep(work, dropout=False)
    theirs = benchmark_torch.TorchStep(work.config, work.params, work.heads, work.masks, work.optim)
    theirs.set(dataclasses.replace(benchmark_torch.Settings(), **change))
    before = by_their_names(work, {"backbone": work.params, "heads": work.heads})
    losses = float(ours(work.epoch[0])), float(theirs(work.epoch[0]))
    assert losses[0] == pytest.approx(losses[1], abs=LOSS_TOLERANCE)

    after = by_their_names(work, {"backbone": ours.state.params, "heads": ours.state.heads})
    tensors = dict(theirs.bert.named_parameters()) | theirs.heads
    assert after.keys() == tensors.keys()
    # Ten times Adam's first moment: the gradients, clipped.
    grads = {name: 10 * theirs.adam.state[leaf]["exp_avg"].numpy() for name, leaf in tensors.items()}
    moments = [leaf for leaf in jax.tree.leaves(ours.state.opt_state, is_leaf=_is_adam) if _is_adam(leaf)]
    first = {"backbone": next(m.mu["backbone"] for m in moments if jax.tree.leaves(m.mu["backbone"]))}
    first["heads"] = next(m.mu["heads"] for m in moments if jax.tree.leaves(m.mu["heads"]))
    expected = {name: 10 * leaf for name, leaf in by_their_names(work, first).items()}
    chex.assert_trees_all_close(grads, expected, atol=MOMENT_TOLERANCE, rtol=1e-4)
    for name, leaf in after.items():
        clear = (np.abs(grads[name]) > SMALLEST_GRADIENT) | (grads[name] == 0)
        difference = np.abs(leaf - tensors[name].detach().numpy())
        assert difference[clear].max(initial=0.0) < PARAMETER_TOLERANCE, name
    moved = max(np.abs(leaf - before[name]).max() for name, leaf in after.items() if "encoder" in name)
    assert moved > 10 * PARAMETER_TOLERANCE


def _is_adam(node: Any) -> bool:
    return hasattr(node, "mu")


def test_report_of_a_small_run(tiny_backbone_config: BackboneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_torch, "use_cores", lambda num_cores: None)
    report = benchmark.compare(
        workload(tiny_backbone_config), num_batches=1, num_rounds=2, authors=True, torch_compile=False
    )
    text = benchmark.render(report)
    assert len(report["seconds_per_step"]["torch"]) == 2
    assert "authors" in text and "examples/s" in text
