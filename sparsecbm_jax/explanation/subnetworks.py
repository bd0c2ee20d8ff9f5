"""The kept weights of each concept's subnetwork by kernel, layer, head, row and column; overlaps, also by chance.

A kernel is [inputs, outputs]: a row holds the weights of one input, a column those of one output. An attention head has
its columns in query, key and value, and its rows in the attention output. All shares are of the existing weights.

Chance. Masks of densities d_i and d_j drawn independently have a Jaccard index of about
d_i d_j / (d_i + d_j − d_i d_j), which is d / (2 − d) for equal densities. Masks that prefer the same kernels overlap by
more than that even if their choices within a kernel are independent. `chance_within_kernels` therefore takes every
kernel's own densities in every layer; an overlap above it is due to the choice of weights within kernels.

Reference: Tan et al. 2024, 'Holistic and Intelligible Decision-making Pathways', Figure 6.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import Masks

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
Level = Literal["kernel", "column"]
NOTES: dict[Level, str] = {
    "kernel": "Every pruned kernel of every layer keeps the same share, as if weights were selected within each: "
    "densities say nothing here; see heads, rows and columns.",
    "column": "Every column of every pruned kernel keeps the same share, as if weights were selected within each: "
    "densities, columns and the heads of query, key and value say nothing here; see rows, and the heads of the "
    "attention output.",
}
_DIGITS = 4


@dataclasses.dataclass(frozen=True)
class Subnetwork:
    """The kept weights of one concept's mask, in plain numbers.

    Attributes:
        density: Kept share of all maskable weights.
        density_per_layer: Kept share of each transformer layer's kernels, first layer first.
        overlap: Jaccard index with each other concept's mask.
        chance_overlap: Expected Jaccard index of two random masks of this density.
        chance_overlaps: Expected Jaccard index of random masks of this density and of each other concept's.
        exclusive: Share of the kept weights that no other concept keeps.
        shared: Share of the kept weights that all concepts keep.
    """

    density: float
    density_per_layer: tuple[float, ...]
    overlap: dict[str, float]
    chance_overlap: float
    chance_overlaps: dict[str, float]
    exclusive: float
    shared: float


@dataclasses.dataclass(frozen=True)
class Spread:
    """The distribution of the kept shares of a kernel's rows, or of its columns.

    Attributes:
        quantiles: For each layer, the shares at 0, 10, 25, 50, 75, 90 and 100 % of the rows or columns.
        num_empty: For each layer, the number of rows or columns that keep no weight.
    """

    quantiles: tuple[tuple[float, ...], ...]
    num_empty: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class KernelView:
    """The weights that one concept keeps of one kernel; a kernel outside the layers counts as one layer.

    Attributes:
        path: Path of the kernel.
        num_rows, num_columns: Number of inputs and of outputs.
        density: Kept share.
        density_per_layer: Kept share of each layer.
        rows, columns: Distribution of the kept shares of single rows and columns.
        heads: For each layer, the kept share of each head's part; null for a kernel without heads.
        density_map: For each layer, kept shares of a grid of blocks, rows downwards; null where none was requested.
    """

    path: str
    num_rows: int
    num_columns: int
    density: float
    density_per_layer: tuple[float, ...]
    rows: Spread
    columns: Spread
    heads: tuple[tuple[float, ...], ...] | None
    density_map: tuple[tuple[tuple[float, ...], ...], ...] | None


@dataclasses.dataclass(frozen=True)
class ConceptView:
    """The weights that one concept's mask keeps, kernel by kernel.

    Attributes:
        name: Name of the concept.
        summary: Densities and overlaps, as in a pathway.
        heads: For each layer, the kept share of each head's masked weights, in query, key, value and attention output
            together; null where none of these is masked.
        exclusive_by_chance, shared_by_chance: `summary.exclusive` and `summary.shared` of independent masks.
        constant_level: Parts that all keep the same share: 'kernel' (all kernels but those that are kept whole), or
            'column' (each of their columns, too); null where shares differ.
        note: The meaning of that level for a reader; empty where shares differ.
        kernels: One view per kernel.
    """

    name: str
    summary: Subnetwork
    heads: tuple[tuple[float, ...], ...] | None
    exclusive_by_chance: float
    shared_by_chance: float
    constant_level: Level | None
    note: str
    kernels: tuple[KernelView, ...]


@dataclasses.dataclass(frozen=True)
class PairOverlap:
    """The overlap of two concepts' masks.

    Attributes:
        concepts: The two names.
        jaccard: Weights that both keep over weights that either keeps.
        chance: The same for independent masks of these densities.
        chance_within_kernels: The same for masks that are independent within every kernel, of their densities there.
    """

    concepts: tuple[str, ...]
    jaccard: float
    chance: float
    chance_within_kernels: float


@dataclasses.dataclass(frozen=True)
class SubnetworkReport:
    """All concepts' subnetworks, as plain data: a few hundred kilobytes as JSON.

    Attributes:
        num_weights: Maskable weights of the backbone.
        num_layers, num_heads: Layers of the backbone, and attention heads of each.
        concepts: One view per concept.
        overlaps: One entry per pair of concepts.
    """

    num_weights: int
    num_layers: int
    num_heads: int
    concepts: tuple[ConceptView, ...]
    overlaps: tuple[PairOverlap, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as nested dicts, lists and tuples, ready for JSON."""
        return dataclasses.asdict(self)


