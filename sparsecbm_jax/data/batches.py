"""Text to arrays: tokens in length buckets, in an order that is a pure function of (seed, epoch) and can be resumed.

A batch is as wide as the smallest bucket that holds its longest text and always B rows high; rows that only fill it up
have `example_weight` 0. Texts of similar length share batches, so that little of a batch is padding.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sparsecbm_jax.config.run_config import PrunerConfig
from sparsecbm_jax.data.schema import MISSING, Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BUCKETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WINDOW_BATCHES = 50


logger = logging.getLogger(__name__)


class TeacherLogits(NamedTuple):
    """What another model says of a batch's texts: u_k of its concepts, and y of its label."""

    concepts: Float[Any, "B K C"]
    label: Float[Any, "B Y"]


class Batch(NamedTuple):
    """Holds one step's input: NumPy arrays here, jax arrays once they are on a device.

    Concepts and label are -1 where there is no label; `example_weight` is 0 on rows that only fill the batch up.
    `teacher` is there while a model is distilled.
    """

    input_ids: Int[Any, "B T"]
    attention_mask: Int[Any, "B T"]
    concepts: Int[Any, "B K"]
    label: Int[Any, " B"]
    example_weight: Float[Any, " B"]
    row_ids: Int[Any, " B"]
    teacher: TeacherLogits | None = None


@dataclasses.dataclass(frozen=True)
class Process:
    """Names one of the processes that read the same batches; each yields consecutive rows of its own of every batch.

    Attributes:
        index: this process, from 0.
        count: the number of processes; divides the rows of a batch.
    """

    index: int = 0
    count: int = 1


