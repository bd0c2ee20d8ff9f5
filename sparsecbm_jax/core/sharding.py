"""The mesh, the path rules and the few collectives that the model needs.

Every leaf of a parameter, head or optimiser tree matches one rule below, or `spec_for` raises: no large leaf is
replicated by accident. The mesh has four axes on any machine; one device is the trivial mesh.

Axes:
    data: copies of everything, other rows of the batch (across slices or hosts).
    fsdp: other rows of the batch; parameters split on their first matrix dimension and gathered layer by layer.
    tensor: heads and feed-forward columns of one layer, split over devices (Megatron).
    concept: other concepts of the same rows; behaves like a batch axis.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from sparsecbm_jax.core.trees import path_string

T = TypeVar("T")


AXES = ("data", "fsdp", "tensor", "concept")
ROW_AXES = ("data", "fsdp")
BATCH_SPEC = P(ROW_AXES)
# For arrays whose second axis is a kernel's output units, spread over all devices: a block's inputs stay together.
UNITS_SPEC = P(None, AXES)


# Row-parallel kernels are split by tensor first, so that gathering over fsdp leaves each tensor shard's rows together.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/(word|position|token_type)/embedding$", P(None, "fsdp")),
    (r"embed/project_in/kernel$", P("fsdp", None)),
    (r"finish/project_out/kernel$", P("fsdp", None)),
    (r"layers/attention/(query|key|value)/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/ffn_in/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/(attention/output|ffn_out)/kernel$", P(None, ("tensor", "fsdp"), None)),
    (r"layers/attention/(query|key|value)/bias$", P(None, "tensor")),
    (r"layers/ffn_in/bias$", P(None, "tensor")),
    (r"layers/(attention/output|ffn_out)/bias$", P()),
    (r"(embed|finish)/norm/(scale|bias)$", P()),
    (r"layers/(attention_norm|ffn_norm)/(scale|bias)$", P()),
    (r"projector/(kernel|bias)$", P("concept")),
    (r"predictor/kernel$", P("concept")),
    (r"predictor/bias$", P()),
    (r"classifier/(kernel|bias)$", P()),
)


class Axes(NamedTuple):
    """The mesh axes that a function body may name: all of them inside a manual `shard_map`, none outside.

    Attributes:
        is_manual: True inside a `shard_map` whose axes are all manual.
        sizes: Number of devices along each axis of `AXES`.
    """

    is_manual: bool = False
    sizes: tuple[int, int, int, int] = (1, 1, 1, 1)

    def size(self, name: str) -> int:
        """Returns the number of devices along axis `name`."""
        return self.sizes[AXES.index(name)]

    @property
    def num_devices(self) -> int:
        """Number of devices along all axes."""
        return int(np.prod(self.sizes))


SINGLE = Axes()


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, concept: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Builds the four-axis mesh.

    Args:
        data: Devices along axis `data`, at least 1.
        fsdp: Devices along axis `fsdp`, at least 1.
        tensor: Devices along axis `tensor`, at least 1.
        concept: Devices along axis `concept`, at least 1.
        devices: The devices to use; None takes the first data·fsdp·tensor·concept of all devices.

    Raises:
        ValueError: An axis is below 1, the product is more than the available devices, or several processes would
            share rows.
    """
    sizes = dict(zip(AXES, (data, fsdp, tensor, concept), strict=True))
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"mesh axis {name!r} has size {size}; it must be at least 1")
    needed = int(np.prod(list(sizes.values())))
    available = list(jax.devices()) if devices is None else list(devices)
    if needed > len(available):
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"the mesh {shape} needs {needed} devices, but {len(available)} are available")
    if needed != len(available) and jax.process_count() > 1:
        raise ValueError(f"with several processes the mesh must use all {len(available)} devices; it names {needed}")
    if (data * fsdp) % jax.process_count():
        raise ValueError(
            f"each of {jax.process_count()} processes reads rows of its own, so data x fsdp must be a multiple of "
            f"{jax.process_count()}; it is {data * fsdp}"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 4, devices=available[:needed])


def axes_of(mesh: Mesh | None) -> Axes:
    """Returns the manual axes of a mesh; `SINGLE` for one device or None, where no collective is ever needed."""
    if mesh is None or mesh.size == 1:
        return SINGLE
    return Axes(True, tuple(mesh.shape[name] for name in AXES))  # type: ignore[arg-type]


def spec_for(path: str, ndim: int) -> P:
    """Returns the PartitionSpec of the leaf at `path`.

    Paths of optimiser moments end in the parameter's path, so the same rules apply to them; scalars are replicated.

    Args:
        path: '/'-joined path of the leaf.
        ndim: The leaf's number of dimensions.

    Raises:
        KeyError: No rule matches.
    """
    if ndim == 0:
        return P()
    for pattern, spec in RULES:
        if re.search(r"(^|/)" + pattern, path):
            return spec
    raise KeyError(f"no sharding rule for the leaf {path!r}; add one to sparsecbm_jax.core.sharding.RULES")


def param_specs(tree: Any) -> Any:
    """Returns the PartitionSpecs of a tree of parameters, heads or optimiser state (arrays or ShapeDtypeStructs)."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: spec_for(path_string(path), len(leaf.shape)), tree)


def packed_specs(packed: Mapping[str, Any]) -> dict[str, P]:
    """Returns the specs of packed masks: each is sharded as its kernel, so both are gathered alike."""
    return {path: spec_for(path, len(leaf.shape)) for path, leaf in packed.items()}


def mask_specs(masks: Mapping[str, Any]) -> dict[str, P]:
    """Returns the specs of K boolean masks: each concept's mask is sharded as its kernel."""
    return {path: P(None, *spec_for(path, len(leaf.shape) - 1)) for path, leaf in masks.items()}


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Turns a tree of PartitionSpecs into NamedShardings on `mesh`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))


