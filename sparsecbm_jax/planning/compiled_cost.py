"""The cost of a compiled program, from its optimised HLO text and the trip counts of its loops.

XLA's own cost analysis counts the body of a loop once; for a scan over layers that is a few percent of the true cost.
All numbers are of one device: the text is that of the program which each device runs.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_INSTRUCTION = re.compile(r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# These move no bytes: they name parts of other arrays, or they are loops and branches, whose own instructions count.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id "
    "replica-id opt-barrier async-update async-done iota".split()
)


class Array(NamedTuple):
    """One array of a shape: element type, dimensions, and `is_near`, True if it lies in a memory of the core's own."""

    dtype: str
    dims: tuple[int, ...]
    is_near: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> float:
        """Bytes of all elements."""
        known = _BYTES.get(self.dtype)
        width = int(digits[0]) / 8 if (digits := re.findall(r"\d+", self.dtype)) else 0
        return self.size * (width if known is None else known)


class Instruction(NamedTuple):
    """One line of a computation; `arrays` are those of its result, several for a tuple."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    # The text between the parentheses, for constants and parameters.
    inside: str


Computation = Mapping[str, Instruction]


@dataclasses.dataclass
class Cost:
    """The cost of one run of a program on each device.

    Attributes:
        flops: Floating-point operations of matrix products and convolutions, two for each multiply-add.
        memory_bytes: Bytes read from and written to the chip's main memory, if only those arrays stay near the core
            between two instructions that the compiler puts there.
        wire_bytes: {kind of collective: bytes that a device sends}, for collectives over rings.
        num_collectives: {kind of collective: number of runs}.
        gathers: {bytes of a gathered array: number of runs}, all-gathers only.
        unknown_loops: Number of loops whose trip count is decided while they run; each counts as one trip.
    """

    flops: float = 0.0
    memory_bytes: float = 0.0
    wire_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    num_collectives: Counter[str] = dataclasses.field(default_factory=Counter)
    gathers: Counter[int] = dataclasses.field(default_factory=Counter)
    unknown_loops: int = 0

    def add(self, other: "Cost", times: float = 1) -> None:
        """Adds `times` another cost."""
        self.flops += times * other.flops
        self.memory_bytes += times * other.memory_bytes
        for own, theirs in (
            (self.wire_bytes, other.wire_bytes),
            (self.num_collectives, other.num_collectives),
            (self.gathers, other.gathers),
        ):
            for key, value in theirs.items():
                own[key] += times * value  # type: ignore[index, assignment]
        self.unknown_loops += other.unknown_loops

    @property
    def total_wire_bytes(self) -> float:
        """Bytes that a device sends, over all kinds of collectives."""
        return sum(self.wire_bytes.values())


def cost(text: str) -> Cost:
    """Computes the cost of a program from the text of its optimised module.

    Of the branches of a conditional the most expensive counts.

    Raises:
        ValueError: The text has no entry computation.

    >>> cost('''HloModule m, num_partitions=1
    ...
    ... ENTRY %main (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
    ...   %a = f32[4,8]{1,0} parameter(0)
    ...   %b = f32[8,2]{1,0} parameter(1)
    ...   ROOT %d = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }''').flops
    128.0
    """
    computations, entry = parse(text)
    partitions = re.search(r"\bnum_partitions=(\d+)", text)
    return _Walk(computations, int(partitions[1]) if partitions else 1).of(entry)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parses a module into its computations by name, and the name of its entry.

    Raises:
        ValueError: There is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            if match := _COMPUTATION.match(_COMMENT.sub("", line).rstrip()):
                current = computations[match["name"]] = dict[str, Instruction]()
                entry = match["name"] if match["entry"] else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(_COMMENT.sub("", line)):
            instruction = _instruction(match)
            current[instruction.name] = instruction  # type: ignore[index]
    if entry is None:
        raise ValueError("the text has no ENTRY computation; expected the text of an HLO module")
    return computations, entry


def _instruction(match: re.Match[str]) -> Instruction:
    rest = match["rest"]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    arrays = tuple(
        Array(dtype, tuple(int(dim) for dim in dims.split(",") if dim), "S(1)" in layout)
        for dtype, dims, layout in _ARRAY.findall(shape)
    )
    return Instruction(
        match["name"],
        rest[:opening].strip(),
        arrays,
        tuple(_NAME.findall(inside)),
        rest[closing + 1 :],
        bool(match["root"]),
        inside,
    )


def _closing(text: str, opening: int) -> int:
    """Finds the closing parenthesis of the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis is left open in {text[:200]!r}")


