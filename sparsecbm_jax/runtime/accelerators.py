"""The accelerators that a plan may be made for: their memory, their peaks, and the names of their topologies.

Peaks are those that the makers publish, for dense bfloat16 products. The memory of a TPU is the most that its compiler
gives to a program.
"""

import re
from typing import NamedTuple

_GIB = 2**30


class Accelerator(NamedTuple):
    """One device as the compiler sees it.

    Attributes:
        memory_bytes: Bytes that a program may take.
        flops: Floating-point operations a second, in bfloat16 products.
        memory_bandwidth: Bytes a second between memory and cores.
        link_bandwidth: Bytes a second that it can send to other chips, over all its links together.
        is_compiled_for: True where programs are compiled for the chip itself, False where virtual CPU devices stand in
            for it.
    """

    memory_bytes: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    is_compiled_for: bool = False


ACCELERATORS = {
    "v4": Accelerator(30.75 * _GIB, 275e12, 1228e9, 300e9, True),
    "v5e": Accelerator(15.75 * _GIB, 197e12, 819e9, 200e9, True),
    "v5p": Accelerator(95.73 * _GIB, 459e12, 2765e9, 600e9, True),
    "v6e": Accelerator(31.24 * _GIB, 918e12, 1640e9, 400e9, True),
    # Half a chip: each has two devices.
    "tpu7x": Accelerator(94.74 * _GIB, 1153e12, 3690e9, 600e9, True),
    "a100": Accelerator(79 * _GIB, 312e12, 2039e9, 300e9),
    "h100": Accelerator(79 * _GIB, 989e12, 3350e9, 450e9),
    "h200": Accelerator(139 * _GIB, 989e12, 4800e9, 450e9),
    # One core and its share of the memory of a common server: a figure to compare programs by.
    "cpu": Accelerator(8 * _GIB, 50e9, 10e9, 10e9),
}


# JAX's names of available devices. Other boards of a family, such as PCIe ones, have other peaks.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def accelerator_of_kind(device_kind: str) -> Accelerator | None:
    """Returns the accelerator of a `device_kind`; None where its peaks are not known here.

    >>> accelerator_of_kind("NVIDIA H200").memory_bandwidth
    4800000000000.0
    """
    family = _KINDS.get(device_kind)
    return None if family is None else ACCELERATORS[family]


class Topology(NamedTuple):
    """Chips and their layout: `dims` are the dimensions of a TPU slice; for other chips, their number."""

    family: str
    dims: tuple[int, ...]

    @property
    def chip(self) -> Accelerator:
        """One device of the topology."""
        return ACCELERATORS[self.family]

    @property
    def num_devices(self) -> int:
        """Number of devices; a TPU v7x chip has two."""
        count = 1
        for dim in self.dims:
            count *= dim
        return count * (2 if self.family == "tpu7x" else 1)

    @property
    def wrap(self) -> tuple[bool, ...]:
        """True along dimensions whose links close to a ring: those of whole cubes, and of whole pods of the flat kinds.

        Without rings the compiler turns gathers over all chips into sums of twice the bytes.
        """
        if self.family in ("v4", "v5p", "tpu7x"):
            return (all(dim % 4 == 0 for dim in self.dims),) * 3
        return (*(dim == 16 for dim in self.dims), False)

    def __str__(self) -> str:
        return f"{self.family}:{'x'.join(map(str, self.dims))}"


def parse_topology(name: str) -> Topology:
    """Reads `family:XxY` or `family:XxYxZ` (TPUs, in chips), or `family:N`.

    Raises:
        ValueError: The family is unknown, or it does not have topologies of such dimensions.

    >>> parse_topology("v5p:4x4x4").num_devices
    64
    """
    family, _, dims = name.partition(":")
    if family not in ACCELERATORS:
        raise ValueError(
            f"--topology={name}: there is no {family!r}; expected one of {', '.join(ACCELERATORS)}, then :4x4x4"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims):
        raise ValueError(
            f"--topology={name}: expected the chips along each dimension, such as {family}:{_EXAMPLE[family]}"
        )
    topology = Topology(family, tuple(int(dim) for dim in dims.split("x")))
    expected = len(_EXAMPLE[family].split("x"))
    if len(topology.dims) != expected:
        raise ValueError(
            f"--topology={name}: a topology of {family} has {expected} dimensions, such as {family}:{_EXAMPLE[family]}"
        )
    return topology


_EXAMPLE = {
    **dict.fromkeys(ACCELERATORS, "8"),
    **dict.fromkeys(("v4", "v5p", "tpu7x"), "2x2x1"),
    **dict.fromkeys(("v5e", "v6e"), "4x4"),
}


class Roofline(NamedTuple):
    """Seconds that each resource needs at its peak; the largest is the least time a program can take."""

    compute: float
    memory: float
    wire: float

    @property
    def seconds(self) -> float:
        """The least time that the program can take."""
        return max(self)

    @property
    def bound(self) -> str:
        """Name of the resource that needs most time."""
        return self._fields[self.index(self.seconds)]


def roofline(chip: Accelerator, flops: float, memory_bytes: float, wire_bytes: float) -> Roofline:
    """Computes the times of one device's work at the chip's peaks, where it computes and communicates at once.

    >>> roofline(ACCELERATORS["v5p"], 459e12, 0, 6e9).bound
    'compute'

    Args:
        chip: The device.
        flops: Floating-point operations.
        memory_bytes: Bytes between memory and cores.
        wire_bytes: Bytes sent to other chips.
    """
    return Roofline(flops / chip.flops, memory_bytes / chip.memory_bandwidth, wire_bytes / chip.link_bandwidth)
