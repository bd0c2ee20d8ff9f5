"""The benchmark's two sides compute the same step, or their times could not be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.backbones.tensor_names import tensor_names
from sparsecbm_jax.config.run_config import OptimConfig
from sparsecbm_jax.core.trees import leaf_at

from launch.benchmarks import training_step, training_step_torch
from tests.model.test_forward import build, random_batch

pytest.importorskip("torch", reason="the benchmark compares with PyTorch")


import torch

LOSS_TOLERANCE, GRADIENT_TOLERANCE, PARAMETER_TOLERANCE = 1e-5, 1e-5, 1e-4
# Adam's first step is lr · g / (|g| + 1e-8): where g is little more than rounding, so is the step's sign.
SMALLEST_GRADIENT = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The threads of so small a step would only wait for each other, for minutes where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(tiny_backbone_config: BackboneConfig) -> training_step.Workload:
    config, params, masks, heads = build(tiny_backbone_config, k=2, density=0.25)
    # Weights of the usual size leave so small a network all but blind to its input.
    params = jax.tree.map(lambda leaf: leaf * 8.0 if leaf.ndim > 1 else leaf, params)
    optim = OptimConfig(learning_rate=1e-2, head_learning_rate=1e-1, warmup_fraction=0.0, decay="constant")
    batch = random_batch(0, rows=8, k=2)
    return training_step.Workload(config, params, heads, masks, optim, [batch], batch)


class Step(NamedTuple):
    """Ours: the loss, and before the step, clipped gradients and after the step under PyTorch's names."""

    loss: float
    before: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def our_step(work: training_step.Workload) -> Step:
    def renamed(backbone: Any, heads: Any) -> dict[str, np.ndarray]:
        leaves = {tensor.path: leaf_at(backbone, tensor.path) for tensor in tensor_names(work.config.backbone)}
        flat = {f"{part}/{name}": leaf for part, group in heads.items() for name, leaf in group.items()}
        return {
            name: np.asarray(leaf) for name, leaf in (training_step_torch.to_torch(work.config, leaves) | flat).items()
        }

    ours = training_step.OurStep(work, dropout=False)
    loss = float(ours(work.epoch[0]))
    states = [node for node in jax.tree.leaves(ours.state.opt_state, is_leaf=_is_adam) if _is_adam(node)]
    # Adam's first moment after one step is a tenth of the gradient.
    moments = {part: next(s.mu[part] for s in states if jax.tree.leaves(s.mu[part])) for part in ("backbone", "heads")}
    grads = jax.tree.map(lambda leaf: 10 * leaf, moments)
    return Step(loss, renamed(work.params, work.heads), renamed(**grads), renamed(ours.state.params, ours.state.heads))


def _is_adam(node: Any) -> bool:
    return hasattr(node, "mu")


@pytest.mark.parametrize(
    "change",
    [{}, {"attention": "eager", "masking": "multiply", "embedding": "each", "optimizer": "foreach"}],
    ids=["defaults", "alternatives"],
)
def test_one_step_is_the_same_in_pytorch(change: dict[str, str], work: training_step.Workload, our_step: Step) -> None:
    theirs = training_step_torch.TorchStep(work.config, work.params, work.heads, work.masks, work.optim)
    theirs.set(dataclasses.replace(training_step_torch.Settings(), **change))
    assert float(theirs(work.epoch[0])) == pytest.approx(our_step.loss, abs=LOSS_TOLERANCE)
    tensors = dict(theirs.bert.named_parameters()) | theirs.heads
    assert our_step.after.keys() == tensors.keys()
    for name, tensor in tensors.items():
        grad = 10 * theirs.adam.state[tensor]["exp_avg"].numpy()
        np.testing.assert_allclose(our_step.grads[name], grad, rtol=1e-4, atol=GRADIENT_TOLERANCE, err_msg=name)
        is_clear = (np.abs(grad) > SMALLEST_GRADIENT) | (grad == 0)
        if name.endswith("key.bias"):
            # It adds the same to all scores of a query, so that its gradient is rounding alone, or by chance zero.
            is_clear = np.abs(grad) > SMALLEST_GRADIENT
        difference = np.abs(our_step.after[name] - tensor.detach().numpy())
        assert difference[is_clear].max(initial=0.0) < PARAMETER_TOLERANCE, name
        moved = np.abs(our_step.after[name] - our_step.before[name]).max()
        # Adam moves every weight that has a gradient by the learning rate.
        assert moved > 50 * PARAMETER_TOLERANCE or not is_clear.any() or not grad[is_clear].any(), name


def test_a_small_run_reports_all_three(work: training_step.Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step_torch, "use_cores", lambda num_cores: None)
    report = training_step.compare(work, work, num_batches=1, num_rounds=2, authors=True, torch_compile=False)
    assert {name: len(step["wall"]) for name, step in report["steps"].items()} == {"ours": 2, "torch": 2, "authors": 1}
    assert "examples/s" in training_step.render(report)
