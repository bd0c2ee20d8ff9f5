"""The `Backbone` of three pure functions, made from the modules of a family; fresh parameters; the plain encoder."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Num

from sparsecbm_jax.backbones.bert import EncoderEmbed, EncoderFinish
from sparsecbm_jax.backbones.config import BackboneConfig
from sparsecbm_jax.backbones.dropout import fold_keys
from sparsecbm_jax.backbones.layers import Layer
from sparsecbm_jax.backbones.opt import OPTEmbed, OPTFinish

Params = dict[str, Any]

_LAYER_KERNELS = ("attention/query", "attention/key", "attention/value", "attention/output", "ffn_in", "ffn_out")


class Backbone(NamedTuple):
    """Three pure functions; their composition scans `layer` over the leading axis of `params['layers']`.

    Attributes:
        config: The backbone's static shape.
        embed: (params['embed'], input_ids, attention_mask, *, keys=None, word_embeddings=None) -> h. `word_embeddings`
            [B, T, E] replaces the lookup; `keys` [B] draws dropout, None is deterministic.
        layer: (parameters of one layer, h, attention_mask, *, keys=None) -> h.
        finish: (params['finish'], h) -> last hidden states [B, T, output_size] in float32.
    """

    config: BackboneConfig
    embed: Callable[..., Float[Array, "B T D"]]
    layer: Callable[..., Float[Array, "B T D"]]
    finish: Callable[..., Float[Array, "B T out"]]


def _pure(module: nn.Module) -> Callable[..., Array]:
    def apply(params: Params, *args: Any, **kwargs: Any) -> Array:
        return module.apply({"params": params}, *args, **kwargs)  # type: ignore[return-value]

    return apply


def _modules(
    config: BackboneConfig, tensor_axis: str | None, tensor_size: int, dtype: DTypeLike
) -> tuple[nn.Module, nn.Module, nn.Module]:
    layer = Layer(config, tensor_axis, tensor_size, dtype)
    if config.family == "opt":
        return OPTEmbed(config, dtype), layer, OPTFinish(config, dtype)
    return EncoderEmbed(config, dtype), layer, EncoderFinish(config, dtype)


@functools.lru_cache(maxsize=64)
def make_backbone(
    config: BackboneConfig, *, tensor_axis: str | None = None, tensor_size: int = 1, dtype: DTypeLike = jnp.float32
) -> Backbone:
    """Builds the three functions; equal arguments give the same object, so it may be closed over by jitted code.

    Args:
        config: The backbone's shape.
        tensor_axis: Mesh axis over which heads and feed-forward width are split; `layer` must then run inside
            `jax.shard_map` with that axis manual, on local shards: query, key, value and ffn_in split on their
            outputs (kernel and bias), attention output and ffn_out on their inputs (kernel only). None: one device.
        tensor_size: Devices along `tensor_axis`; divides `num_heads` and `intermediate_size`.
        dtype: Of matmuls and of the hidden states between layers. Norms and softmax are float32 in any case.

    Returns:
        The backbone.

    Raises:
        ValueError: `tensor_size` does not divide the heads or the feed-forward width.
    """
    if tensor_size > 1 and tensor_axis is None:
        raise ValueError(f"tensor_size is {tensor_size} but tensor_axis is None")
    for name in ("num_heads", "intermediate_size"):
        if getattr(config, name) % tensor_size:
            raise ValueError(f"{name} {getattr(config, name)} is not divisible by tensor_size {tensor_size}")
    embed, layer, finish = _modules(config, tensor_axis, tensor_size, dtype)
    return Backbone(config, _pure(embed), _pure(layer), _pure(finish))


@functools.partial(jax.jit, static_argnums=1)
def init_params(rng: Key[Array, ""], config: BackboneConfig) -> Params:
    """Draws float32 parameters: kernels and embeddings truncated normal of deviation 0.02, layers stacked.

    One program draws all of them; drawn one by one, every shape would need a program of its own. The function is pure:
    `jax.jit(init_params, static_argnums=1, out_shardings=...)` creates shards in place, and `jax.eval_shape` gives the
    tree of shapes.

    Args:
        rng: One key; equal keys give equal parameters.
        config: The backbone's shape.

    Returns:
        {'embed', 'layers', 'finish'}, every leaf of 'layers' with a leading axis of num_layers.
    """
    embed, layer, finish = _modules(config, None, 1, jnp.float32)
    embed_rng, layers_rng, finish_rng = jax.random.split(rng, 3)
    ids = jnp.ones((1, 1), jnp.int32)
    h = jnp.zeros((1, 1, config.hidden_size))
    layers = jax.vmap(lambda key: layer.init(key, h, ids)["params"])(jax.random.split(layers_rng, config.num_layers))
    return {
        "embed": embed.init(embed_rng, ids, ids)["params"],
        "layers": layers,
        "finish": finish.init(finish_rng, h).get("params", {}),
    }


def maskable_paths(config: BackboneConfig) -> tuple[str, ...]:
    """Returns the paths of the kernels that a subnetwork masks, sorted: six in a layer, and OPT-350M's projections."""
    paths = [f"layers/{name}/kernel" for name in _LAYER_KERNELS]
    if config.has_projections:
        paths += ["embed/project_in/kernel", "finish/project_out/kernel"]
    return tuple(sorted(paths))