def summarise_subnetworks(masks: Masks | None, concepts: Sequence[str]) -> tuple[Subnetwork | None, ...]:
    """Computes densities and overlaps of every concept's mask; returns None for each concept of a dense model."""
    if masks is None:
        return (None,) * len(concepts)
    density, overlap = masks_lib.total_density(masks), masks_lib.overlap(masks)
    per_layer, (exclusive, shared) = _density_per_layer(masks), _exclusive_and_shared(masks)
    return tuple(
        Subnetwork(
            density=float(density[k]),
            density_per_layer=tuple(per_layer[k].tolist()),
            overlap={other: float(overlap[k, j]) for j, other in enumerate(concepts) if j != k},
            chance_overlap=float(masks_lib.chance_overlap(density[k])),
            chance_overlaps={
                other: float(masks_lib.chance_overlap(density[k], density[j]))
                for j, other in enumerate(concepts)
                if j != k
            },
            exclusive=float(exclusive[k]),
            shared=float(shared[k]),
        )
        for k in range(len(concepts))
    )


def view_subnetworks(
    masks: Masks, config: BackboneConfig, concepts: Sequence[str], *, bins: int = 16
) -> SubnetworkReport:
    """Counts the weights that every concept keeps.

    Args:
        masks: The K masks.
        config: The backbone's shape, for its heads.
        concepts: The K names.
        bins: Rows and columns of the density maps, at most 32; 0 for no maps. With 16 a report has about 1.5 kB per
            concept, kernel and layer: 0.3 MB for MiniLM and four concepts.

    Raises:
        ValueError: `bins` is out of range, or there are not as many masks as concepts.
    """
    if not 0 <= bins <= 32:
        raise ValueError(f"bins is {bins}; expected 0 to 32")
    if masks_lib.num_concepts(masks) != len(concepts):
        raise ValueError(f"there are masks for {masks_lib.num_concepts(masks)} concepts, but {len(concepts)} names")
    counts = {path: _count(np.asarray(mask), bins) for path, mask in sorted(masks.items())}
    summaries = summarise_subnetworks(masks, concepts)
    densities = np.array([summary.density for summary in summaries if summary])
    views = []
    for k, (name, summary) in enumerate(zip(concepts, summaries, strict=True)):
        assert summary is not None
        level, others = _constant_level(counts.values(), k), np.delete(densities, k)
        views.append(
            ConceptView(
                name=name,
                summary=summary,
                heads=_shares_of_heads(counts, k, config.num_heads),
                exclusive_by_chance=float(np.prod(1 - others)),
                shared_by_chance=float(np.prod(others)),
                constant_level=level,
                note=NOTES[level] if level else "",
                kernels=tuple(_kernel_view(path, count, k, config.num_heads) for path, count in counts.items()),
            )
        )
    pairs = tuple(
        PairOverlap(
            concepts=(concepts[i], concepts[j]),
            jaccard=views[i].summary.overlap[concepts[j]],
            chance=views[i].summary.chance_overlaps[concepts[j]],
            chance_within_kernels=_chance_within_kernels(counts.values(), i, j),
        )
        for i, j in itertools.combinations(range(len(concepts)), 2)
    )
    return SubnetworkReport(masks_lib.num_weights(masks), config.num_layers, config.num_heads, tuple(views), pairs)


class _Counts(NamedTuple):
    """Numbers of kept weights of a kernel's rows, columns and blocks, for each concept and layer."""

    rows: Int[np.ndarray, "K L I"]
    columns: Int[np.ndarray, "K L O"]
    blocks: Int[np.ndarray, "K L b c"]
    block_sizes: Int[np.ndarray, "b c"]

    @property
    def layers(self) -> Int[np.ndarray, "K L"]:
        return self.rows.sum(axis=-1)

    @property
    def layer_size(self) -> int:
        return self.rows.shape[-1] * self.columns.shape[-1]


def _count(mask: Bool[np.ndarray, "K *L I O"], bins: int) -> _Counts:
    mask = mask.reshape(mask.shape[0], -1, *mask.shape[-2:])
    edges = [np.linspace(0, size, min(bins or 1, size) + 1).astype(int) for size in mask.shape[-2:]]
    strips = np.add.reduceat(mask, edges[1][:-1], axis=-1, dtype=np.int32)
    return _Counts(
        rows=strips.sum(axis=-1),
        columns=mask.sum(axis=-2, dtype=np.int32),
        blocks=np.add.reduceat(strips, edges[0][:-1], axis=-2) if bins else strips[..., :0, :0],
        block_sizes=np.multiply.outer(np.diff(edges[0]), np.diff(edges[1])),
    )


