"""Leaving out token rows that no text uses changes nothing else."""

import dataclasses
from typing import Any

import chex
import jax
import numpy as np
import pytest

from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.config.run_config import OptimConfig
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.masks import pack
from sparsecbm_jax.core.trees import leaf_at
from sparsecbm_jax.data.batches import Tokenized, train_batches
from sparsecbm_jax.training import train_step, vocabulary

from tests.model.test_forward import build

USED = (5, 9, 9, 17, 30, 31, 44, 61)
# Its padding token is not the first row of the table.
ROBERTA: dict[str, Any] = {"position_offset": 2, "pad_token_id": 1, "family": "roberta"}


def split(pad_token_id: int) -> Tokenized:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, size=16)
    return Tokenized(
        tokens=rng.choice(USED, size=lengths.sum()).astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        concepts=rng.integers(0, 3, size=(16, 1)).astype(np.int32),
        labels=rng.integers(0, 2, size=16).astype(np.int32),
        row_ids=np.arange(16, dtype=np.int32),
        pad_token_id=pad_token_id,
        max_length=16,
        num_truncated=0,
    )


def test_the_same_weights_are_trained(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(dataclasses.replace(tiny_backbone_config, **ROBERTA), k=1)
    splits = {"train": split(config.backbone.pad_token_id)}
    small = vocabulary.restrict(config, params, splits)
    assert small.config.backbone.vocab_size == len(small.ids) == len(set(USED)) + config.backbone.pad_token_id + 1
    before = np.array(leaf_at(params, vocabulary.PATH))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    trained = []
    for its_config, its_params, its_split in (
        (config, params, splits["train"]),
        (small.config, small.params, small.splits["train"]),
    ):
        tx = train_step.make_optimizer(OptimConfig(learning_rate=1e-2, warmup_fraction=0.0), num_steps=8)
        copies = jax.tree.map(lambda leaf: leaf.copy(), (its_params, heads))
        state = train_step.init_state(*copies, tx, mesh)._replace(packed=pack(masks))
        step = train_step.make_train_step(its_config, tx, mesh)
        for epoch in range(2):
            for batch in train_batches(its_split, batch_size=4, seed=0, epoch=epoch):
                state, metrics = step(state, sharding.put_batch(batch, mesh), jax.random.key(1))
        trained.append((state.params, metrics["loss"]))
    (whole, loss), (rows, same_loss) = trained
    again = vocabulary.put_back(rows, leaf_at(params, vocabulary.PATH), small.ids)
    chex.assert_trees_all_close(again, whole, atol=1e-5)
    np.testing.assert_allclose(same_loss, loss, atol=1e-5)
    table, unused = np.asarray(leaf_at(again, vocabulary.PATH)), np.setdiff1d(np.arange(len(before)), small.ids)
    np.testing.assert_array_equal(table[unused], before[unused])
    assert np.abs(table[list(USED)] - before[list(USED)]).max() > 1e-3
    with pytest.raises(AssertionError, match=vocabulary.PATH):
        vocabulary.put_back(rows, leaf_at(params, vocabulary.PATH), small.ids[1:])


def test_a_token_beyond_the_table_is_refused(tiny_backbone_config: BackboneConfig) -> None:
    config, params, _, _ = build(tiny_backbone_config, k=1)
    alien = split(0)._replace(tokens=np.full(200, 10_000, np.int32))
    with pytest.raises(ValueError, match="gives token 10000, but embed/word/embedding has 96 rows"):
        vocabulary.restrict(config, params, {"train": alien})
