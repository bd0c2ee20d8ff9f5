"""The modules of OPT that differ from the encoders': positions counted over real tokens, projections, the final norm.

Reference: Zhang et al. 2022 (OPT). OPT-350M has its norms after the residual, and word embeddings narrower than its
layers.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Num

from sparsecbm_jax.backbones.config import BackboneConfig
from sparsecbm_jax.backbones.layers import LayerNorm, Linear, Table, check_length


class OPTEmbed(nn.Module):
    """The sum of projected word embedding and position embedding, with neither norm nor dropout."""

    config: BackboneConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Num[Array, "B T"],
        *,
        keys: Key[Array, " B"] | None = None,
        word_embeddings: Float[Array, "B T E"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Embeds token ids; see `Backbone.embed`."""
        del keys
        cfg = self.config
        check_length(cfg, input_ids.shape[1])
        word = Table(cfg.vocab_size, cfg.embedding_size, name="word")
        position = Table(cfg.max_positions, cfg.hidden_size, name="position")
        h = word(input_ids) if word_embeddings is None else word_embeddings
        if cfg.has_projections:
            h = Linear(cfg.hidden_size, self.dtype, use_bias=False, name="project_in")(h)
        is_token = (attention_mask > 0).astype(jnp.int32)
        ids = jnp.cumsum(is_token, axis=1) * is_token - 1 + cfg.position_offset
        return (h + position(ids)).astype(self.dtype)


class OPTFinish(nn.Module):
    """The final norm of the pre-LN sizes, and OPT-350M's projection back to the embedding's width."""

    config: BackboneConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "B T D"]) -> Float[Array, "B T out"]:
        """Turns the last layer's output into the last hidden states; see `Backbone.finish`."""
        cfg = self.config
        if cfg.final_norm:
            # float32 unless a matmul follows: pooling and heads need the norm's full precision.
            dtype = self.dtype if cfg.has_projections else jnp.float32
            h = LayerNorm(cfg.layer_norm_eps, dtype, name="norm")(h)
        if cfg.has_projections:
            h = Linear(cfg.embedding_size, self.dtype, use_bias=False, name="project_out")(h)
        return h.astype(jnp.float32)
