"""The speed of training: step time, examples and tokens a second, and the share of the devices' peak (MFU)."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.runtime import accelerators
from sparsecbm_jax.runtime.memory import peak_memory


def forward_flops(backbone: BackboneConfig, length: int, rows: int) -> float:
    """Counts flops of the matrix products of one forward pass, two for each multiply-add.

    Args:
        backbone: the backbone's shape.
        length: tokens of a row, padding included.
        rows: of the batch.
    """
    width, inner = backbone.hidden_size, backbone.intermediate_size
    weights = backbone.num_layers * (4 * width**2 + 2 * width * inner)
    weights += 2 * width * backbone.embedding_size if backbone.has_projections else 0
    attention = backbone.num_layers * 2 * length * width
    return 2.0 * rows * length * (weights + attention)


def step_flops(config: CBMConfig, length: int, rows: int, *, is_sparse: bool) -> float:
    """Counts flops that a training step needs, over all devices: forward and back, nothing computed again."""
    return 3 * (config.num_concepts if is_sparse else 1) * forward_flops(config.backbone, length, rows)


class Meter:
    """Adds up what training steps do and the time that they take.

    Rows are those of all processes, taken to be as many as this one's for each. The time of a step's first run, which
    compiles it, counts.

    Args:
        config: the model.
        devices: that the run uses; where their peak is not known, there is no MFU.
    """

    def __init__(self, config: CBMConfig, devices: Sequence[jax.Device]) -> None:
        chip = accelerators.accelerator_of_kind(devices[0].device_kind)
        self._config, self._peak = config, None if chip is None else len(devices) * chip.flops
        self._started, self._elsewhere = time.monotonic(), 0.0
        self._sums = np.zeros(4)
        self._read = self._now()

    def add(self, batch: Batch, *, is_sparse: bool) -> None:
        """Counts one step on this process's rows of a batch."""
        rows, length = batch.input_ids.shape
        flops = step_flops(self._config, length, rows, is_sparse=is_sparse)
        work = (np.count_nonzero(batch.example_weight), np.count_nonzero(batch.attention_mask), flops)
        self._sums += (1, *(jax.process_count() * amount for amount in work))

    @contextlib.contextmanager
    def not_counting(self) -> Iterator[None]:
        """Leaves out the time of what is no training step."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._elsewhere += time.monotonic() - started

    def _now(self) -> np.ndarray:
        return np.array([time.monotonic() - self._started - self._elsewhere, *self._sums])

    def read(self) -> dict[str, float]:
        """Returns the rates since they were last read; to be called when the steps are done, not only started."""
        before, self._read = self._read, self._now()
        return self._rates(self._read - before)

    def read_all(self) -> dict[str, float]:
        """Returns the rates since the beginning."""
        return self._rates(self._now())

    def _rates(self, sums: np.ndarray) -> dict[str, float]:
        seconds, num_steps, examples, tokens, flops = (float(value) for value in sums)
        rates = {
            "step_seconds": seconds / max(num_steps, 1),
            "examples_per_second": examples / seconds,
            "tokens_per_second": tokens / seconds,
        }
        if self._peak is not None:
            rates["mfu"] = flops / seconds / self._peak
        return {**rates, "peak_bytes": peak_memory()}


def render(rates: Mapping[str, float]) -> str:
    """Says rates in a line.

    >>> render({"step_seconds": 0.25, "examples_per_second": 64, "tokens_per_second": 8192, "peak_bytes": 2.5e9})
    '0.25 s a step, 64 examples/s, 8,192 tokens/s, peak memory 2.50 GB'
    """
    parts = [f"{rates['step_seconds']:.3g} s a step"]
    parts += [f"{rates[f'{what}_per_second']:,.0f} {what}/s" for what in ("examples", "tokens")]
    parts += [f"MFU {100 * rates['mfu']:.1f} %"] if "mfu" in rates else []
    return ", ".join([*parts, f"peak memory {rates['peak_bytes'] / 1e9:.2f} GB"])
