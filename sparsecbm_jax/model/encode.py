"""K masked passes of one backbone: embed, layers outside, concepts inside, pool."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsecbm_jax.backbones import Backbone, make_backbone
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.sharding import SINGLE, Axes
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import REMAT_POLICIES, CBMConfig
from sparsecbm_jax.model.subnetwork_weights import LocalSubnetworks, Part, SubnetworkWeights

# Folded into a row's key: the layers take their own number, concepts start here.
_FIRST_CONCEPT = 1_000_000

# (h, layer's weights, layer's number, subnetwork, its rows' keys or None) → h
_Layer = Callable[..., Float[Array, "B T D"]]


def pool(hidden: Float[Array, "B T D"], attention_mask: Int[Array, "B T"]) -> Float[Array, "B D"]:
    """Averages over real tokens, in float32; a row without any is zero."""
    weight = attention_mask.astype(jnp.float32)
    total = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), weight)
    return total / jnp.maximum(weight.sum(axis=1, keepdims=True), 1.0)


def encode(
    config: CBMConfig,
    weights: SubnetworkWeights,
    batch: Batch,
    *,
    word_embeddings: Float[Array, "... B T E"] | None = None,
    dropout_rng: Array | None = None,
    axes: Axes = SINGLE,
    backbone: Backbone | None = None,
) -> Float[Array, "B P D"]:
    """Encodes a batch by every subnetwork: pooled representations z_k = pool(f_{θ_{M_k}}(x)).

    Args:
        config: the model.
        weights: the parameters, and masks or kernels that make subnetworks of them; this device's shards where `axes`
            is manual.
        batch: token ids and attention mask; this device's rows where `axes` is manual.
        word_embeddings: replaces the token lookup, shared [B, T, E] or per subnetwork [P, B, T, E].
        dropout_rng: key of the step's dropout; None is inference. Embedding dropout is shared by the subnetworks.
        axes: the mesh axes that this body may name.
        backbone: another backbone than the config's, given as the same three functions.

    Returns:
        z, float32; P is K (the local share of K on a `concept` axis), or 1 for a dense pass.
    """
    backbone = _backbone_of(config, axes) if backbone is None else backbone
    subnetworks = LocalSubnetworks(config, weights, axes)
    row_keys = None if dropout_rng is None else _row_keys(dropout_rng, batch.input_ids.shape[0], axes)
    keys = [_fold(row_keys, _FIRST_CONCEPT + subnetworks.first + k) for k in range(subnetworks.count)]

    hidden = _embed(backbone, subnetworks, batch, word_embeddings, row_keys)

    def layer(h: Array, part: Part, number: Array, k: int | Array, own_keys: Array | None) -> Float[Array, "B T D"]:
        return backbone.layer(subnetworks.of(part, k), h, batch.attention_mask, keys=_fold(own_keys, number))

    run_layers = _run_layers_on_one_device if axes.num_devices == 1 else _run_layers_on_a_mesh
    hidden = run_layers(config, subnetworks, layer, hidden, keys)

    part = subnetworks.gather("finish", subnetworks.part("finish"))
    pooled = [pool(backbone.finish(subnetworks.of(part, k), h), batch.attention_mask) for k, h in enumerate(hidden)]
    return jnp.stack(pooled, axis=1)


def _backbone_of(config: CBMConfig, axes: Axes) -> Backbone:
    tensor: dict[str, Any] = {"tensor_axis": "tensor", "tensor_size": axes.size("tensor")} if axes.is_manual else {}
    return make_backbone(config.backbone, dtype=jnp.dtype(config.dtype), **tensor)


def _row_keys(rng: Array, num_rows: int, axes: Axes) -> Array:
    """Makes one key per row of the global batch: the same noise however rows are spread over devices."""
    rows = jnp.arange(num_rows)
    if axes.is_manual:
        rows = rows + jax.lax.axis_index(sharding.ROW_AXES) * num_rows
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, rows)


def _fold(keys: Array | None, number: int | Int[Array, ""]) -> Array | None:
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _embed(
    backbone: Backbone,
    subnetworks: LocalSubnetworks,
    batch: Batch,
    words: Float[Array, "... B T E"] | None,
    row_keys: Array | None,
) -> list[Float[Array, "B T D"]]:
    """Embeds a batch once for all subnetworks, unless something differs between them."""
    part = subnetworks.part("embed")
    if subnetworks.has_split_table:
        others = dict(part.params)
        table = others.pop("word")["embedding"]
        words = subnetworks.look_up_words(table, batch.input_ids) if words is None else words
        part = part._replace(params=others)
    part = subnetworks.gather("embed", part)
    are_shared = words is None or words.ndim == 3

    def embed(k: int) -> Float[Array, "B T D"]:
        own = words if words is None or are_shared else words[k]
        return backbone.embed(
            subnetworks.of(part, k), batch.input_ids, batch.attention_mask, keys=row_keys, word_embeddings=own
        )

    if part.is_shared and are_shared:
        return [embed(0)] * subnetworks.count
    return [embed(k) for k in range(subnetworks.count)]


def _run_layers_on_one_device(
    config: CBMConfig,
    subnetworks: LocalSubnetworks,
    layer: _Layer,
    hidden: list[Float[Array, "B T D"]],
    keys: list[Array | None],
) -> list[Float[Array, "B T D"]]:
    """Scans over the layers, in each of which the subnetworks are written out."""
    scanned, num_layers = _numbered_layers(subnetworks)

    def run_layer(hidden: tuple[Array, ...], scanned: tuple[Part, Array]) -> tuple[tuple[Array, ...], None]:
        part, number = scanned
        part = subnetworks.gather("layers", part)
        return tuple(layer(h, part, number, k, keys[k]) for k, h in enumerate(hidden)), None

    unroll = num_layers if config.unroll_layers else 1
    final, _ = jax.lax.scan(_rematerialised(config, run_layer), tuple(hidden), scanned, unroll=unroll)
    return list(final)


def _run_layers_on_a_mesh(
    config: CBMConfig,
    subnetworks: LocalSubnetworks,
    layer: _Layer,
    hidden: list[Float[Array, "B T D"]],
    keys: list[Array | None],
) -> list[Float[Array, "B T D"]]:
    """Scans over the layers, gathers each once, and scans over the subnetworks in it.

    Backward, one subnetwork at a time is computed again, with the weights that were gathered again for all.
    """
    scanned, _ = _numbered_layers(subnetworks)
    drawn = [key for key in keys if key is not None]
    stacked_keys = jnp.stack(drawn) if drawn else None

    def run_layer(hidden: Float[Array, "P B T D"], scanned: tuple[Part, Array]) -> tuple[Float[Array, "P B T D"], None]:
        part, number = scanned
        part = subnetworks.gather("layers", part)

        def run_subnetwork(_: None, of_one: tuple[Array, Array, Array | None]) -> tuple[None, Float[Array, "B T D"]]:
            k, h, own_keys = of_one
            return None, layer(h, part, number, k, own_keys)

        every = jnp.arange(subnetworks.count), hidden, stacked_keys
        return jax.lax.scan(_rematerialised(config, run_subnetwork), None, every)[1], None

    final, _ = jax.lax.scan(_rematerialised(config, run_layer), jnp.stack(hidden), scanned)
    return [final[k] for k in range(subnetworks.count)]


def _numbered_layers(subnetworks: LocalSubnetworks) -> tuple[tuple[Part, Int[Array, " L"]], int]:
    part = subnetworks.part("layers")
    num_layers = jax.tree.leaves(part.params)[0].shape[0]
    return (part, jnp.arange(num_layers)), num_layers


def _rematerialised(config: CBMConfig, body: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a loop's body so that values are computed again in the backward pass, as far as `config.remat` says."""
    if config.remat == "none":
        return body
    # What a loop goes through again cannot be merged with what it did before.
    return jax.checkpoint(body, prevent_cse=config.unroll_layers, policy=REMAT_POLICIES[config.remat])
