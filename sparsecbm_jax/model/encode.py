"""K masked passes of one backbone: embed, layers outside, concepts inside, pool."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsecbm_jax.backbones import Backbone, make_backbone
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.masks import AnyMasks
from sparsecbm_jax.core.sharding import SINGLE, Axes
from sparsecbm_jax.core.trees import Params, leaf_at, path_string, with_leaf
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import REMAT_POLICIES, CBMConfig, Kernels

# Folded into a row's key: the layers take their own number, concepts start here.
_CONCEPT_STREAM = 1_000_000


def pool(hidden: Float[Array, "B T D"], attention_mask: Int[Array, "B T"]) -> Float[Array, "B D"]:
    """Mean over real tokens, in float32; a row without any is zero."""
    weight = attention_mask.astype(jnp.float32)
    total = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), weight)
    return total / jnp.maximum(weight.sum(axis=1, keepdims=True), 1.0)


def _row_keys(rng: Array, num_rows: int, axes: Axes) -> Array:
    """One key per row of the global batch: the same noise however rows are spread over devices."""
    rows = jnp.arange(num_rows)
    if axes.is_manual:
        rows = rows + jax.lax.axis_index(sharding.ROW_AXES) * num_rows
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, rows)


def _fold(keys: Array | None, number: int | Int[Array, ""]) -> Array | None:
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _group(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {path: leaf for path, leaf in tree.items() if path.startswith(prefix)}


def encode(
    config: CBMConfig,
    params: Params,
    batch: Batch,
    *,
    masks: AnyMasks | None = None,
    kernels: Kernels | None = None,
    word_embeddings: Float[Array, "... B T E"] | None = None,
    dropout_rng: Array | None = None,
    axes: Axes = SINGLE,
    backbone: Backbone | None = None,
) -> Float[Array, "B P D"]:
    """Pooled representations z, one per subnetwork.

    Args:
        config: the model.
        params: the backbone; this device's shards where `axes` is manual.
        batch: token ids and attention mask; this device's rows where `axes` is manual.
        masks: K boolean masks, or packed bits (config.num_concepts of them); None runs one dense pass (P = 1).
        kernels: {path: [P, ...]} effective kernels used instead of the masked parameters; see `effective_kernels`.
        word_embeddings: replaces the token lookup, shared [B, T, E] or per subnetwork [P, B, T, E].
        dropout_rng: key of the step's dropout; None is inference. Embedding dropout is shared by the subnetworks.
        axes: the mesh axes that this body may name.
        backbone: another backbone than the config's, given as the same three functions.

    Returns:
        z, float32; P is K (the local share of K on a `concept` axis), or 1 for a dense pass.
    """
    if backbone is None:
        tensor = {"tensor_axis": "tensor", "tensor_size": axes.size("tensor")} if axes.is_manual else {}
        backbone = make_backbone(config.backbone, dtype=jnp.dtype(config.dtype), **tensor)
    bits: dict[str, Array] = {}
    if kernels is not None:
        passes = next(iter(kernels.values())).shape[0]
    elif masks is not None:
        is_packed = all(map(masks_lib.is_packed, masks.values()))
        passes = config.num_concepts if is_packed else masks_lib.num_concepts(dict(masks))
        bits = dict(masks) if is_packed else masks_lib.pack(masks)
        if axes.size("concept") > 1:
            if passes % axes.size("concept"):
                raise ValueError(f"{passes} concepts do not divide over a concept axis of {axes.size('concept')}")
            passes //= axes.size("concept")
    else:
        passes = 1
    first = jax.lax.axis_index("concept") * passes if axes.is_manual and masks is not None else 0
    over = (*sharding.ROW_AXES, "concept") if masks is not None else sharding.ROW_AXES
    keys = None if dropout_rng is None else _row_keys(dropout_rng, batch.input_ids.shape[0], axes)
    pass_keys = [_fold(keys, _CONCEPT_STREAM + first + k) for k in range(passes)]

    def gathered(tree: Params, prefix: str, leading: bool = False, master: bool = False) -> Any:
        def one(path: Any, leaf: Array) -> Array:
            spec = sharding.spec_for(f"{prefix}/{path_string(path)}", leaf.ndim + leading)
            # bfloat16 travels; float32 is what gradients are summed in over the concepts. Rounded first, a layer is
            # cast when its turn comes; a cast alone the compiler moves out of the loop, and copies all layers there.
            cast = leaf
            if leaf.ndim > 1:
                kind = jnp.finfo(config.dtype)
                cast = jax.lax.reduce_precision(leaf, kind.nexp, kind.nmant).astype(config.dtype)
            whole = sharding.gather(cast, spec, axes, over, skip_leading=leading)
            return whole.astype(jnp.float32) if master else whole

        return jax.tree_util.tree_map_with_path(one, tree) if axes.is_manual else tree

    def masked(tree: Params, prefix: str, k: int | Int[Array, ""], bits_here: Any, kernels_here: Any) -> Params:
        for path, leaf in kernels_here.items():
            tree = with_leaf(tree, path.removeprefix(f"{prefix}/"), leaf[k])
        for path, leaf in bits_here.items():
            name = path.removeprefix(f"{prefix}/")
            tree = with_leaf(tree, name, jnp.where(masks_lib.kept(leaf, first + k), leaf_at(tree, name), 0))
        return tree

    def gathered_bits(tree: Mapping[str, Array], leading: bool) -> dict[str, Array]:
        return {
            path: sharding.gather(leaf, sharding.spec_for(path, leaf.ndim + leading), axes, over, skip_leading=leading)
            for path, leaf in tree.items()
        }

    # Embed: once for all subnetworks unless something in it differs between them.
    embed_tree = dict(params["embed"])
    if axes.size("fsdp") > 1:
        # Looked up where its columns lie: gathered, the table and its gradient would be the largest arrays of all.
        table = embed_tree.pop("word")["embedding"]
        if word_embeddings is None:
            found = sharding.look_up(table, batch.input_ids, axes, over, config.dtype)
            word_embeddings = found.astype(jnp.float32)
    embed_params = gathered(embed_tree, "embed", master=True)
    embed_bits = gathered_bits(_group(bits, "embed/"), leading=False)
    embed_kernels = _group(kernels or {}, "embed/")
    per_pass_words = word_embeddings is not None and word_embeddings.ndim == 4

    def embed(k: int) -> Array:
        words = word_embeddings[k] if word_embeddings is not None and per_pass_words else word_embeddings
        tree = masked(embed_params, "embed", k, embed_bits, embed_kernels)
        return backbone.embed(tree, batch.input_ids, batch.attention_mask, keys=keys, word_embeddings=words)

    is_shared = not (embed_bits or embed_kernels or per_pass_words)
    hidden = [embed(0)] * passes if is_shared else [embed(k) for k in range(passes)]

    def rematerialised(body: Callable[..., Any]) -> Callable[..., Any]:
        if config.remat == "none":
            return body
        # What a loop goes through again cannot be merged with what it did before.
        return jax.checkpoint(body, prevent_cse=config.unroll_layers, policy=REMAT_POLICIES[config.remat])

    # Layers outside, subnetworks inside.
    layer_bits = _group(bits, "layers/")
    layer_kernels = {path: jnp.moveaxis(leaf, 1, 0) for path, leaf in _group(kernels or {}, "layers/").items()}
    unroll = axes.num_devices == 1

    def layer(carry: Any, scanned: Any) -> tuple[Any, None]:
        layer_params, bits_here, kernels_here, number = scanned
        weights = gathered(layer_params, "layers", leading=True, master=True)
        bits_here = gathered_bits(bits_here, leading=True)

        def one(h: Array, k: int | Int[Array, ""], row_keys: Array | None) -> Array:
            tree = masked(weights, "layers", k, bits_here, kernels_here)
            return backbone.layer(tree, h, batch.attention_mask, keys=_fold(row_keys, number))

        if unroll:
            return tuple(one(h, k, pass_keys[k]) for k, h in enumerate(carry)), None

        def inner(_: None, k_and_h: Any) -> tuple[None, Array]:
            k, h, row_keys = k_and_h
            return None, one(h, k, row_keys)

        return jax.lax.scan(rematerialised(inner), None, (jnp.arange(passes), *carry))[1], None

    num_layers = jax.tree.leaves(params["layers"])[0].shape[0]
    scanned = (params["layers"], layer_bits, layer_kernels, jnp.arange(num_layers))
    if unroll:
        carry, _ = jax.lax.scan(
            rematerialised(layer), tuple(hidden), scanned, unroll=num_layers if config.unroll_layers else 1
        )
        hidden = list(carry)
    else:
        stacked_keys = None if keys is None else jnp.stack([key for key in pass_keys if key is not None])

        def with_keys(h: Array, scanned_here: Any) -> tuple[Array, None]:
            return layer((h, stacked_keys), scanned_here)

        # One subnetwork at a time is computed again, with the weights that were gathered again for all.
        stack, _ = jax.lax.scan(rematerialised(with_keys), jnp.stack(hidden), scanned)
        hidden = [stack[k] for k in range(passes)]

    finish_params = gathered(params["finish"], "finish", master=True)
    finish_bits = gathered_bits(_group(bits, "finish/"), leading=False)
    finish_kernels = _group(kernels or {}, "finish/")
    pooled = []
    for k, h in enumerate(hidden):
        tree = masked(finish_params, "finish", k, finish_bits, finish_kernels)
        pooled.append(pool(backbone.finish(tree, h), batch.attention_mask))
    return jnp.stack(pooled, axis=1)
