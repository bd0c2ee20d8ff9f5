"""The weights of K subnetworks of one backbone: gathered once for all of them, masked for each."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.masks import AnyMasks
from sparsecbm_jax.core.sharding import Axes
from sparsecbm_jax.core.trees import Params, leaf_at, path_string, with_leaf
from sparsecbm_jax.model.config import CBMConfig, Kernels


class SubnetworkWeights(NamedTuple):
    """Gives the subnetworks their weights, by masks or by kernels of their own; without either it is the dense model.

    Attributes:
        params: the backbone θ that all share; this device's shards inside a manual `shard_map`.
        masks: K boolean masks, or their packed bits (`CBMConfig.num_concepts` of them).
        kernels: {path: [P, ...]} effective kernels of P subnetworks, used as they are in place of masked parameters.
    """

    params: Params
    masks: AnyMasks | None = None
    kernels: Kernels | None = None


class Part(NamedTuple):
    """Holds one of the three parts of a backbone: its embedding, its layers (stacked, or one of them) or its end.

    Attributes:
        params: the parameters that all subnetworks share.
        bits: {path in the part: packed masks}.
        kernels: {path in the part: kernels of every subnetwork}, after the layers' axis where there is one.
    """

    params: Params
    bits: Mapping[str, UInt[Array, "..."]]
    kernels: Mapping[str, Float[Array, "..."]]

    @property
    def is_shared(self) -> bool:
        """Says whether all subnetworks have the same weights here."""
        return not (self.bits or self.kernels)


class LocalSubnetworks:
    """Hands out the weights of the subnetworks that this device computes: all K, or its share of a `concept` axis.

    Args:
        config: the model.
        weights: the weights of all subnetworks.
        axes: the mesh axes that the caller may name.

    Attributes:
        count: how many there are here, P; 1 for the dense model.
        first: number of the first of them; traced on a mesh.

    Raises:
        ValueError: if K does not divide over the `concept` axis.
    """

    def __init__(self, config: CBMConfig, weights: SubnetworkWeights, axes: Axes) -> None:
        masks, kernels = weights.masks, weights.kernels
        self._params, self._kernels, self._bits = weights.params, kernels or {}, dict[str, Array]()
        self._config, self._axes = config, axes
        if kernels is not None:
            self.count = next(iter(kernels.values())).shape[0]
        elif masks is not None:
            is_packed = all(map(masks_lib.is_packed, masks.values()))
            num_concepts = config.num_concepts if is_packed else masks_lib.num_concepts(masks)
            self._bits = dict(masks) if is_packed else masks_lib.pack(masks)
            if num_concepts % axes.size("concept"):
                raise ValueError(f"{num_concepts} concepts do not divide over a concept axis of {axes.size('concept')}")
            self.count = num_concepts // axes.size("concept")
        else:
            self.count = 1
        is_spread = axes.is_manual and masks is not None
        self.first: int | Int[Array, ""] = jax.lax.axis_index("concept") * self.count if is_spread else 0
        self._differing_axes = sharding.ROW_AXES if masks is None else (*sharding.ROW_AXES, "concept")

    def part(self, name: str) -> Part:
        """Returns the part 'embed', 'layers' or 'finish' as it lies on the devices; layers are stacked, for a scan."""
        kernels = _inside(name, self._kernels)
        if name == "layers":
            kernels = {path: jnp.moveaxis(leaf, 1, 0) for path, leaf in kernels.items()}
        return Part(self._params[name], _inside(name, self._bits), kernels)

    def gather(self, name: str, part: Part) -> Part:
        """Makes a part's parameters and bits whole on this device; of the layers, one that a scan has taken off.

        Call it before the subnetworks use the part: weights, bits and the gradients' sum then travel once for all.
        """
        if not self._axes.is_manual:
            return part

        def whole(path: str, leaf: Array) -> Array:
            is_layer = name == "layers"
            spec = sharding.spec_for(f"{name}/{path}", leaf.ndim + is_layer)
            return sharding.gather(leaf, spec, self._axes, self._differing_axes, skip_leading=is_layer)

        def whole_weights(path: Any, leaf: Array) -> Float[Array, "..."]:
            # What travels is of the model's dtype; gradients are summed over the concepts in float32.
            return whole(path_string(path), self._cast(leaf)).astype(jnp.float32)

        return part._replace(
            params=jax.tree_util.tree_map_with_path(whole_weights, part.params),
            bits={path: whole(path, leaf) for path, leaf in part.bits.items()},
        )

    @property
    def has_split_table(self) -> bool:
        """Says whether the columns of the token table lie on several devices; see `look_up_words`."""
        return self._axes.size("fsdp") > 1

    def look_up_words(self, table: Float[Array, "V columns"], input_ids: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Looks word embeddings up where the columns of their table lie.

        Gathered, the table and its gradient would be the largest arrays of all.
        """
        found = sharding.look_up(table, input_ids, self._axes, self._differing_axes, self._config.dtype)
        return found.astype(jnp.float32)

    def of(self, part: Part, k: int | Int[Array, ""]) -> Params:
        """Returns a gathered part's parameters for subnetwork `first + k`, with its own kernels or masked ones."""
        tree = part.params
        for path, leaf in part.kernels.items():
            tree = with_leaf(tree, path, leaf[k])
        for path, leaf in part.bits.items():
            kept: Bool[Array, "..."] = masks_lib.kept(leaf, self.first + k)
            tree = with_leaf(tree, path, jnp.where(kept, leaf_at(tree, path), 0))
        return tree

    def _cast(self, leaf: Float[Array, "..."]) -> Float[Array, "..."]:
        """Casts a matrix to the model's dtype; vectors stay as they are.

        Rounded first, a layer is cast when its turn comes; a cast alone the compiler moves out of the loop, and copies
        all layers there.
        """
        if leaf.ndim <= 1:
            return leaf
        kind = jnp.finfo(self._config.dtype)
        return jax.lax.reduce_precision(leaf, kind.nexp, kind.nmant).astype(self._config.dtype)


def _inside(name: str, tree: Mapping[str, Array]) -> dict[str, Array]:
    """Selects the leaves of one part, by their paths inside it."""
    return {path.removeprefix(f"{name}/"): leaf for path, leaf in tree.items() if path.startswith(f"{name}/")}