def encode_dense(
    backbone: Backbone,
    params: Params,
    input_ids: Int[Array, "B T"],
    attention_mask: Num[Array, "B T"],
    *,
    keys: Key[Array, " B"] | None = None,
    word_embeddings: Float[Array, "B T E"] | None = None,
) -> Float[Array, "B T out"]:
    """Computes the last hidden states of the plain backbone: embed, a scan over the layers, finish.

    Args:
        backbone: The three functions, from `make_backbone`.
        params: The parameters, from `init_params` or `load_pretrained`.
        input_ids: Token ids.
        attention_mask: 1 at real tokens, 0 at padding.
        keys: One key a row for dropout; None computes without dropout.
        word_embeddings: Word embeddings that replace the lookup of `input_ids`.

    Returns:
        Float32 hidden states; those at padding mean nothing.
    """
    h = backbone.embed(params["embed"], input_ids, attention_mask, keys=keys, word_embeddings=word_embeddings)

    def step(h: Array, scanned: tuple[Params, Array]) -> tuple[Array, None]:
        layer_params, index = scanned
        layer_keys = None if keys is None else fold_keys(keys, index)
        return backbone.layer(layer_params, h, attention_mask, keys=layer_keys), None

    h, _ = jax.lax.scan(step, h, (params["layers"], jnp.arange(backbone.config.num_layers)))
    return backbone.finish(params["finish"], h)


def input_squares(
    config: BackboneConfig, params: Params, input_ids: Int[Array, "B T"], attention_mask: Num[Array, "B T"]
) -> dict[str, Float[Array, "*layers inputs"]]:
    """Computes Σ x² over the real tokens of a batch, for every input x of every maskable kernel.

    Args:
        config: The backbone's shape.
        params: The parameters, as for `encode_dense`.
        input_ids: Token ids.
        attention_mask: 1 at real tokens, 0 at padding.

    Returns:
        {path of the kernel: sums}, in float32.
    """
    products = input_products(config, params, input_ids, attention_mask, block_size=1)
    return {path: leaf[..., 0, 0] for path, leaf in products.items()}


def input_products(
    config: BackboneConfig,
    params: Params,
    input_ids: Int[Array, "B T"],
    attention_mask: Num[Array, "B T"],
    *,
    block_size: int,
) -> dict[str, Float[Array, "*layers I b b"]]:
    """Computes Σ x xᵀ over the real tokens of a batch, for every block of consecutive inputs of every maskable kernel.

    Args:
        config: The backbone's shape.
        params: The parameters, as for `encode_dense`.
        input_ids: Token ids.
        attention_mask: 1 at real tokens, 0 at padding.
        block_size: Inputs of a block; a last block that is not filled is padded with zeros.

    Returns:
        {path of the kernel: sums}, in float32.
    """
    embed, layer, finish = _modules(config, None, 1, jnp.float32)
    weight = attention_mask.astype(jnp.float32)

    def sums(x: Float[Array, "B T inputs"]) -> Float[Array, "I b b"]:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % block_size)))
        blocks = padded.reshape(*x.shape[:2], -1, block_size)
        weighted = blocks * weight[..., None, None]
        return jnp.einsum("btic,btid->icd", blocks, weighted, precision=jax.lax.Precision.HIGHEST)

    def run(module: nn.Module, own: Params, *args: Any) -> tuple[Array, Params]:
        out, seen = module.apply({"params": own}, *args, mutable=["inputs"])
        return out, jax.tree.map(sums, seen.get("inputs", {}))

    h, of_embed = run(embed, params["embed"], input_ids, attention_mask)
    h, of_layers = jax.lax.scan(lambda h, own: run(layer, own, h, attention_mask), h, params["layers"])
    _, of_finish = run(finish, params["finish"], h)
    found = flatten_dict({"embed": of_embed, "layers": of_layers, "finish": of_finish}, sep="/")
    return {path: found[path][0] for path in maskable_paths(config)}
