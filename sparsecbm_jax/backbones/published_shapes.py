"""The shapes of published checkpoints, for code that needs only shapes: nothing is downloaded or read."""

from collections.abc import Mapping
from typing import Any

from sparsecbm_jax.backbones.config import BackboneConfig, config_from_hf

# (hidden_size, num_hidden_layers, num_attention_heads); the feed-forward layers are four times as wide.
_OPT = {
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32),
    "6.7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "66b": (9216, 64, 72),
}
_ENCODERS: dict[str, Mapping[str, Any]] = {
    "bert-base-uncased": {"model_type": "bert"},
    "roberta-base": {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1},
    "distilbert-base-uncased": {"model_type": "distilbert"},
    "minilm": {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
}
PUBLISHED = (*_ENCODERS, *(f"facebook/opt-{size}" for size in _OPT))


def published_config(name: str) -> BackboneConfig:
    """Returns the shape of a published checkpoint.

    Args:
        name: The checkpoint's name on the hub, one of `PUBLISHED`.

    Raises:
        ValueError: The name is none of `PUBLISHED`.
    """
    if name in _ENCODERS:
        return config_from_hf(_ENCODERS[name])
    if name not in PUBLISHED:
        raise ValueError(f"the shape of backbone {name!r} is not known here; expected one of {', '.join(PUBLISHED)}")
    hidden, layers, heads = _OPT[name.removeprefix("facebook/opt-")]
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * hidden}
    # OPT-350M alone has its norms after the residual and narrower word embeddings.
    special = {"do_layer_norm_before": False, "word_embed_proj_dim": 512} if hidden == 1024 else {}
    return config_from_hf({"model_type": "opt", **shape, **special})