class Tokenized(NamedTuple):
    """Holds a split as token ids: text n is `tokens[starts[n]:starts[n + 1]]`, special tokens included."""

    tokens: Int[np.ndarray, " M"]
    starts: Int[np.ndarray, " N+1"]
    concepts: Int[np.ndarray, "N K"]
    labels: Int[np.ndarray, " N"]
    row_ids: Int[np.ndarray, " N"]
    pad_token_id: int
    max_length: int
    num_truncated: int

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Number of tokens of each text."""
        return np.diff(self.starts)

    @property
    def num_examples(self) -> int:
        """Number of texts, N."""
        return len(self.row_ids)


def tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenized:
    """Turns texts to token ids, cut at `max_length`; how many were cut is kept and logged.

    Args:
        examples: a split.
        tokenizer: a fast tokeniser with a pad token, as `load_tokenizer` gives it.
        max_length: most tokens of a text, special tokens included; at least 3.
    """
    if max_length < 3:
        raise ValueError(f"max_length is {max_length}: at least 3 is expected, two special tokens and one of the text")
    ids: list[Sequence[int]] = []
    num_truncated = 0
    if examples.texts:
        encoded = tokenizer(
            list(examples.texts),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids = encoded["input_ids"]
        num_truncated = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    if num_truncated:
        logger.warning("%d of %d texts are cut at max_length = %d tokens", num_truncated, len(ids), max_length)
    starts = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(row) for row in ids], out=starts[1:])
    return Tokenized(
        tokens=np.fromiter((token for row in ids for token in row), np.int32, int(starts[-1])),
        starts=starts,
        concepts=examples.concepts.astype(np.int32),
        labels=examples.labels.astype(np.int32),
        row_ids=examples.row_ids.astype(np.int32),
        pad_token_id=int(tokenizer.pad_token_id),
        max_length=max_length,
        num_truncated=num_truncated,
    )


def num_batches(num_examples: int, batch_size: int) -> int:
    """Returns the number of batches of an epoch, the last of which may be partly padding.

    >>> num_batches(17, 8)
    3
    """
    return -(-num_examples // batch_size)


def bucket_length(length: int, buckets: Sequence[int] = BUCKETS) -> int:
    """Returns the width that a batch with a text of `length` tokens gets: a bucket, or a multiple of the last one.

    >>> [bucket_length(n) for n in (1, 16, 17, 512, 513)]
    [16, 16, 24, 512, 1024]
    """
    for bucket in buckets:
        if length <= bucket:
            return bucket
    return -(-length // buckets[-1]) * buckets[-1]


def train_batches(
    tokenized: Tokenized,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start_batch: int = 0,
    buckets: Sequence[int] = BUCKETS,
    process: Process = Process(),
) -> Iterator[Batch]:
    """Yields an epoch's batches in an order that depends on (seed, epoch) alone.

    Rows are permuted, sorted by length within windows of 50 batches, cut into batches, and the batches are shuffled.
    Every row comes exactly once.

    Args:
        tokenized: the train split.
        batch_size: rows of a batch over all processes, B.
        seed: the run's seed.
        epoch: epoch, from 0.
        start_batch: batches already done; the rest are the same as without it.
        buckets: widths of a batch, rising.
        process: this process; all of them see the same order and the same widths.

    Raises:
        ValueError: if the processes do not divide the rows.
    """
    local = _local_rows(batch_size, process)
    order = _train_order(tokenized.lengths, batch_size, seed, epoch)
    return (_make_batch(tokenized, rows, local, batch_size, buckets) for rows in order[start_batch:])


def eval_batches(
    tokenized: Tokenized,
    *,
    batch_size: int,
    buckets: Sequence[int] = BUCKETS,
    process: Process = Process(),
) -> Iterator[Batch]:
    """Yields every row exactly once, shortest texts first; arguments as in `train_batches`."""
    local = _local_rows(batch_size, process)
    order = np.argsort(tokenized.lengths, kind="stable")
    return (_make_batch(tokenized, rows, local, batch_size, buckets) for rows in _chunks(order, batch_size))


def batch_of(
    tokenized: Tokenized,
    rows: Sequence[int] | Int[np.ndarray, " n"],
    *,
    batch_size: int | None = None,
    buckets: Sequence[int] = BUCKETS,
) -> Batch:
    """Returns some rows of a split as one batch, in their order; `batch_size` rows high where that is given."""
    chosen = np.asarray(rows, np.int64)
    size = len(chosen) if batch_size is None else batch_size
    if not 1 <= len(chosen) <= size:
        raise ValueError(f"{len(chosen)} rows do not make a batch of {size}; expected 1 to {size}")
    return _make_batch(tokenized, chosen, slice(0, size), size, buckets)


def _local_rows(batch_size: int, process: Process) -> slice:
    if batch_size < 1 or batch_size % process.count:
        raise ValueError(f"batch_size = {batch_size} is not a positive multiple of process_count = {process.count}")
    if not 0 <= process.index < process.count:
        raise ValueError(f"process_index = {process.index} is not in [0, process_count = {process.count})")
    rows = batch_size // process.count
    return slice(process.index * rows, (process.index + 1) * rows)


def _chunks(rows: Int[np.ndarray, " N"], size: int) -> list[Int[np.ndarray, " n"]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _train_order(lengths: Int[np.ndarray, " N"], batch_size: int, seed: int, epoch: int) -> list[Int[np.ndarray, " n"]]:
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    # A window is a whole number of batches, so only the very last batch of an epoch can be partial.
    windows = _chunks(rng.permutation(len(lengths)), WINDOW_BATCHES * batch_size)
    batches = [rows for w in windows for rows in _chunks(w[np.argsort(lengths[w], kind="stable")], batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _make_batch(
    tokenized: Tokenized,
    rows: Int[np.ndarray, " n"],
    local: slice,
    batch_size: int,
    buckets: Sequence[int],
) -> Batch:
    lengths = tokenized.lengths[rows]
    # Never wider than max_length: the backbone may have no positions beyond it.
    width = min(bucket_length(int(lengths.max()), buckets), tokenized.max_length)
    count = len(rows)
    input_ids = np.full((batch_size, width), tokenized.pad_token_id, np.int32)
    attention_mask = np.zeros((batch_size, width), np.int32)
    # A row with no token at all would make 0/0 of its mean, and NaN survives a weight of 0.
    attention_mask[count:, 0] = 1
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        start = tokenized.starts[row]
        input_ids[i, :length] = tokenized.tokens[start : start + length]
        attention_mask[i, :length] = 1
    fill = batch_size - count
    batch = Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        concepts=np.pad(tokenized.concepts[rows], ((0, fill), (0, 0)), constant_values=MISSING),
        label=np.pad(tokenized.labels[rows], (0, fill), constant_values=MISSING),
        example_weight=np.pad(np.ones(count, np.float32), (0, fill)),
        row_ids=np.pad(tokenized.row_ids[rows], (0, fill), constant_values=-1),
    )
    return Batch(*(array[local] for array in batch if array is not None))


_FISHER_BUCKETS = (32, 64, 128, 256, 512)


def fisher_batches(split: Tokenized, config: PrunerConfig, *, seed: int, event: int = 0) -> list[Batch]:
    """Makes the batches that the gradients of an event are taken from, in an order that depends on (seed, event) alone.

    Rows come in few widths, so that few programs are compiled; a batch that padding fills up is left out where there
    are whole ones.

    Args:
        split: the train split.
        config: of it `num_grads`, `grad_batch_size` and `per_example` count.
        seed: the run's seed.
        event: number of the pruning event, from 0.
    """
    wanted = num_fisher_batches(config)
    batches: list[Batch] = []
    while len(batches) < wanted:
        in_order = list(
            train_batches(
                split,
                batch_size=config.grad_batch_size,
                seed=seed,
                epoch=10_000 + 100 * event + len(batches),
                buckets=_FISHER_BUCKETS,
            )
        )
        whole = [batch for batch in in_order if batch.example_weight.all()]
        batches += (whole or in_order)[: wanted - len(batches)]
    return batches


def num_fisher_batches(config: PrunerConfig) -> int:
    """Counts the minibatches that hold `num_grads` gradients."""
    return int(np.ceil(config.num_grads / config.grad_batch_size)) if config.per_example else config.num_grads
