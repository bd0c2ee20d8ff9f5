"""Rates of training steps, and the peaks that they are set against."""

from typing import Any

import jax
import numpy as np
import pytest

from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.runtime import accelerators
from sparsecbm_jax.training import throughput

BACKBONE = BackboneConfig(
    family="bert", vocab_size=9, hidden_size=2, num_layers=3, num_heads=1, intermediate_size=8, max_positions=8
)
CONFIG = CBMConfig(BACKBONE, num_concepts=4, num_classes=3, num_labels=2)


class Device:
    device_kind = "NVIDIA H100 80GB HBM3"


def batch() -> Batch:
    ids = np.ones((2, 4), np.int32)
    attention = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], np.int32)
    labels = np.zeros(2, np.int32)
    given: dict[str, Any] = dict.fromkeys(Batch._fields, labels)
    return Batch(**{**given, "input_ids": ids, "attention_mask": attention, "example_weight": np.array([1.0, 0.0])})


def test_rates_are_those_of_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: clock[0])
    meter = throughput.Meter(CONFIG, [Device(), Device()])  # type: ignore[list-item]
    for _ in range(2):
        meter.add(batch(), is_sparse=True)
        clock[0] += 0.5
    with meter.not_counting():
        clock[0] += 100.0
    rates = meter.read()
    assert rates["step_seconds"] == 0.5
    assert rates["examples_per_second"] == 2.0, "a row that fills the batch up is no example"
    assert rates["tokens_per_second"] == 6.0, "nor is padding a token"
    flops = 3 * 4 * 2 * 8 * (3 * (4 * 4 + 2 * 2 * 8) + 3 * 2 * 4 * 2)
    np.testing.assert_allclose(rates["mfu"], 2 * flops / 1.0 / (2 * accelerators.ACCELERATORS["h100"].flops))
    assert rates["peak_bytes"] > 1e6
    meter.add(batch(), is_sparse=False)
    clock[0] += 2.0
    assert meter.read()["step_seconds"] == 2.0
    assert meter.read_all()["step_seconds"] == 1.0
    assert "MFU" in throughput.render(rates)


def test_without_a_known_peak_there_is_no_mfu() -> None:
    meter = throughput.Meter(CONFIG, jax.devices()[:1])
    meter.add(batch(), is_sparse=False)
    rates = meter.read()
    assert "mfu" not in rates and "MFU" not in throughput.render(rates)
