"""How long devices waited for each other, from traces."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsecbm_jax.training import profiling
from sparsecbm_jax.training.profiling import StepTrace


def test_a_trace_of_eight_devices_says_what_they_waited_for(tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, P("x")))
    step = jax.jit(lambda rows: jnp.tanh(rows @ rows.T).sum())
    step(rows).block_until_ready()
    trace = StepTrace(tmp_path)
    for _ in range(trace.FIRST + trace.COUNT):
        trace.begin_step(lambda: None)
        assert trace.report() is None or trace._num_begun == trace.FIRST + trace.COUNT
        step(rows).block_until_ready()
    waits = profiling.read_waits(tmp_path)
    assert waits is not None and waits.num_devices == 8
    assert {"all-gather", "all-reduce"} >= set(waits.by_kind) >= {"all-reduce"}
    a_little = 1e-9 * waits.waited  # sums of the same seconds in another order
    assert 0 < max(waits.by_kind.values()) <= waits.waited + a_little
    assert waits.waited <= sum(waits.by_kind.values()) + a_little
    assert waits.waited < waits.seconds


def test_a_report_comes_once(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path)
    for _ in range(trace.FIRST):
        trace.begin_step(lambda: None)
    jnp.ones(3).block_until_ready()
    assert trace.report() is None, "it has not ended"
    trace.end()
    report = trace.report()
    assert report is not None and report.startswith(f"a trace of training steps is in {tmp_path}")
    assert trace.report() is None
    silent = StepTrace(None)
    silent.end()
    assert silent.report() is None


def test_a_folder_without_a_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no trace"):
        profiling.read_waits(tmp_path)


def event(name: str, start: int, end: int, **stats: Any) -> Any:
    return SimpleNamespace(name=name, start_ns=start, duration_ns=end - start, stats=stats.items())


def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **planes: dict[str, list[Any]]) -> profiling.Waits | None:
    """What is read of a trace with these events, by plane and line."""
    (tmp_path / "a.xplane.pb").touch()
    made = [
        SimpleNamespace(
            name=f"/device:{name}:0",
            lines=[SimpleNamespace(name=line, events=events) for line, events in lines.items()],
        )
        for name, lines in planes.items()
    ]
    reader = SimpleNamespace(from_file=lambda path: SimpleNamespace(planes=made))
    monkeypatch.setattr(jax.profiler, "ProfileData", reader)
    return profiling.read_waits(tmp_path)


def test_a_tpus_loops_are_not_work_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    operations = [
        event("%while.3 = (f32[8]) while(...)", 0, 10_000),
        event("%fusion.1 = f32[8] fusion(...)", 0, 4_000),
        event("%all-gather-start.2 = f32[8] all-gather-start(...)", 4_000, 4_500),
        event("%fusion.2 = f32[8] fusion(...)", 4_500, 7_000),
        event("%all-gather-done.2 = f32[8] all-gather-done(...)", 7_000, 10_000),
    ]
    steps = [event("7", 0, 20_000)]
    found = read(monkeypatch, tmp_path, TPU={"XLA Ops": operations, "Steps": steps})
    assert found == profiling.Waits(
        1, pytest.approx(1e-5), pytest.approx(3.5e-6), {"all-gather": pytest.approx(3.5e-6)}
    )


def test_a_gpus_kernel_beside_others_is_no_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compute = [event("gemm", 0, 6_000, hlo_op="dot.1"), event("memcpy", 0, 60_000)]
    communication = [
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", 4_000, 9_000, hlo_op="custom.1"),
        event("ncclDevKernel_SendRecv(x)", 8_000, 10_000, hlo_op="collective-permute-start"),
    ]
    found = read(monkeypatch, tmp_path, GPU={"Stream #1": compute, "Stream #2": communication})
    assert found is not None and (found.seconds, found.waited) == (pytest.approx(1e-5), pytest.approx(4e-6))
    assert found.by_kind == {"all-reduce": pytest.approx(3e-6), "collective-permute": pytest.approx(2e-6)}
    assert read(monkeypatch, tmp_path, GPU={"Stream #1": [event("memcpy", 0, 60_000)]}) is None


@pytest.mark.parametrize("seed", range(20))
def test_times_are_those_of_a_timeline(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def drawn() -> tuple[list[tuple[float, float]], np.ndarray]:
        pairs = np.sort(rng.integers(0, 60, (rng.integers(0, 12), 2)), axis=1)
        line = np.zeros(60, bool)
        for start, end in pairs:
            line[start:end] = True
        return [(float(start), float(end)) for start, end in pairs if end > start], line

    (some, of_some), (others, of_others) = drawn(), drawn()
    assert profiling._length_without(profiling._union(some), profiling._union(others)) == (of_some & ~of_others).sum()