def _kernel_view(path: str, counts: _Counts, k: int, num_heads: int) -> KernelView:
    num_rows, num_columns = counts.rows.shape[-1], counts.columns.shape[-1]
    heads = _kept_by_heads(path, counts, k, num_heads)
    return KernelView(
        path=path,
        num_rows=num_rows,
        num_columns=num_columns,
        density=_plain(counts.layers[k].mean() / counts.layer_size),
        density_per_layer=_plain(counts.layers[k] / counts.layer_size),
        rows=_spread(counts.rows[k], num_columns),
        columns=_spread(counts.columns[k], num_rows),
        heads=None if heads is None else _plain(heads * num_heads / counts.layer_size),
        density_map=_plain(counts.blocks[k] / counts.block_sizes) if counts.blocks.size else None,
    )


def _spread(kept: Int[np.ndarray, "L n"], size: int) -> Spread:
    quantiles = np.quantile(kept / size, QUANTILES, axis=-1).T
    return Spread(_plain(quantiles), tuple(np.count_nonzero(kept == 0, axis=-1).tolist()))


def head_axis(path: str) -> int | None:
    """Returns the axis of a kernel along which its heads lie, 0 for rows; None where it has no heads."""
    group, _, name = path.removesuffix("/kernel").rpartition("/")
    if group != "layers/attention":
        return None
    return 1 if name in ("query", "key", "value") else 0


def _kept_by_heads(path: str, counts: _Counts, k: int, num_heads: int) -> Int[np.ndarray, "L H"] | None:
    axis = head_axis(path)
    if axis is None:
        return None
    kept = (counts.rows, counts.columns)[axis][k]
    return kept.reshape(len(kept), num_heads, -1).sum(axis=-1)


def _shares_of_heads(counts: Mapping[str, _Counts], k: int, num_heads: int) -> tuple[tuple[float, ...], ...] | None:
    found = {path: _kept_by_heads(path, count, k, num_heads) for path, count in counts.items()}
    kept = {path: heads for path, heads in found.items() if heads is not None}
    if not kept:
        return None
    return _plain(sum(kept.values()) * num_heads / sum(counts[path].layer_size for path in kept))


def _constant_level(counts: Iterable[_Counts], k: int) -> Level | None:
    """Finds the level at which all shares are equal, within a thousandth for rounding and later edits; None if none."""
    parts = [(of_layer, count) for count in counts for of_layer in zip(count.layers[k], count.columns[k], strict=True)]
    parts = [((kept, columns), count) for (kept, columns), count in parts if kept < count.layer_size]
    kept = np.array([kept for (kept, _), _ in parts])
    sizes = np.array([count.layer_size for _, count in parts])
    if not kept.any():
        return None
    if (np.abs(kept - sizes * kept.sum() / sizes.sum()) > np.maximum(1, sizes / 1000)).any():
        return None
    is_even = [np.mean(np.abs(columns - np.median(columns)) <= 1) > 0.98 for (_, columns), _ in parts]
    return "column" if all(is_even) else "kernel"


def _chance_within_kernels(counts: Iterable[_Counts], i: int, j: int) -> float:
    both = either = 0.0
    for count in counts:
        one, other = count.layers[i] / count.layer_size, count.layers[j] / count.layer_size
        both += count.layer_size * float((one * other).sum())
        either += count.layer_size * float((one + other - one * other).sum())
    return both / either if either else 1.0


def _density_per_layer(masks: Masks) -> Float[np.ndarray, "K L"]:
    layers = [np.asarray(mask) for path, mask in masks.items() if path.startswith("layers/")]
    if not layers:
        return np.zeros((masks_lib.num_concepts(masks), 0))
    kept = sum(np.count_nonzero(mask.reshape(*mask.shape[:2], -1), axis=-1) for mask in layers)
    return kept / sum(mask[0, 0].size for mask in layers)


def _exclusive_and_shared(masks: Masks) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Computes, of each concept's kept weights, the shares that no other concept keeps, and that all keep."""
    k = masks_lib.num_concepts(masks)
    alone, by_all, kept = np.zeros(k, np.int64), 0, np.zeros(k, np.int64)
    for mask in map(np.asarray, masks.values()):
        num_keepers = mask.sum(axis=0, dtype=np.uint8)
        is_alone = num_keepers == 1
        by_all += int(np.count_nonzero(num_keepers == k))
        alone += [np.count_nonzero(one & is_alone) for one in mask]
        kept += [np.count_nonzero(one) for one in mask]
    return alone / np.maximum(kept, 1), by_all / np.maximum(kept, 1)


def _plain(values: Any) -> Any:
    """Turns numbers into floats in nested tuples, rounded so that thousands of them stay small as JSON."""
    if np.ndim(values):
        return tuple(_plain(each) for each in values)
    return round(float(values), _DIGITS)