def check_divisible(tree: Any, mesh: Mesh) -> None:
    """Checks that every sharded dimension divides by the devices along its axes.

    Raises:
        ValueError: Some do not; each leaf, dimension and axis is named.
    """
    problems = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_string(path)
        for dim, names in enumerate(spec_for(name, len(leaf.shape))):
            if names is None:
                continue
            parts = int(np.prod([mesh.shape[n] for n in (names if isinstance(names, tuple) else (names,))]))
            if leaf.shape[dim] % parts:
                problems.append(f"{name}: dimension {dim} of {tuple(leaf.shape)} is not divisible by {parts} ({names})")
    if problems:
        raise ValueError("the mesh does not fit the model:\n  " + "\n  ".join(problems))


def put(tree: Any, mesh: Mesh) -> Any:
    """Places a copy of a tree on the mesh by the path rules; a copy, since a training step donates its state.

    Raises:
        ValueError: A sharded dimension does not divide over its devices.
    """
    check_divisible(tree, mesh)
    place = functools.partial(jax.device_put, may_alias=False)
    return jax.tree.map(place, tree, shardings(mesh, param_specs(tree)))


def mesh_of(leaf: Any) -> Mesh | None:
    """Returns the mesh of several devices that an array lies on; None where it lies on one device."""
    place = getattr(leaf, "sharding", None)
    mesh = place.mesh if isinstance(place, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def spread_units(leaf: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Spreads the units of an array (inputs, units) over all devices, padded with zeros to as many for each."""
    if mesh is None:
        return leaf
    padded = jax.numpy.pad(leaf, ((0, 0), (0, -leaf.shape[1] % mesh.size)))
    return jax.lax.with_sharding_constraint(padded, NamedSharding(mesh, UNITS_SPEC))


def by_units(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Makes each device run `function` on units of its own, without communication.

    Args:
        function: A function of arrays whose second axis is units, and of scalars; all that it returns has units as
            second axis, too.
        mesh: The mesh; None returns `function` itself.
    """
    if mesh is None:
        return function

    def call(*args: Any) -> Any:
        specs = jax.tree.map(lambda leaf: UNITS_SPEC if jax.numpy.ndim(leaf) else P(), args)
        # Loops start from constants, which do not differ between devices.
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=UNITS_SPEC, check_vma=False)(*args)

    return call


def to_host(value: Any) -> np.ndarray:
    """Returns the whole array as numpy on every process, also where it lies on the devices of several processes."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable and not value.is_fully_replicated:
        from jax.experimental import multihost_utils

        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def in_turn(tree: T) -> T:
    """Returns the same arrays; on a CPU only once they are computed.

    For results of programs that are started one after the other and that no later program reads. Virtual devices share
    few threads: of two running programs, either may hold the threads that the other's collectives wait for, for ever.
    The memory of many running programs also adds up. Accelerators have queues, so there the call does not wait.
    """
    if jax.default_backend() == "cpu":
        jax.block_until_ready(tree)
    return tree


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Places this process's rows of a batch on the mesh, rows over `data` and `fsdp`.

    Raises:
        ValueError: The rows do not divide over the mesh.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    sharding = NamedSharding(mesh, BATCH_SPEC)

    def place(leaf: Any) -> jax.Array:
        total = leaf.shape[0] * jax.process_count()
        if total % rows:
            raise ValueError(f"a batch of {total} rows does not divide over data x fsdp = {rows} devices")
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, batch)


def gather(leaf: jax.Array, spec: P, axes: Axes, over: Sequence[str], skip_leading: bool = False) -> jax.Array:
    """Gathers one leaf over `fsdp` and marks it as varying over the batch-like axes `over`.

    Since it is marked once, before the concepts use it, the transpose reduces the summed gradient once instead of once
    per concept.

    Args:
        leaf: This device's shard.
        spec: The leaf's PartitionSpec.
        axes: The manual axes; with `SINGLE` the leaf is returned as it is.
        over: The axes along which the leaf's uses differ.
        skip_leading: True where the spec's first entry is the layer axis, which a scan has already removed.
    """
    if not axes.is_manual:
        return leaf
    entries = [(names,) if isinstance(names, str) else names or () for names in spec]
    for dim, names in enumerate(entries[1:] if skip_leading else entries):
        if "fsdp" in names:
            leaf = jax.lax.all_gather(leaf, "fsdp", axis=dim, tiled=True)
    return _varying(leaf, {name for names in entries for name in names}, over)


def _varying(leaf: jax.Array, named: Collection[str], over: Sequence[str]) -> jax.Array:
    """Marks a leaf as varying over the axes `over`; over the axes that its spec names it varies already."""
    missing = tuple(name for name in over if name not in named)
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf


def look_up(table: jax.Array, ids: jax.Array, axes: Axes, over: Sequence[str], dtype: DTypeLike) -> jax.Array:
    """Looks up this device's ids in a table whose columns are split over `fsdp`: ids and rows travel, not the table.

    Args:
        table: This device's columns, (rows, columns).
        ids: This device's ids, (batch, tokens); an id outside the table gives NaN, as in `backbones`.
        axes: The manual axes.
        over: The axes along which the uses differ.
        dtype: Precision in which the rows travel.

    Returns:
        Rows (batch, tokens, all columns).
    """
    everyones = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
    own = jax.numpy.take(_varying(table, ("fsdp",), over), everyones, axis=0, mode="fill")
    return jax.lax.all_to_all(own.astype(dtype), "fsdp", split_axis=0, concat_axis=2, tiled=True)
