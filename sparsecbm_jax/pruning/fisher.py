"""The Fisher blocks that a subnetwork's gradients add up to, within a stated memory.

One concept at a time: the Gram of a concept takes 4·b bytes a weight, so K of them together would not fit where one
does. Where even that does not fit, several passes over the gradients each take some pieces of the kernels.

Reference: Tan et al. 2024, Eq. 7. Gradients are taken at θ_k, the subnetwork as it is when the event falls, in
inference mode; at pruned positions they are zero, which decouples the kept weights from the pruned ones.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sparsecbm_jax.config.run_config import PrunerConfig
from sparsecbm_jax.core import sharding
from sparsecbm_jax.pruning import woodfisher
from sparsecbm_jax.pruning.gradients import Kernels

# Gradients buffered before one product: 32 take most of what batching the outer products gives, at 128 bytes a weight.
BUFFER = 32
_FLOAT = 4
# Bytes a weight of the backbone that pruning takes in any case.
_WHOLE = 4 * _FLOAT
# Share of the memory that is allowed to which arrays are planned; compiled programs and the allocator take the rest.
_ARRAYS = 7 / 8


class Piece(NamedTuple):
    """Some output units of one kernel: what is accumulated and scored at once.

    Attributes:
        path: the leaf.
        layer: which of the layers that the leaf stacks; None where it is a kernel by itself.
        start, stop: the output units.
    """

    path: str
    layer: int | None
    start: int
    stop: int

    def of(
        self, leaf: Float[Array, "*layers inputs outputs"], mesh: Mesh | None = None
    ) -> Float[Array, "inputs units"]:
        """Cuts this piece from a leaf, its units over the devices of a mesh; see `sharding.spread_units`."""
        inputs, units = leaf.shape[-2], self.stop - self.start
        if self.layer is None:
            return _slice(leaf, (0, self.start), (inputs, units), mesh)
        return _slice(leaf, (self.layer, 0, self.start), (1, inputs, units), mesh)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _slice(
    leaf: Float[Array, "..."], start: tuple[int | Int[Array, ""], ...], shape: tuple[int, ...], mesh: Mesh | None
) -> Float[Array, "inputs units"]:
    return sharding.spread_units(jax.lax.dynamic_slice(leaf, start, shape).reshape(shape[-2:]), mesh)


class Accumulated(NamedTuple):
    """Holds what one pass over the gradients adds up to.

    Attributes:
        states: of each piece, Σ_i g_i g_iᵀ of every block [blocks of inputs, units, b, b] (`accumulate`), or the list
            of its gradients [inputs, units] (`keep`).
        squares: {path: Σ_i ‖g_i‖²}, of every leaf whether it has a piece in this pass or not.
        num_grads: m, how many gradients there really were; it divides, not the number that was asked for.
    """

    states: list[Any]
    squares: dict[str, Float[Array, ""]]
    num_grads: int


def plan_passes(kernels: Kernels, config: PrunerConfig) -> list[tuple[Piece, ...]]:
    """Plans which pieces each pass over the gradients accumulates, none in more than `config.fisher_memory`.

    Raises:
        ValueError: if that is too little for one output unit.
    """
    limit = math.inf if config.fisher_memory is None else config.fisher_memory
    budget = _ARRAYS * limit - _whole_bytes(kernels)
    passes: list[tuple[Piece, ...]] = []
    for path, kernel in kernels.items():
        *layers, inputs, outputs = kernel.shape
        inputs, devices = _padded(inputs, config), _num_devices(kernels)
        units = outputs
        if not math.isinf(budget):
            units = int(min(outputs, devices * (budget // (inputs * sum(_bytes(config))))))
        if units < 1:
            raise ValueError(
                f"config.pruner.fisher_memory is {config.fisher_memory} bytes, but with two gradients and one output "
                f"unit of {path} it has to be {(_whole_bytes(kernels) + inputs * sum(_bytes(config))) / _ARRAYS:.0f}"
            )
        for layer in range(layers[0]) if layers else (None,):
            for start in range(0, outputs, units):
                piece = Piece(path, layer, start, min(start + units, outputs))
                if passes and _pass_bytes((*passes[-1], piece), kernels, config) <= budget:
                    passes[-1] += (piece,)
                else:
                    passes.append((piece,))
    return passes


def _whole_bytes(kernels: Kernels) -> int:
    """Counts the bytes of the kernels, their scores and two gradients, which are alive while they are cut to pieces.

    Those of one device, as is all that is planned.
    """
    shapes = [
        kernel.sharding.shard_shape(kernel.shape) if sharding.mesh_of(kernel) is not None else kernel.shape
        for kernel in kernels.values()
    ]
    return _WHOLE * sum(map(math.prod, shapes))


def _num_devices(kernels: Kernels) -> int:
    mesh = sharding.mesh_of(next(iter(kernels.values())))
    return 1 if mesh is None else mesh.size


def _padded(inputs: int, config: PrunerConfig) -> int:
    return inputs + -inputs % config.block_size


def _bytes(config: PrunerConfig) -> tuple[int, int]:
    """Counts bytes a weight that a piece takes through a pass, and those that it takes while it is worked on."""
    if woodfisher.form(config.num_grads, config.block_size) == "dual":
        return _FLOAT * config.num_grads, _FLOAT * config.num_grads
    # The sums are added to in place; what is worked on is scores.
    return _FLOAT * (config.block_size + min(BUFFER, config.num_grads)), 4 * _FLOAT


def _pass_bytes(pieces: Sequence[Piece], kernels: Kernels, config: PrunerConfig) -> int:
    devices = _num_devices(kernels)
    sizes = [
        _padded(kernels[piece.path].shape[-2], config) * -(-(piece.stop - piece.start) // devices) for piece in pieces
    ]
    kept, working = _bytes(config)
    return kept * sum(sizes) + working * max(sizes)


def describe_plan(kernels: Kernels, config: PrunerConfig) -> str:
    """Says the plan of `plan_passes` in a sentence."""
    passes = plan_passes(kernels, config)
    peak = _whole_bytes(kernels) + max(_pass_bytes(pieces, kernels, config) for pieces in passes)
    form = woodfisher.form(config.num_grads, config.block_size)
    kind = "single examples" if config.per_example else f"minibatches of {config.grad_batch_size}"
    each = "" if _num_devices(kernels) == 1 else " a device"
    limit = "no limit is set" if config.fisher_memory is None else f"of {config.fisher_memory / 2**20:.0f} MiB allowed"
    return (
        f"{form} form, m = {config.num_grads} gradients of {kind}, blocks of {config.block_size}: {len(passes)} "
        f"{'pass' if len(passes) == 1 else 'passes'} a concept, {peak / 2**20:.0f} MiB{each} ({limit})"
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _cut(
    gradient: Kernels,
    squares: Mapping[str, Float[Array, "*layers units"]],
    pieces: tuple[Piece, ...],
    mesh: Mesh | None,
) -> tuple[list[Float[Array, "inputs units"]], dict[str, Float[Array, "*layers units"]]]:
    """Cuts a gradient to pieces, and adds the squares of its leaves to `squares`, unit by unit."""
    added = {path: squares[path] + jnp.sum(leaf**2, axis=-2) for path, leaf in gradient.items()}
    return [piece.of(gradient[piece.path], mesh) for piece in pieces], added


class _Cuts:
    """Iterates over each gradient's pieces; afterwards, knows how many gradients there were and their squares.

    Raises:
        ValueError: if there is no gradient.
    """

    def __init__(self, gradients: Iterable[Kernels], pieces: tuple[Piece, ...], mesh: Mesh | None) -> None:
        self.num_grads, self._squares = 0, dict[str, Array]()
        self._gradients, self._pieces, self._mesh = gradients, pieces, mesh

    @property
    def squares(self) -> dict[str, Float[Array, ""]]:
        """{path: Σ_i ‖g_i‖²}, in float64: one unit with large gradients would swallow the others', as the mesh is."""
        sums = {path: np.sum(sharding.to_host(leaf), dtype=np.float64) for path, leaf in self._squares.items()}
        return {path: jnp.float32(total) for path, total in sums.items()}

    def __iter__(self) -> Iterator[list[Float[Array, "inputs units"]]]:
        for gradient in self._gradients:
            squares = self._squares or {path: jnp.zeros_like(leaf[..., 0, :]) for path, leaf in gradient.items()}
            cut, self._squares = _cut(gradient, squares, self._pieces, self._mesh)
            self.num_grads += 1
            yield sharding.in_turn(cut)
        if not self.num_grads:
            raise ValueError("no gradients were given to estimate the Fisher from")


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _add(
    total: Float[Array, "I U b b"], gradients: list[Float[Array, "inputs U"]], mesh: Mesh | None
) -> Float[Array, "I U b b"]:
    def add(total: Float[Array, "I u b b"], gradients: list[Float[Array, "inputs u"]]) -> Float[Array, "I u b b"]:
        return woodfisher.add_gram(total.reshape(-1, *total.shape[2:]), gradients).reshape(total.shape)

    return sharding.by_units(add, mesh)(total, gradients)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _no_gram(cut: Float[Array, "inputs U"], block_size: int, mesh: Mesh | None) -> Float[Array, "I U b b"]:
    def zeros(cut: Float[Array, "inputs u"]) -> Float[Array, "I u b b"]:
        inputs, units = cut.shape
        return jnp.zeros((-(-inputs // block_size), units, block_size, block_size), cut.dtype)

    return sharding.by_units(zeros, mesh)(cut)


def accumulate(
    gradients: Iterable[Kernels], pieces: tuple[Piece, ...], block_size: int, mesh: Mesh | None = None
) -> Accumulated:
    """Adds up the outer products of gradients, piece by piece.

    Args:
        gradients: of one pass.
        pieces: what is added up; the rest of a gradient is dropped.
        block_size: b.
        mesh: over whose devices the units of each piece are spread.

    Raises:
        ValueError: if there is no gradient.
    """
    states: list[Array] = []
    buffer: list[list[Array]] = []

    def flush() -> None:
        for i in range(len(pieces)):
            states[i] = _add(states[i], [cut[i] for cut in buffer], mesh)
        buffer.clear()

    cuts = _Cuts(gradients, pieces, mesh)
    for cut in cuts:
        states = states or [_no_gram(leaf, block_size, mesh) for leaf in cut]
        buffer.append(cut)
        if len(buffer) == BUFFER:
            flush()
    if buffer:
        flush()
    return Accumulated(states, cuts.squares, cuts.num_grads)


def keep(gradients: Iterable[Kernels], pieces: tuple[Piece, ...], mesh: Mesh | None = None) -> Accumulated:
    """Keeps the gradients of the pieces as they are, for the dual form; see `accumulate`.

    Raises:
        ValueError: if there is no gradient.
    """
    states: list[list[Array]] = [[] for _ in pieces]
    cuts = _Cuts(gradients, pieces, mesh)
    for cut in cuts:
        for own, leaf in zip(states, cut, strict=True):
            own.append(leaf)
    return Accumulated(states, cuts.squares, cuts.num_grads)


@functools.partial(jax.jit, static_argnums=2)
def blocks_of(piece: Float[Array, "inputs U"], which: Int[Array, " F"], block_size: int) -> Float[Array, "F b"]:
    """Takes some blocks of a piece, by their numbers among all of it."""
    inputs, units = piece.shape
    rows = jnp.pad(piece, ((0, -inputs % block_size), (0, 0))).reshape(-1, block_size, units)
    return rows[which // units, :, which % units]


def rows_of(
    gradients: Iterable[Kernels],
    blocks: Mapping[Piece, Int[np.ndarray, " F"]],
    block_size: int,
    mesh: Mesh | None = None,
) -> dict[Piece, list[Float[Array, "F b"]]]:
    """Collects the gradients of some blocks of some pieces."""
    rows: dict[Piece, list[Float[Array, "F b"]]] = {piece: [] for piece in blocks}
    for cut in _Cuts(gradients, tuple(blocks), mesh):
        for (piece, which), leaf in zip(blocks.items(), cut, strict=True):
            rows[piece].append(blocks_of(leaf, which, block_size))
    return rows
