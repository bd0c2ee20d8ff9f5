"""The shape of a backbone, read from and written to the Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparsecbm_jax.config.names import did_you_mean

FAMILIES = ("bert", "roberta", "distilbert", "opt")
ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
_OPT_POSITION_OFFSET = 2
# PyTorch's default: OPT's configuration has no key for it.
_OPT_LAYER_NORM_EPS = 1e-5
# DistilBERT writes this figure into its code.
_DISTILBERT_LAYER_NORM_EPS = 1e-12


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Static shape of an encoder or decoder; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        family: 'bert' (MiniLM too), 'roberta', 'distilbert' or 'opt'.
        vocab_size: Rows of the word embedding, V.
        hidden_size: Width of the layers, D.
        num_layers: Number of transformer layers, L.
        num_heads: Attention heads; divides `hidden_size`.
        intermediate_size: Width of the feed-forward layer, F.
        max_positions: Rows of the position table, the `position_offset` rows that no token uses included.
        position_offset: Row of the first token: 0 for BERT and DistilBERT, pad_token_id + 1 for RoBERTa, 2 for OPT.
        type_vocab_size: Rows of the token type table; 0 where the family has none.
        embedding_size: Width of the word embedding, E; differs from `hidden_size` in OPT-350M only.
        layer_norm_eps: Added to the variance in every LayerNorm.
        activation: Name of the feed-forward activation, as `transformers` spells it.
        dropout: Rate after the embeddings' norm (encoders), the attention output and the feed-forward output.
        attention_dropout: Rate on the attention probabilities.
        norm_first: True where LayerNorm comes before attention and feed-forward (OPT except 350M).
        final_norm: True where a LayerNorm follows the last layer (OPT pre-LN).
        causal: True where a token sees only itself and earlier tokens.
        pad_token_id: Id of the padding token; RoBERTa counts positions by it.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    position_offset: int = 0
    type_vocab_size: int = 0
    embedding_size: int = 0
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    norm_first: bool = False
    final_norm: bool = False
    causal: bool = False
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if not self.embedding_size:
            object.__setattr__(self, "embedding_size", self.hidden_size)
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is not supported; expected one of {', '.join(FAMILIES)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} is not supported; expected one of {', '.join(ACTIVATIONS)}"
            )
        if self.family != "opt" and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"embedding_size {self.embedding_size} differs from hidden_size {self.hidden_size}: "
                f"only OPT projects its word embeddings, not {self.family}"
            )

    @property
    def output_size(self) -> int:
        """Width of the last hidden states: E for OPT-350M, which projects back, else D."""
        return self.embedding_size

    @property
    def has_projections(self) -> bool:
        """True where word embeddings are projected to the hidden width and back (OPT-350M)."""
        return self.embedding_size != self.hidden_size

    @property
    def max_length(self) -> int:
        """Most tokens in a sequence."""
        return self.max_positions - self.position_offset

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data from which `from_dict` makes an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "BackboneConfig":
        """Makes a config from plain data: the inverse of `to_dict`.

        Args:
            data: Attributes by name; those that are absent have their defaults.

        Raises:
            ValueError: A key is unknown; the nearest known one is named.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f"unknown key {key!r} in a backbone's config{did_you_mean(key, known)}")
        return cls(**data)


def config_from_hf(hf: Mapping[str, Any]) -> BackboneConfig:
    """Reads the contents of a Hugging Face `config.json`; absent keys have the defaults of `transformers`.

    Args:
        hf: The parsed file.

    Returns:
        The config of the backbone alone, whatever head the checkpoint carries.

    Raises:
        ValueError: The model type, or a variant of a supported one, is not supported.
    """
    model_type = hf.get("model_type")
    if model_type in ("bert", "roberta"):
        return _bert_from_hf(hf, model_type)
    if model_type == "distilbert":
        return BackboneConfig(
            family="distilbert",
            vocab_size=hf.get("vocab_size", 30522),
            hidden_size=hf.get("dim", 768),
            num_layers=hf.get("n_layers", 6),
            num_heads=hf.get("n_heads", 12),
            intermediate_size=hf.get("hidden_dim", 3072),
            max_positions=hf.get("max_position_embeddings", 512),
            layer_norm_eps=_DISTILBERT_LAYER_NORM_EPS,
            activation=hf.get("activation", "gelu"),
            dropout=hf.get("dropout", 0.1),
            attention_dropout=hf.get("attention_dropout", 0.1),
            pad_token_id=_pad_token_id(hf, 0),
        )
    if model_type == "opt":
        return _opt_from_hf(hf)
    raise ValueError(f"model_type {model_type!r} is not supported; expected one of {', '.join(FAMILIES)}")


