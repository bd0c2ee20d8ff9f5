"""The BERT family (BERT, RoBERTa, DistilBERT, MiniLM): *embed* and *finish*."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Num

from sparsecbm_jax.backbones.config import BackboneConfig
from sparsecbm_jax.backbones.dropout import dropout, fold_keys
from sparsecbm_jax.backbones.layers import EMBED_SITE, LayerNorm, Table, check_length


class EncoderEmbed(nn.Module):
    """The sum of word, position and token type 0 embeddings, normalised."""

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
        del attention_mask
        cfg = self.config
        length = input_ids.shape[1]
        check_length(cfg, length)
        word = Table(cfg.vocab_size, cfg.hidden_size, name="word")
        position = Table(cfg.max_positions, cfg.hidden_size, name="position")
        h = word(input_ids) if word_embeddings is None else word_embeddings
        if cfg.type_vocab_size:
            h = h + Table(cfg.type_vocab_size, cfg.hidden_size, name="token_type").rows_from(0, 1)
        if cfg.family == "roberta":
            # As in transformers: padding is found by its id, not by attention_mask, and has the padding row's position.
            is_token = (input_ids != cfg.pad_token_id).astype(jnp.int32)
            h = h + position(jnp.cumsum(is_token, axis=1) * is_token + cfg.pad_token_id)
        else:
            h = h + position.rows_from(0, length)
        h = LayerNorm(cfg.layer_norm_eps, self.dtype, name="norm")(h)
        return dropout(h, None if keys is None else fold_keys(keys, EMBED_SITE), cfg.dropout)


class EncoderFinish(nn.Module):
    """The identity in float32: the encoders end with their last layer."""

    config: BackboneConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the last layer's output in float32; see `Backbone.finish`."""
        return h.astype(jnp.float32)