class _Walk:
    """A sum over computations: each is added up once, and then multiplied by its number of runs."""

    def __init__(self, computations: Mapping[str, Computation], num_partitions: int) -> None:
        self._computations, self._num_partitions = computations, num_partitions
        # For TPUs, a collective that runs at the same time as fusions stands in each of them: it is sent once.
        self._starts: dict[str, Instruction] = {}
        for computation in computations.values():
            for one in computation.values():
                if one.opcode == "custom-call" and 'custom_call_target="AsyncCollectiveStart"' in one.attributes:
                    begun = (computation[name] for name in one.operands if name in computation)
                    self._starts |= {channel: gather for gather in begun if (channel := _channel(gather)) is not None}
        self.of: Callable[[str], Cost] = functools.cache(self._of)

    def _of(self, name: str) -> Cost:
        total, computation = Cost(), self._computations[name]
        for instruction in computation.values():
            self._add(total, instruction, computation)
        return total

    def _add(self, total: Cost, instruction: Instruction, computation: Computation) -> None:
        opcode, attributes = instruction.opcode, instruction.attributes
        called = _CALLED.findall(attributes)
        kind = opcode.removesuffix("-start")
        if opcode == "dot":
            total.flops += _dot_flops(instruction, computation)
        elif opcode == "convolution":
            total.flops += _convolution_flops(instruction, computation)
        elif opcode == "while":
            trips = self._trips(instruction)
            total.unknown_loops += trips is None
            for computation_name in called:
                total.add(self.of(computation_name), trips or 1)
        elif opcode == "conditional":
            branches = _BRANCHES.search(attributes)
            names = re.findall(r"[\w.\-]+", branches[1]) if branches else called
            total.add(max((self.of(branch) for branch in names), key=_dearness))
        elif kind in _COLLECTIVES:
            if self._starts.get(_channel(instruction) or "", instruction) is not instruction:
                return
            self._add_collective(total, kind, instruction, computation)
        elif opcode == "fusion" and (scattered := self._scattered(called)):
            self._add_collective(total, "reduce-scatter", *scattered)
        elif opcode in ("call", "async-start", "custom-call"):
            for computation_name in called:
                total.add(self.of(computation_name))
        elif opcode == "fusion":
            for computation_name in called:
                inner = self.of(computation_name)
                # Fused instructions read and write no memory of their own.
                total.add(dataclasses.replace(inner, memory_bytes=0.0))
        if opcode not in _FREE and not opcode.endswith("-done"):
            total.memory_bytes += self._moved(instruction, computation)

    def _add_collective(self, total: Cost, kind: str, instruction: Instruction, computation: Computation) -> None:
        own = sum(array.num_bytes for name in instruction.operands for array in _arrays(name, computation))
        members = self._group_size(instruction.attributes)
        others = members - 1
        sent = {
            "all-gather": own * others,
            "all-reduce": 2 * own * others / members,
            "collective-permute": own,
            "collective-broadcast": own,
        }
        if members > 1 or kind == "collective-permute":
            total.wire_bytes[kind] += sent.get(kind, own * others / members)  # type: ignore[assignment]
            total.num_collectives[kind] += 1
            if kind == "all-gather":
                total.gathers[int(own * members)] += 1

    def _group_size(self, attributes: str) -> int:
        if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
            return int(match[2])
        if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
            return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match[2]))
        if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
            return len(match[1].split(","))
        return self._num_partitions

    def _scattered(self, called: list[str]) -> tuple[Instruction, Computation] | None:
        """Finds the all-reduce of a fused reduce-scatter in TPU text: each device keeps a slice of the sum."""
        for name in called:
            computation = self._computations[name]
            summed = [one for one in computation.values() if one.opcode == "all-reduce"]
            if summed and any(one.opcode == "dynamic-slice" for one in computation.values()):
                return summed[0], computation
        return None

    def _trips(self, loop: Instruction) -> int | None:
        if match := _TRIPS.search(loop.attributes):
            return int(match[1])
        condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes)
        if condition is None:
            return None
        found = [
            int(instruction.inside)
            for name in (condition[1], *self._below(condition[1]))
            for instruction in self._computations[name].values()
            if instruction.opcode == "constant" and re.fullmatch(r"\d+", instruction.inside)
        ]
        return max(found, default=None)

    def _below(self, name: str) -> Iterator[str]:
        for instruction in self._computations[name].values():
            for called in _CALLED.findall(instruction.attributes):
                yield called
                yield from self._below(called)

    def _moved(self, instruction: Instruction, computation: Computation) -> float:
        """Counts bytes read and written; of an operand that is sliced or updated in place, those of the slice."""
        inner = self._computations.get((_CALLED.findall(instruction.attributes) or [""])[0], {})
        if instruction.opcode != "fusion":
            inner = {}
        root = next((one for one in inner.values() if one.is_root), instruction)
        if root.opcode == "dynamic-update-slice" and len(root.operands) > 1:
            written = _far_bytes(_arrays(root.operands[1], inner or computation))
        else:
            written = _far_bytes(instruction.arrays)
        read = 0.0
        parameters = {int(one.inside): one.name for one in inner.values() if one.opcode == "parameter"}
        for number, operand in enumerate(instruction.operands):
            own = _far_bytes(_arrays(operand, computation))
            if own and number in parameters:
                users = [one for one in inner.values() if parameters[number] in one.operands]
                if users and all(one.opcode in ("dynamic-slice", "dynamic-update-slice") for one in users):
                    own = sum(_far_bytes(one.arrays) for one in users if one.opcode == "dynamic-slice")
            elif instruction.opcode in ("dynamic-slice", "dynamic-update-slice", "gather") and number == 0:
                own = 0.0 if instruction.opcode == "dynamic-update-slice" else written
            read += own
        return written + read


