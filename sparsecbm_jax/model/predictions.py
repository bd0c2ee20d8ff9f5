"""Predictions for texts."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.data.batches import Batch, eval_batches, tokenize
from sparsecbm_jax.data.schema import MISSING, Examples
from sparsecbm_jax.model.config import CBMOutput
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.sparse_cbm import SparseCBM

_FEW = 8
_pack = jax.jit(masks_lib.pack)


class Predictions(NamedTuple):
    """The result of `predict`, in the order of the texts. K is 0 for a model without concepts.

    Attributes:
        concept_probabilities, label_probabilities: calibrated probabilities.
        concepts, labels: the most probable class and label.
        is_unsure, is_label_unsure: True where their probability is below the model's threshold; see
            `model.reliability`.
    """

    concept_probabilities: Float[np.ndarray, "N K C"]
    label_probabilities: Float[np.ndarray, "N Y"]
    concepts: Int[np.ndarray, "N K"]
    labels: Int[np.ndarray, " N"]
    is_unsure: Bool[np.ndarray, "N K"]
    is_label_unsure: Bool[np.ndarray, " N"]


@jax.jit
def _probabilities(output: CBMOutput) -> tuple[Float[Array, "B K C"], Float[Array, "B Y"]]:
    # Concepts are trained with a softmax cross-entropy on u, so softmax(u), and not σ(u), are their probabilities.
    return jax.nn.softmax(output.concept_logits, axis=-1), jax.nn.softmax(output.label_logits, axis=-1)


def check_texts(texts: Sequence[str], start: int = 0) -> None:
    """Refuses what is not a sequence of texts with something in them; `start` is the first one's index in messages.

    Raises:
        TypeError: a single string, or an element that is no string; its index is named.
        ValueError: an element that is empty or white space; its index is named.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(f"texts is one {type(texts).__name__}, expected a sequence of texts: [text]")
    for index, text in enumerate(texts, start):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] is a {type(text).__name__}, expected a str")
        if not text.strip():
            raise ValueError(f"texts[{index}] is {text!r}, expected a text that is not empty")


def text_batches(model: SparseCBM, texts: Sequence[str], *, batch_size: int, start: int = 0) -> Iterator[Batch]:
    """Makes batches of texts without labels; `row_ids` are positions in `texts`, in messages counted from `start`.

    Raises:
        TypeError, ValueError: if an element is no text, is empty, cannot be encoded, or holds nothing that the
            tokeniser reads; its position is named.
    """
    check_texts(texts, start)
    for n, text in enumerate(texts, start):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"texts[{n}] is not valid Unicode: character {error.start} is a lone surrogate") from error
    cells = np.full((len(texts), model.config.num_concepts), MISSING, np.int32)
    labels, row_ids = np.full(len(texts), MISSING, np.int32), np.arange(len(texts), dtype=np.int32)
    examples = Examples(tuple(texts), cells, labels, None, row_ids)
    tokenized = tokenize(examples, model.tokenizer, model.max_length)
    for n in np.flatnonzero(tokenized.lengths <= model.tokenizer.num_special_tokens_to_add()).tolist():
        raise ValueError(f"texts[{start + n}] is {texts[n][:40]!r}, in which the tokeniser finds nothing to read")
    return eval_batches(tokenized, batch_size=batch_size, buckets=model.buckets)


def predict(model: SparseCBM, texts: Sequence[str], batch_size: int = 32, *, mesh: Mesh | None = None) -> Predictions:
    """Predicts the concepts and the label of texts.

    A text's prediction does not depend on the texts beside it, but for the rounding of float32 sums over other
    paddings.

    Args:
        model: the model.
        texts: any number of texts, none too.
        batch_size: most texts in one pass.
        mesh: the mesh that the model was loaded onto, if any.

    Returns:
        Probabilities and most probable classes, in the order of the texts.

    Raises:
        TypeError, ValueError: as `text_batches`.
    """
    texts = texts if isinstance(texts, str | bytes) else list(texts)
    check_texts(texts)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    num_texts, num_concepts = len(texts), 0 if "classifier" in model.heads else model.config.num_concepts
    concept_probabilities = np.zeros((num_texts, num_concepts, model.config.num_classes), np.float32)
    label_probabilities = np.zeros((num_texts, model.config.num_labels), np.float32)
    if num_texts:
        forward = make_forward(model.config, mesh)
        arrays = model.arrays._replace(masks=None if model.masks is None else _pack(model.masks))
        for batch in text_batches(model, texts, batch_size=_num_rows(num_texts, batch_size, mesh)):
            parts = _probabilities(forward(arrays, batch))
            concept_part, label_part = (sharding.to_host(part) for part in parts)
            real = batch.example_weight > 0
            concept_probabilities[batch.row_ids[real]] = concept_part[real]
            label_probabilities[batch.row_ids[real]] = label_part[real]
    reliability = model.reliability
    return Predictions(
        concept_probabilities,
        label_probabilities,
        concept_probabilities.argmax(axis=-1).astype(np.int32),
        label_probabilities.argmax(axis=-1).astype(np.int32),
        concept_probabilities.max(axis=-1) < reliability.concept_thresholds[:num_concepts],
        label_probabilities.max(axis=-1) < reliability.label_threshold,
    )


def _num_rows(num_texts: int, batch_size: int, mesh: Mesh | None) -> int:
    """Returns the rows of a batch: one of three sizes, since each is compiled, and whole rows for every device."""
    rows = min(1 if num_texts == 1 else _FEW if num_texts <= _FEW else batch_size, batch_size)
    devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // devices) * devices
