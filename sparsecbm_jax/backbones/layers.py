"""The Linen modules that all families share: linear maps, norms, tables, attention, one transformer layer.

A module knows nothing of masks, of concepts or of the other layers. With `tensor_axis` set a layer holds one device's
share of the heads and of the feed-forward width, and must run inside `jax.shard_map`.

Reference: Devlin et al. 2019 (BERT), Liu et al. 2019 (RoBERTa), Sanh et al. 2019 (DistilBERT).
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, Num

from sparsecbm_jax.backbones.config import BackboneConfig
from sparsecbm_jax.backbones.dropout import dropout, fold_keys

# Each dropout site folds its number into its row's key. The embedding's number lies outside the range of layer indices,
# which are folded into the same key to make a layer's key.
EMBED_SITE = 1 << 31
PROBABILITIES_SITE, ATTENTION_SITE, FFN_SITE = range(3)


# Large enough that its exponential is zero, small enough that adding a score cannot overflow: a row that is all
# padding gets uniform probabilities, not NaN.
_MASKED = -1e30


_init = nn.initializers.truncated_normal(0.02)


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes x Φ(x) from the error function: its complement, as in `jax.nn.gelu`, takes twice as long on CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATION_FNS: dict[str, Callable[[Array], Array]] = {
    "gelu": exact_gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Linear(nn.Module):
    """x W + b; the sum over `reduce_axis` (row-parallel kernels) is taken before the bias is added once."""

    features: int
    dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    reduce_axis: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*n inputs"]) -> Float[Array, "*n outputs"]:
        """Applies the map to the last axis."""
        kernel = self.param("kernel", _init, (x.shape[-1], self.features))
        # Stored only where a caller makes the collection mutable.
        self.sow("inputs", "kernel", x)
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.reduce_axis is not None:
            y = jax.lax.psum(y, self.reduce_axis)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class LayerNorm(nn.Module):
    """LayerNorm in float32 over the last axis, with the two-pass variance."""

    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


class Table(nn.Module):
    """A lookup table; an id outside it gives NaN rather than a neighbour's row."""

    rows: int
    features: int

    def setup(self) -> None:
        """Declares the rows, which both methods below read."""
        self.embedding = self.param("embedding", _init, (self.rows, self.features))

    def __call__(self, ids: Int[Array, "*n"]) -> Float[Array, "*n features"]:
        """Looks up the rows of `ids`."""
        return jnp.take(self.embedding, ids, axis=0, mode="fill")

    def rows_from(self, start: int, count: int) -> Float[Array, "count features"]:
        """Returns `count` consecutive rows, without a gather."""
        return self.embedding[start : start + count]


def check_length(config: BackboneConfig, length: int) -> None:
    """Checks that the position table is long enough for a sequence.

    Args:
        config: The backbone's shape.
        length: Tokens in a row.

    Raises:
        ValueError: It is not.
    """
    if length > config.max_length:
        raise ValueError(
            f"input_ids has {length} tokens a row; the {config.family} backbone has positions for {config.max_length}"
        )


def visible(attention_mask: Num[Array, "B T"], causal: bool) -> Bool[Array, "B #T T"]:
    """Returns which keys each query sees: those of real tokens and, if `causal`, none behind the query."""
    seen = (attention_mask > 0)[:, None, :]
    if causal:
        length = attention_mask.shape[1]
        seen = seen & jnp.tril(jnp.ones((length, length), bool))
    return seen


def attention_scores(query: Float[Array, "B H T d"], key: Float[Array, "B H S d"]) -> Float[Array, "B H T S"]:
    """Computes the products of queries and keys, added up in float32 and left in float32 for the softmax.

    Their gradient is rounded to the operands' type before it is multiplied by them, as everywhere else. Left to itself,
    JAX would multiply in float32 here, at a fraction of the speed.
    """
    return _scores(query, key) if query.dtype == jnp.float32 else _rounded_scores(query, key)


def _scores(query: Array, key: Array) -> Array:
    return jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)


_rounded_scores = jax.custom_vjp(_scores)


def _scores_forward(query: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
    return _scores(query, key), (query, key)


def _scores_backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    query, key = operands
    gradient = gradient.astype(query.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", gradient, key), jnp.einsum("bhqk,bhqd->bhkd", gradient, query)


_rounded_scores.defvjp(_scores_forward, _scores_backward)


class Attention(nn.Module):
    """Multi-head self-attention over this device's heads."""

    config: BackboneConfig
    tensor_axis: str | None = None
    tensor_size: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, h: Float[Array, "B T D"], attention_mask: Num[Array, "B T"], keys: Key[Array, " B"] | None
    ) -> Float[Array, "B T D"]:
        """Attends from every token to those that it sees; `keys` draw the dropout of the probabilities."""
        cfg = self.config
        num_heads = cfg.num_heads // self.tensor_size
        head_size = cfg.hidden_size // cfg.num_heads
        # Heads are moved before tokens once, here: both products and their gradients are then plain batched matmuls.
        query, key, value = (
            Linear(num_heads * head_size, self.dtype, name=name)(h)
            .reshape(*h.shape[:2], num_heads, head_size)
            .transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        scores = attention_scores(query * head_size**-0.5, key)
        seen = visible(attention_mask, cfg.causal)
        scores = scores + jnp.where(seen, 0.0, _MASKED)[:, None]
        probabilities = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        if keys is not None:
            head = jnp.arange(num_heads)
            if self.tensor_axis is not None:
                head = head + jax.lax.axis_index(self.tensor_axis) * num_heads
            keys = fold_keys(fold_keys(keys, PROBABILITIES_SITE)[:, None], head)
        probabilities = dropout(probabilities, keys, cfg.attention_dropout)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", probabilities, value).transpose(0, 2, 1, 3).reshape(*h.shape[:2], -1)
        return Linear(cfg.hidden_size, self.dtype, reduce_axis=self.tensor_axis, name="output")(mixed)


class Layer(nn.Module):
    """One transformer layer: attention and feed-forward, each with its residual, norm after or before."""

    config: BackboneConfig
    tensor_axis: str | None = None
    tensor_size: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "B T D"],
        attention_mask: Num[Array, "B T"],
        *,
        keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Computes the next hidden states; see `Backbone.layer`."""
        cfg = self.config
        attention = Attention(cfg, self.tensor_axis, self.tensor_size, self.dtype, name="attention")
        attention_norm = LayerNorm(cfg.layer_norm_eps, self.dtype, name="attention_norm")
        ffn_norm = LayerNorm(cfg.layer_norm_eps, self.dtype, name="ffn_norm")
        ffn_in = Linear(cfg.intermediate_size // self.tensor_size, self.dtype, name="ffn_in")
        ffn_out = Linear(cfg.hidden_size, self.dtype, reduce_axis=self.tensor_axis, name="ffn_out")
        activation_fn = ACTIVATION_FNS[cfg.activation]

        def drop(x: Array, site: int) -> Array:
            return dropout(x, None if keys is None else fold_keys(keys, site), cfg.dropout)

        mixed = attention(attention_norm(h) if cfg.norm_first else h, attention_mask, keys)
        # DistilBERT alone has no dropout here.
        h = h + (mixed if cfg.family == "distilbert" else drop(mixed, ATTENTION_SITE))
        if not cfg.norm_first:
            h = attention_norm(h)
        hidden = ffn_out(activation_fn(ffn_in(ffn_norm(h) if cfg.norm_first else h)))
        h = h + drop(hidden, FFN_SITE)
        return h if cfg.norm_first else ffn_norm(h)