def _channel(instruction: Instruction) -> str | None:
    found = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
    return found and found[1]


def _far_bytes(arrays: Iterable[Array]) -> float:
    return sum(array.num_bytes for array in arrays if not array.is_near)


def _arrays(name: str, computation: Computation) -> tuple[Array, ...]:
    return computation[name].arrays if name in computation else ()


def _dearness(cost: Cost) -> tuple[float, float, float]:
    return cost.flops, cost.total_wire_bytes, cost.memory_bytes


def _dot_flops(instruction: Instruction, computation: Computation) -> float:
    (left,) = _arrays(instruction.operands[0], computation)[:1]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    dims = [int(dim) for dim in contracted[1].split(",") if dim] if contracted else []
    return 2.0 * instruction.arrays[0].size * math.prod(left.dims[dim] for dim in dims)


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """Counts the flops of a convolution.

    TPUs turn every product into a convolution, and batch dimensions into windows that meet one element each.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"the convolution {instruction.name} has no dim_labels")
    left, right, out = labels[1], labels[2], labels[3]
    (data,), (kernel,) = (_arrays(name, computation)[:1] for name in instruction.operands[:2])
    result = instruction.arrays[0]
    flops = 2.0 * result.dims[out.index("b")] * result.dims[out.index("f")] * kernel.dims[right.index("i")]
    window = _window(instruction.attributes)
    for number in range(len(out) - 2):
        label = str(number)
        sizes = data.dims[left.index(label)], kernel.dims[right.index(label)], result.dims[out.index(label)]
        flops *= _met(*sizes, *(window[key](number) for key in ("stride", "pad", "lhs_dilate", "rhs_dilate")))
    return flops


def _window(attributes: str) -> dict[str, Callable[[int], int]]:
    match = re.search(r"\bwindow=\{([^}]*)\}", attributes)
    given = dict(part.split("=") for part in match[1].split()) if match else {}

    def of(key: str, default: str) -> Callable[[int], int]:
        values = given[key].split("x") if key in given else []
        return lambda number: int((values[number] if values else default).split("_")[0])

    return {key: of(key, "0" if key == "pad" else "1") for key in ("stride", "pad", "lhs_dilate", "rhs_dilate")}


@functools.cache
def _met(data: int, kernel: int, out: int, stride: int, pad: int, data_dilation: int, kernel_dilation: int) -> int:
    """Counts the pairs of an output and a kernel position that meet an element of the data, along one dimension."""
    reach = (data - 1) * data_dilation
    count = 0
    for k in range(kernel):
        shift = k * kernel_dilation - pad
        if stride % data_dilation == 0:
            # Apart from outputs outside of the data, either all meet an element or none does.
            if shift % data_dilation:
                continue
            low, high = math.ceil(-shift / stride), (reach - shift) // stride
            count += max(0, min(out - 1, high) - max(0, low) + 1)
        else:
            places = (o * stride + shift for o in range(out))
            count += sum(1 for place in places if 0 <= place <= reach and place % data_dilation == 0)
    return count


def as_json(cost: Cost) -> dict[str, object]:
    """Returns a cost as plain data."""
    plain = {field.name: getattr(cost, field.name) for field in dataclasses.fields(cost)}
    return {name: dict(value) if isinstance(value, Counter) else value for name, value in plain.items()}
