"""Texts, concepts and labels: sources, schemas, statistics, tokenisers and batches."""

from sparsecbm_jax.data.batches import BUCKETS, Batch, Tokenized, eval_batches, num_batches, tokenize, train_batches
from sparsecbm_jax.data.presets import PRESETS
from sparsecbm_jax.data.schema import DataError, Dataset, Examples, Schema
from sparsecbm_jax.data.sources import check_trainable, load_dataset, read_dataset
from sparsecbm_jax.data.synthetic.reviews import sample_reviews, synthetic_reviews
from sparsecbm_jax.data.tokenizers import load_tokenizer, train_wordpiece

__all__ = [
    "BUCKETS",
    "PRESETS",
    "Batch",
    "DataError",
    "Dataset",
    "Examples",
    "Schema",
    "Tokenized",
    "check_trainable",
    "eval_batches",
    "load_dataset",
    "load_tokenizer",
    "num_batches",
    "read_dataset",
    "sample_reviews",
    "synthetic_reviews",
    "tokenize",
    "train_batches",
    "train_wordpiece",
]
