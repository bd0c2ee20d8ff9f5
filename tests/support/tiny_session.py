"""What the live page's tests serve: a tiny model that reads a few tokens, texts held out, and one that is hostile."""

import dataclasses

import numpy as np

from sparsecbm_jax.correction.request_file import CorrectionRequest
from sparsecbm_jax.data.batches import Batch, eval_batches, tokenize
from sparsecbm_jax.data.schema import Examples
from sparsecbm_jax.model.predictions import predict
from sparsecbm_jax.model.sparse_cbm import SparseCBM

from tests.support.tiny_model import TEXTS, tiny_model

HOSTILE = """</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"> 'a' & {{ 7 * 7 }}"""


def model() -> SparseCBM:
    """Reads texts padded or cut to 24 tokens: one width to compile for, which is other tests' too."""
    return dataclasses.replace(tiny_model(num_layers=1), metadata={"max_length": 24, "buckets": (24,)})


def sample() -> Examples:
    return Examples(TEXTS, np.zeros((4, 3), np.int32), np.zeros(4, np.int32), None, np.arange(4, dtype=np.int32) + 7)


def anchors() -> list[Batch]:
    """Two texts, the others are for corrections."""
    held = sample()._replace(texts=TEXTS[1::2], concepts=np.zeros((2, 3), np.int32), labels=np.zeros(2, np.int32))
    tokens = tokenize(held._replace(row_ids=np.arange(2, dtype=np.int32)), model().tokenizer, 24)
    return list(eval_batches(tokens, batch_size=1, buckets=(24,)))


def asked_otherwise(text: str, concept: str, off: int = 1) -> CorrectionRequest:
    """A correction to a class that the text is not read as."""
    schema = model().schema
    read = predict(model(), [text]).concepts[0, schema.concepts.index(concept)]
    return CorrectionRequest(text, concept, schema.classes[(read + off) % schema.num_classes])
