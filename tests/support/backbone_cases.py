"""Tiny Hugging Face configs of every family, batches for them, and the bridge to PyTorch's parameters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from sparsecbm_jax.backbones import Backbone, BackboneConfig, Params, encode_dense, init_params
from sparsecbm_jax.backbones.tensor_names import tensor_names

VOCAB_SIZE = 61
_BERT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
_OPT = {
    "model_type": "opt",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 22,
    "word_embed_proj_dim": 32,
}
HF_CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **_BERT},
    "bert-gelu-new": {"model_type": "bert", **_BERT, "hidden_act": "gelu_new", "type_vocab_size": 1},
    "roberta": {"model_type": "roberta", **_BERT, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": VOCAB_SIZE,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 24,
    },
    "opt": _OPT,
    "opt-350m": {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "opt-no-final-norm": {**_OPT, "_remove_final_layer_norm": True},
}
FAMILIES = ("bert", "roberta", "distilbert", "opt", "opt-350m")


class TokenBatch(NamedTuple):
    """Right-padded rows of random ids."""

    input_ids: np.ndarray
    attention_mask: np.ndarray


def token_batch(pad_token_id: int, lengths: tuple[int, ...] = (11, 4, 7), width: int = 11, seed: int = 0) -> TokenBatch:
    """Rows of the given lengths; no real token is the padding token."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, VOCAB_SIZE, (len(lengths), width))
    mask = (np.arange(width) < np.asarray(lengths)[:, None]).astype(np.int32)
    return TokenBatch(np.where(mask, ids, pad_token_id).astype(np.int32), mask)


@functools.cache
def random_params(config: BackboneConfig, seed: int = 0) -> Params:
    """Parameters off their neutral start, as numpy arrays: nothing to compile."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))

    def draw(path: tuple[str, ...], leaf: Any) -> np.ndarray:
        return (rng.normal(scale=0.1, size=leaf.shape) + (path[-1] == "scale")).astype(np.float32)

    return {"finish": {}} | traverse_util.path_aware_map(draw, shapes)


@functools.cache
def encode_fn(backbone: Backbone) -> Callable[..., jax.Array]:
    """`encode_dense`, compiled once for all tests."""
    return jax.jit(functools.partial(encode_dense, backbone))


def torch_model(hf: Mapping[str, Any], seed: int = 0, scale: float = 3.0) -> Any:
    """A random PyTorch model in eval mode, every parameter moved off its neutral start (zero biases, unit scales)."""
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(seed)
    kind = dict(hf)
    model = AutoModel.from_config(AutoConfig.for_model(kind.pop("model_type"), **kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() > 1 else 1.0).add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def tree_of(config: BackboneConfig, tensors: Mapping[str, np.ndarray], prefix: str = "") -> Params:
    """PyTorch's tensors, by name, in our tree: what `load_pretrained` does, written the plain way."""
    flat = {}
    for tensor in tensor_names(config):
        values = [np.asarray(tensors[prefix + name]) for name in tensor.names]
        values = [value.T if tensor.is_transposed else value for value in values]
        flat[tensor.path] = np.stack(values) if tensor.is_stacked else values[0]
    return {"embed": {}, "layers": {}, "finish": {}} | traverse_util.unflatten_dict(flat, sep="/")


def torch_prefix(config: BackboneConfig) -> str:
    """What precedes the names of a bare PyTorch model."""
    return "decoder." if config.family == "opt" else ""


def torch_params(config: BackboneConfig, model: Any) -> Params:
    """A copy of the parameters of a PyTorch model, in our tree."""
    tensors = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    return tree_of(config, tensors, torch_prefix(config))