def _pad_token_id(hf: Mapping[str, Any], default: int) -> int:
    value = hf.get("pad_token_id", default)
    return default if value is None else value


def _refuse(hf: Mapping[str, Any], key: str, expected: Any) -> None:
    value = hf.get(key)
    if value is not None and value != expected:
        raise ValueError(f"{hf['model_type']}: {key} = {value!r} is not supported; expected {expected!r}")


def _bert_from_hf(hf: Mapping[str, Any], family: str) -> BackboneConfig:
    _refuse(hf, "position_embedding_type", "absolute")
    _refuse(hf, "is_decoder", False)
    is_roberta = family == "roberta"
    pad_token_id = _pad_token_id(hf, 1 if is_roberta else 0)
    return BackboneConfig(
        family=family,
        vocab_size=hf.get("vocab_size", 50265 if is_roberta else 30522),
        hidden_size=hf.get("hidden_size", 768),
        num_layers=hf.get("num_hidden_layers", 12),
        num_heads=hf.get("num_attention_heads", 12),
        intermediate_size=hf.get("intermediate_size", 3072),
        max_positions=hf.get("max_position_embeddings", 512),
        position_offset=pad_token_id + 1 if is_roberta else 0,
        type_vocab_size=hf.get("type_vocab_size", 2),
        layer_norm_eps=hf.get("layer_norm_eps", 1e-12),
        activation=hf.get("hidden_act", "gelu"),
        dropout=hf.get("hidden_dropout_prob", 0.1),
        attention_dropout=hf.get("attention_probs_dropout_prob", 0.1),
        pad_token_id=pad_token_id,
    )


def _opt_from_hf(hf: Mapping[str, Any]) -> BackboneConfig:
    _refuse(hf, "enable_bias", True)
    _refuse(hf, "layer_norm_elementwise_affine", True)
    hidden_size = hf.get("hidden_size", 768)
    norm_first = hf.get("do_layer_norm_before", True)
    return BackboneConfig(
        family="opt",
        vocab_size=hf.get("vocab_size", 50272),
        hidden_size=hidden_size,
        num_layers=hf.get("num_hidden_layers", 12),
        num_heads=hf.get("num_attention_heads", 12),
        intermediate_size=hf.get("ffn_dim", 3072),
        max_positions=hf.get("max_position_embeddings", 2048) + _OPT_POSITION_OFFSET,
        position_offset=_OPT_POSITION_OFFSET,
        embedding_size=hf.get("word_embed_proj_dim") or hidden_size,
        layer_norm_eps=_OPT_LAYER_NORM_EPS,
        activation=hf.get("activation_function", "relu"),
        dropout=hf.get("dropout", 0.1),
        attention_dropout=hf.get("attention_dropout", 0.0),
        norm_first=norm_first,
        final_norm=norm_first and not hf.get("_remove_final_layer_norm", False),
        causal=True,
        pad_token_id=_pad_token_id(hf, 1),
    )


def config_to_hf(config: BackboneConfig) -> dict[str, Any]:
    """Returns the `config.json` from which `transformers` builds the same model.

    `config_from_hf` reads an equal config from it.
    """
    common = {"vocab_size": config.vocab_size, "pad_token_id": config.pad_token_id, "dtype": "float32"}
    if config.family in ("bert", "roberta"):
        special = {"bos_token_id": 0, "eos_token_id": 2} if config.family == "roberta" else {}
        return {
            "architectures": ["RobertaModel" if config.family == "roberta" else "BertModel"],
            "model_type": config.family,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_positions,
            "type_vocab_size": config.type_vocab_size,
            "layer_norm_eps": config.layer_norm_eps,
            "hidden_act": config.activation,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            **common,
            **special,
        }
    if config.family == "distilbert":
        return {
            "architectures": ["DistilBertModel"],
            "model_type": "distilbert",
            "dim": config.hidden_size,
            "n_layers": config.num_layers,
            "n_heads": config.num_heads,
            "hidden_dim": config.intermediate_size,
            "max_position_embeddings": config.max_positions,
            "activation": config.activation,
            "dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
            **common,
        }
    return {
        "architectures": ["OPTModel"],
        "model_type": "opt",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "ffn_dim": config.intermediate_size,
        "max_position_embeddings": config.max_positions - config.position_offset,
        "word_embed_proj_dim": config.embedding_size,
        "activation_function": config.activation,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "do_layer_norm_before": config.norm_first,
        "_remove_final_layer_norm": config.norm_first and not config.final_norm,
        "bos_token_id": 2,
        "eos_token_id": 2,
        **common,
    }
