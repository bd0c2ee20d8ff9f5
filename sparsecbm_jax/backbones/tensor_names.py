"""The names that Hugging Face gives each tensor of a backbone, one table a family.

Our paths are joined by '/', theirs by '.'; `{}` stands for the layer. Their linear weights are (out, in), ours
(in, out).
"""

from typing import NamedTuple

from sparsecbm_jax.backbones.config import BackboneConfig


class TensorName(NamedTuple):
    """The tensors of a checkpoint that hold one of our leaves.

    Attributes:
        path: Our path, such as 'layers/ffn_in/kernel'.
        names: Their names, without prefix: one a layer for a stacked leaf, else a single one.
        is_stacked: True where our leaf has a leading axis of layers.
        is_transposed: True where theirs is (out, in).
        tied: Full names that hold the same tensor in checkpoints that leave out tied copies.
    """

    path: str
    names: tuple[str, ...]
    is_stacked: bool = False
    is_transposed: bool = False
    tied: tuple[str, ...] = ()


PREFIXES = {
    "bert": ("bert.", "", "model."),
    "roberta": ("roberta.", "", "model."),
    "distilbert": ("distilbert.", "", "model."),
    "opt": ("model.decoder.", "decoder.", ""),
}

# Output layers that share the word embedding.
_TIED = {
    "bert": ("cls.predictions.decoder.weight",),
    "roberta": ("lm_head.decoder.weight",),
    "distilbert": ("vocab_projector.weight",),
    "opt": ("lm_head.weight",),
}

# (ours, theirs) of modules that hold a kernel and a bias.
_BERT_LINEARS = (
    ("attention/query", "encoder.layer.{}.attention.self.query"),
    ("attention/key", "encoder.layer.{}.attention.self.key"),
    ("attention/value", "encoder.layer.{}.attention.self.value"),
    ("attention/output", "encoder.layer.{}.attention.output.dense"),
    ("ffn_in", "encoder.layer.{}.intermediate.dense"),
    ("ffn_out", "encoder.layer.{}.output.dense"),
)
_BERT_NORMS = (
    ("attention_norm", "encoder.layer.{}.attention.output.LayerNorm"),
    ("ffn_norm", "encoder.layer.{}.output.LayerNorm"),
)
_DISTILBERT_LINEARS = (
    ("attention/query", "transformer.layer.{}.attention.q_lin"),
    ("attention/key", "transformer.layer.{}.attention.k_lin"),
    ("attention/value", "transformer.layer.{}.attention.v_lin"),
    ("attention/output", "transformer.layer.{}.attention.out_lin"),
    ("ffn_in", "transformer.layer.{}.ffn.lin1"),
    ("ffn_out", "transformer.layer.{}.ffn.lin2"),
)
_DISTILBERT_NORMS = (
    ("attention_norm", "transformer.layer.{}.sa_layer_norm"),
    ("ffn_norm", "transformer.layer.{}.output_layer_norm"),
)
_OPT_LINEARS = (
    ("attention/query", "layers.{}.self_attn.q_proj"),
    ("attention/key", "layers.{}.self_attn.k_proj"),
    ("attention/value", "layers.{}.self_attn.v_proj"),
    ("attention/output", "layers.{}.self_attn.out_proj"),
    ("ffn_in", "layers.{}.fc1"),
    ("ffn_out", "layers.{}.fc2"),
)
_OPT_NORMS = (
    ("attention_norm", "layers.{}.self_attn_layer_norm"),
    ("ffn_norm", "layers.{}.final_layer_norm"),
)
_LAYER_TABLES = {
    "bert": (_BERT_LINEARS, _BERT_NORMS),
    "roberta": (_BERT_LINEARS, _BERT_NORMS),
    "distilbert": (_DISTILBERT_LINEARS, _DISTILBERT_NORMS),
    "opt": (_OPT_LINEARS, _OPT_NORMS),
}


def tensor_names(config: BackboneConfig) -> tuple[TensorName, ...]:
    """Returns every leaf of the backbone's parameters: embeddings, layers, and then the norm that follows them."""
    return _outer_names(config) + _layer_names(config)


def _outer_names(config: BackboneConfig) -> tuple[TensorName, ...]:
    is_opt = config.family == "opt"
    word, position = (
        ("embed_tokens", "embed_positions")
        if is_opt
        else (
            "embeddings.word_embeddings",
            "embeddings.position_embeddings",
        )
    )
    found = [
        TensorName("embed/word/embedding", (f"{word}.weight",), tied=_TIED[config.family]),
        TensorName("embed/position/embedding", (f"{position}.weight",)),
    ]
    if config.type_vocab_size:
        found.append(TensorName("embed/token_type/embedding", ("embeddings.token_type_embeddings.weight",)))
    if not is_opt:
        found += _norm("embed/norm", ("embeddings.LayerNorm",), is_stacked=False)
    if config.has_projections:
        found += [
            TensorName("embed/project_in/kernel", ("project_in.weight",), is_transposed=True),
            TensorName("finish/project_out/kernel", ("project_out.weight",), is_transposed=True),
        ]
    if config.final_norm:
        found += _norm("finish/norm", ("final_layer_norm",), is_stacked=False)
    return tuple(found)


def _layer_names(config: BackboneConfig) -> tuple[TensorName, ...]:
    linears, norms = _LAYER_TABLES[config.family]
    found = []
    for ours, theirs in linears:
        modules = [theirs.format(index) for index in range(config.num_layers)]
        kernels, biases = (tuple(f"{module}.{kind}" for module in modules) for kind in ("weight", "bias"))
        found += [
            TensorName(f"layers/{ours}/kernel", kernels, is_stacked=True, is_transposed=True),
            TensorName(f"layers/{ours}/bias", biases, is_stacked=True),
        ]
    for ours, theirs in norms:
        modules = [theirs.format(index) for index in range(config.num_layers)]
        found += _norm(f"layers/{ours}", tuple(modules), is_stacked=True)
    return tuple(found)


def _norm(path: str, modules: tuple[str, ...], *, is_stacked: bool) -> list[TensorName]:
    return [
        TensorName(f"{path}/scale", tuple(f"{module}.weight" for module in modules), is_stacked),
        TensorName(f"{path}/bias", tuple(f"{module}.bias" for module in modules), is_stacked),
    ]
