"""Traces of JAX's profiler, and the time that devices waited for each other in them."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax

Interval = tuple[float, float]


# As operations are called in compiled programs, and as NCCL calls its kernels.
_COLLECTIVE = re.compile(
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    r"|nccl\w*?(?P<nccl>AllGather|AllReduce|ReduceScatter|AllToAll|SendRecv|Broadcast)"
)
_OF_NCCL = {
    "AllGather": "all-gather",
    "AllReduce": "all-reduce",
    "ReduceScatter": "reduce-scatter",
    "AllToAll": "all-to-all",
    "SendRecv": "collective-permute",
    "Broadcast": "collective-broadcast",
}
# Their events last as long as those of the operations inside them.
_OUTER = re.compile(r"^(while|conditional|call)\b")
_TPU_LINE = "XLA Ops"


class Waits(NamedTuple):
    """Says what this process's devices did while they were traced; seconds are means over the devices.

    Attributes:
        num_devices: that ran anything.
        seconds: from a device's first operation to its last.
        waited: of them, with collectives under way and nothing else.
        by_kind: the same by kind of collective; where two kinds are under way at once, both count.
    """

    num_devices: int
    seconds: float
    waited: float
    by_kind: dict[str, float]


def read_waits(folder: str | Path) -> Waits | None:
    """Reads the newest trace in a folder.

    Returns:
        None where the trace names no operation of a device, which is up to the backend.

    Raises:
        FileNotFoundError: if there is no trace.
    """
    traces = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
    if not traces:
        raise FileNotFoundError(f"{folder}: no trace of JAX's profiler (*.xplane.pb) is in it")
    of_devices: dict[tuple[str, object], dict[str | None, list[Interval]]] = defaultdict(lambda: defaultdict(list))
    for plane in jax.profiler.ProfileData.from_file(str(traces[-1])).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    name = str(stats["hlo_op"])
                elif line.name == _TPU_LINE:
                    name = event.name.removeprefix("%").partition(" ")[0]
                else:
                    continue
                # The end of an operation that began in another thread is an event of its own, without a duration.
                if event.duration_ns > 0 and not _OUTER.match(name):
                    found = _COLLECTIVE.search(name) or _COLLECTIVE.search(event.name)
                    kind = found and (found["kind"] or _OF_NCCL[found["nccl"]])
                    where = plane.name, stats.get("device_ordinal")
                    of_devices[where][kind].append((event.start_ns, event.start_ns + event.duration_ns))
    if not of_devices:
        return None
    count, seconds, waited, by_kind = len(of_devices), 0.0, 0.0, defaultdict[str, float](float)
    for device in of_devices.values():
        others = _union(device.pop(None, []))
        collectives = _union(interval for intervals in device.values() for interval in intervals)
        everything = [*others, *collectives]
        seconds += max(end for _, end in everything) - min(start for start, _ in everything)
        waited += _length_without(collectives, others)
        for kind, intervals in device.items():
            assert kind is not None
            by_kind[kind] += _length_without(_union(intervals), others)
    scale = 1e-9 / count
    return Waits(count, scale * seconds, scale * waited, {kind: scale * total for kind, total in by_kind.items()})


def render(waits: Waits) -> str:
    """Says waits in words.

    >>> render(Waits(8, 2.0, 0.5, {"all-gather": 0.125, "all-reduce": 0.375}))
    '2 s on each of 8 devices, of which 25.0 % waiting for others (all-reduce 18.8 %, all-gather 6.2 %)'
    >>> render(Waits(1, 0.25, 0.0, {}))
    '0.25 s on 1 device, which waited for no other'
    """
    if waits.num_devices == 1 and not waits.by_kind:
        return f"{waits.seconds:.3g} s on 1 device, which waited for no other"
    where = f"each of {waits.num_devices} devices" if waits.num_devices > 1 else "1 device"
    longest = sorted(waits.by_kind.items(), key=lambda item: -item[1])
    kinds = ", ".join(f"{kind} {100 * spent / waits.seconds:.1f} %" for kind, spent in longest)
    share = 100 * waits.waited / waits.seconds
    told = f"{waits.seconds:.3g} s on {where}, of which {share:.1f} % waiting for others"
    return f"{told} ({kinds})" if kinds else told


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Unites intervals: the same times, in order, without overlaps."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def _length_without(intervals: list[Interval], others: list[Interval]) -> float:
    """Measures how long some intervals last where none of the others does; both as `_union` gives them."""
    length, first = 0.0, 0
    for start, end in intervals:
        length += end - start
        while first < len(others) and others[first][1] <= start:
            first += 1
        for index in range(first, len(others)):
            if others[index][0] >= end:
                break
            length -= min(end, others[index][1]) - max(start, others[index][0])
    return length


class StepTrace:
    """Traces a few steps with JAX's profiler, once the first ones have been compiled.

    Args:
        folder: where the trace goes, for TensorBoard or xprof; None traces nothing.
    """

    FIRST, COUNT = 3, 3

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._num_begun, self._is_tracing = folder, 0, False
        self._is_told = True

    def begin_step(self, wait: Callable[[], object]) -> None:
        """Starts or ends the trace where it is time; to be called before each step.

        Args:
            wait: returns when the step before is done.
        """
        self._num_begun += 1
        if self._folder is not None and self._num_begun == self.FIRST:
            wait()
            jax.profiler.start_trace(self._folder)
            self._is_tracing, self._is_told = True, False
        elif self._num_begun == self.FIRST + self.COUNT:
            wait()
            self.end()

    def end(self) -> None:
        """Ends a trace that is under way."""
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False

    def report(self) -> str | None:
        """Says what was traced, once, after its end: None before, and where nothing is new."""
        if self._folder is None or self._is_tracing or self._is_told:
            return None
        self._is_told = True
        waits = read_waits(self._folder)
        told = "" if waits is None else f": {render(waits)}"
        return f"a trace of training steps is in {self._folder}{told}"
