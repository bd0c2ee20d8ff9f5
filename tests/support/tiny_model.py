"""A whole random SparseCBM of a few thousand weights, with a vocabulary made on the spot."""

import functools

import jax
import numpy as np

from sparsecbm_jax.backbones import BackboneConfig, init_params, maskable_paths
from sparsecbm_jax.core.trees import leaf_at
from sparsecbm_jax.data.schema import Schema
from sparsecbm_jax.data.tokenizers import train_wordpiece
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.heads import init_heads
from sparsecbm_jax.model.mean_activations import MeanActivations
from sparsecbm_jax.model.sparse_cbm import SparseCBM

TEXTS = (
    "The food was great, but the waiter was rude.",
    "Lovely ambiance and good service!",
    "Wasn't well-made: the soup cost $3.50 and was cold.",
    "great",
)
SCHEMA = Schema(
    concepts=("food", "ambiance", "service"),
    labels=("bad", "fine"),
    text_column="text",
    label_column="label",
    concept_columns=("food", "ambiance", "service"),
)


@functools.cache
def tiny_model(
    num_layers: int = 2, strategy: str = "sparse", density: float = 0.6, dtype: str = "float32"
) -> SparseCBM:
    """A random BERT of width 16 whose weights are large enough for texts to matter; each mask keeps about `density`."""
    tokenizer = train_wordpiece([text for text in TEXTS for _ in range(2)], vocab_size=80)
    backbone = BackboneConfig(
        family="bert",
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_layers=num_layers,
        num_heads=2,
        intermediate_size=24,
        max_positions=40,
        type_vocab_size=2,
        dropout=0.0,
        attention_dropout=0.0,
    )
    config = CBMConfig(backbone, SCHEMA.num_concepts, SCHEMA.num_classes, SCHEMA.num_labels, dtype=dtype)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf * 12.0 if leaf.ndim > 1 else leaf, init_params(jax.random.key(0), backbone))
    heads = init_heads(jax.random.key(1), config, has_bottleneck=strategy != "standard")
    heads = jax.tree.map(lambda leaf: leaf + 0.1, heads)
    masks = None
    if strategy == "sparse":
        masks = {
            path: jax.numpy.asarray(rng.random((config.num_concepts, *leaf_at(params, path).shape)) < density)
            for path in maskable_paths(backbone)
        }
    means = MeanActivations(0.1 * rng.normal(size=(3, 3)), 0.1 * rng.normal(size=(3, 3, 3)))
    return SparseCBM(config, params, masks, heads, SCHEMA, tokenizer, strategy, means.to_metadata())
