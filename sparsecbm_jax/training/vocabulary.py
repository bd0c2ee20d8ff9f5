"""The rows of the token table that a run's texts use: the only ones that training has to touch.

A row whose token no text contains never has a gradient, so Adam never moves it. Training the other rows alone gives
the same weights and saves the gradient, both moments, the norm and the update of the rest, which is most of the table
where the texts are few. (`launch/benchmarks/training_step.py` prints how many rows a data set trains.)

Deviation: weight decay does not reach the rows left out; they stay as pretrained.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from sparsecbm_jax.core.trees import Params, leaf_at, with_leaf
from sparsecbm_jax.data.batches import Tokenized
from sparsecbm_jax.model.config import CBMConfig

PATH = "embed/word/embedding"


class Restricted(NamedTuple):
    """Holds a model and splits in which token n is the n-th of those in use.

    Attributes:
        config: the model's, with R for `vocab_size`.
        params: the model's, with a token table of R rows.
        splits: the same texts, renumbered.
        ids: the tokens in use, ascending; those up to the padding token's are among them and keep their numbers, since
            RoBERTa counts positions by that token.
    """

    config: CBMConfig
    params: Params
    splits: dict[str, Tokenized]
    ids: Int[np.ndarray, " R"]


def restrict(config: CBMConfig, params: Params, splits: Mapping[str, Tokenized]) -> Restricted:
    """Leaves out the rows of tokens that no split contains; `put_back` undoes it.

    Raises:
        ValueError: if a split has a token that the table does not.
    """
    table = leaf_at(params, PATH)
    kept = [np.arange(max(config.backbone.pad_token_id, *(split.pad_token_id for split in splits.values())) + 1)]
    ids = np.unique(np.concatenate([*kept, *(split.tokens for split in splits.values())]))
    if ids[-1] >= table.shape[0]:
        raise ValueError(
            f"the tokeniser gives token {ids[-1]}, but {PATH} has {table.shape[0]} rows; "
            "do tokeniser and weights belong together?"
        )
    backbone = dataclasses.replace(config.backbone, vocab_size=len(ids))
    return Restricted(
        dataclasses.replace(config, backbone=backbone),
        with_leaf(params, PATH, jax.jit(_take)(table, ids)),
        {
            name: split._replace(tokens=np.searchsorted(ids, split.tokens).astype(split.tokens.dtype))
            for name, split in splits.items()
        },
        ids,
    )


def put_back(params: Params, table: Float[Array, "V E"], ids: Int[np.ndarray, " R"]) -> Params:
    """Puts the whole token table back: rows of `params` for `ids`, those of `table` for the others.

    Raises:
        AssertionError: if the parameters' table does not have a row for each of `ids`.
    """
    chex.assert_shape(leaf_at(params, PATH), (len(ids), table.shape[1]), custom_message=PATH)
    return with_leaf(params, PATH, jax.jit(_put)(table, ids, leaf_at(params, PATH)))


def _take(table: Float[Array, "V E"], ids: Int[Array, " R"]) -> Float[Array, "R E"]:
    return table[ids]


def _put(table: Float[Array, "V E"], ids: Int[Array, " R"], rows: Float[Array, "R E"]) -> Float[Array, "V E"]:
    return table.at[ids].set(rows)
