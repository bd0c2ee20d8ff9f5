"""Batches: every row once, an order that is a function of (seed, epoch), widths from buckets, shares of hosts."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import chex
import jax
import numpy as np
import pytest

from sparsecbm_jax.data.batches import (
    BUCKETS,
    Batch,
    Process,
    Tokenized,
    bucket_length,
    eval_batches,
    num_batches,
    tokenize,
    train_batches,
)
from sparsecbm_jax.data.schema import Examples
from sparsecbm_jax.data.synthetic.reviews import sample_reviews
from sparsecbm_jax.data.tokenizers import load_tokenizer, train_wordpiece

TEXTS = ("the soup was good", "the service was bad and it was not friendly but the food was great .", "loud")
SIZES = [(1, 4), (7, 4), (8, 4), (403, 4), (1000, 8)]


def _tokenized(num_examples: int, num_concepts: int = 3, longest: int = 60) -> Tokenized:
    """Rows that can be told apart: text n is `length` tokens that all equal n + 10."""
    rng = np.random.default_rng(num_examples)
    lengths = rng.integers(3, longest + 1, num_examples)
    ids = np.arange(num_examples, dtype=np.int32)
    return Tokenized(
        tokens=np.repeat(ids + 10, lengths),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        concepts=np.stack([ids % 3] * num_concepts, axis=1),
        labels=ids % 5,
        row_ids=ids,
        pad_token_id=0,
        max_length=longest,
        num_truncated=0,
    )


def _all_batches(tokenized: Tokenized, batch_size: int, kind: str, **kwargs: Any) -> list[Batch]:
    if kind == "eval":
        return list(eval_batches(tokenized, batch_size=batch_size, **kwargs))
    return list(train_batches(tokenized, batch_size=batch_size, seed=1, epoch=2, **kwargs))


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_every_row_comes_once_with_its_own_values(num_examples: int, batch_size: int, kind: str) -> None:
    tokenized = _tokenized(num_examples)
    batches = _all_batches(tokenized, batch_size, kind)
    assert len(batches) == num_batches(num_examples, batch_size)
    seen = []
    for batch in batches:
        height, width = batch.input_ids.shape
        assert height == batch_size
        real = batch.example_weight == 1
        seen += batch.row_ids[real].tolist()
        lengths = tokenized.lengths[batch.row_ids[real]]
        assert width == min(bucket_length(lengths.max()), tokenized.max_length)
        np.testing.assert_array_equal(batch.attention_mask[real].sum(1), lengths)
        expected = np.where(batch.attention_mask[real], batch.row_ids[real][:, None] + 10, 0)
        np.testing.assert_array_equal(batch.input_ids[real], expected)
        np.testing.assert_array_equal(batch.label[real], batch.row_ids[real] % 5)
        np.testing.assert_array_equal(batch.concepts[real], np.stack([batch.row_ids[real] % 3] * 3, axis=1))
    assert sorted(seen) == list(range(num_examples))


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_rows_that_fill_a_batch_up_carry_no_label_and_no_weight(kind: str) -> None:
    partial = [b for b in _all_batches(_tokenized(9), 4, kind) if b.example_weight.sum() < 4]
    assert len(partial) == 1
    (batch,) = partial
    np.testing.assert_array_equal(batch.example_weight, [1, 0, 0, 0])
    np.testing.assert_array_equal(batch.row_ids[1:], [-1, -1, -1])
    np.testing.assert_array_equal(batch.label[1:], [-1, -1, -1])
    assert (batch.concepts[1:] == -1).all()
    # One token each, so that a masked mean or softmax over them is finite.
    np.testing.assert_array_equal(batch.attention_mask[1:].sum(1), [1, 1, 1])


def test_dtypes_are_fixed() -> None:
    (batch,) = _all_batches(_tokenized(3), 4, "train")
    assert [array.dtype for array in batch if array is not None] == [np.int32] * 4 + [np.float32, np.int32]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    tokenized = _tokenized(200)

    def order(seed: int, epoch: int) -> list[int]:
        batches = train_batches(tokenized, batch_size=4, seed=seed, epoch=epoch)
        return np.concatenate([batch.row_ids for batch in batches]).tolist()

    orders = {(seed, epoch): order(seed, epoch) for seed, epoch in itertools.product((0, 1), (0, 1))}
    assert all(orders[key] == order(*key) for key in orders)
    assert len({tuple(rows) for rows in orders.values()}) == 4


def test_order_is_the_same_on_every_machine() -> None:
    batches = train_batches(_tokenized(12), batch_size=4, seed=0, epoch=0)
    assert [batch.row_ids.tolist() for batch in batches] == PINNED_ORDER


# A resumed run has to see these; a change of this constant breaks every checkpoint that was saved in mid-epoch.
PINNED_ORDER = [[4, 7, 5, 6], [8, 0, 3, 2], [11, 1, 9, 10]]


@pytest.mark.parametrize("start_batch", [0, 1, 24, 25])
def test_resumed_epoch_has_the_same_remaining_batches(start_batch: int) -> None:
    tokenized = _tokenized(98)
    whole = _all_batches(tokenized, 4, "train")
    rest = _all_batches(tokenized, 4, "train", start_batch=start_batch)
    assert len(whole) == 25 and len(rest) == 25 - start_batch
    for expected, batch in zip(whole[start_batch:], rest, strict=True):
        chex.assert_trees_all_equal(expected, batch)


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_hosts_share_the_rows_of_every_batch(kind: str, process_count: int) -> None:
    tokenized = _tokenized(101)
    whole = _all_batches(tokenized, 8, kind)
    parts = [_all_batches(tokenized, 8, kind, process=Process(p, process_count)) for p in range(process_count)]
    for expected, *shares in zip(whole, *parts, strict=True):
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *shares)
        chex.assert_trees_all_equal(expected, joined)


def test_grouping_by_length_saves_padding() -> None:
    tokenized = _tokenized(2000, longest=120)

    def padded(batches: list[Batch]) -> int:
        return sum(batch.input_ids.size for batch in batches)

    real = int(tokenized.lengths.sum())
    shuffled = np.random.default_rng(0).permutation(tokenized.lengths).reshape(-1, 8)
    at_random = sum(8 * bucket_length(int(row.max())) for row in shuffled)
    grouped = padded(_all_batches(tokenized, 8, "train"))
    assert real < grouped < 1.25 * real < at_random
    # Widths still vary from step to step: the batches are shuffled after the sort.
    widths = [batch.input_ids.shape[1] for batch in _all_batches(tokenized, 8, "train")]
    assert widths[:50] != sorted(widths[:50])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 6, "process": Process(0, 4)}, "batch_size = 6 is not a positive multiple of process_count = 4"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 4, "process": Process(2, 2)}, "process_index = 2 is not in"),
    ],
)
def test_impossible_shares_are_refused_before_the_first_batch(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eval_batches(_tokenized(4), **kwargs)
    with pytest.raises(ValueError, match=message):
        train_batches(_tokenized(4), seed=0, epoch=0, **kwargs)


def test_buckets_end_where_the_paper_pads_to() -> None:
    assert tuple(sorted(BUCKETS)) == BUCKETS and BUCKETS[-1] == 512
    assert bucket_length(33) == 48


def test_tokenize_cuts_at_max_length_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    examples = Examples(TEXTS, np.zeros((3, 2), np.int32), np.zeros(3, np.int32), None, np.array([4, 5, 9]))
    tokenizer = train_wordpiece(TEXTS * 2)
    whole = tokenize(examples, tokenizer, max_length=64)
    assert whole.num_truncated == 0 and not caplog.records
    with caplog.at_level(logging.WARNING):
        cut = tokenize(examples, tokenizer, max_length=8)
    assert cut.num_truncated == 1
    assert "1 of 3 texts are cut at max_length = 8" in caplog.text
    np.testing.assert_array_equal(cut.lengths, np.minimum(whole.lengths, 8))
    np.testing.assert_array_equal(cut.row_ids, [4, 5, 9])
    assert cut.num_examples == 3
    (batch,) = eval_batches(cut, batch_size=3)
    assert batch.input_ids.shape == (3, 8)
    assert (batch.input_ids[:, 0] == tokenizer.cls_token_id).all()
    with pytest.raises(ValueError, match="at least 3"):
        tokenize(examples, tokenizer, max_length=2)


def test_tokenize_takes_no_texts() -> None:
    examples = Examples((), np.zeros((0, 2), np.int32), np.zeros(0, np.int32), None, np.zeros(0, np.int32))
    tokenized = tokenize(examples, train_wordpiece(TEXTS), max_length=8)
    assert tokenized.num_examples == 0
    assert list(eval_batches(tokenized, batch_size=2)) == []


def test_wordpiece_round_trip_keeps_ids_and_offsets(tmp_path) -> None:
    tokenizer = train_wordpiece(TEXTS * 3, vocab_size=80)
    assert len(tokenizer) <= 80
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert set(tokenizer.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    tokenizer.save_pretrained(str(tmp_path))
    again = load_tokenizer(tmp_path)
    text = "The soup was GOOD, not loud."
    encoded = again(text, return_offsets_mapping=True)
    assert encoded["input_ids"] == tokenizer(text)["input_ids"]
    assert again.convert_ids_to_tokens(encoded["input_ids"])[:3] == ["[CLS]", "the", "soup"]
    assert [text[a:b] for a, b in encoded["offset_mapping"]][1:3] == ["The", "soup"]


def test_wordpiece_vocabulary_is_the_same_every_time() -> None:
    texts = [row["description"] for row in sample_reviews()["validation"]]
    vocabularies = [train_wordpiece(texts, vocab_size=400).get_vocab() for _ in range(4)]
    assert len(vocabularies[0]) == 400
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_minilm_tokeniser_loads_without_a_network(minilm_dir) -> None:
    tokenizer = load_tokenizer(minilm_dir)
    assert tokenizer.is_fast and tokenizer.pad_token_id == 0
    examples = Examples(("word " * 200,), np.zeros((1, 1), np.int32), np.zeros(1, np.int32), None, np.zeros(1))
    # Its file asks for a cut at 128 tokens and padding to that; neither may have a say here.
    assert tokenize(examples, tokenizer, max_length=512).lengths.tolist() == [202]
