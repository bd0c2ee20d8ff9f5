"""A model as one value: what its methods change, and what they leave."""

import dataclasses

import jax
import numpy as np
import pytest

from sparsecbm_jax.model.predictions import predict

from tests.support.tiny_model import TEXTS, tiny_model


@pytest.mark.well_compiled
def test_layers_written_out_or_looped_over_are_one_model() -> None:
    model = tiny_model(num_layers=2)
    unrolled = dataclasses.replace(model, config=dataclasses.replace(model.config, unroll_layers=True))
    few = unrolled.for_few_texts()
    assert few.config == model.config and unrolled.config.unroll_layers
    for name in ("params", "masks", "heads", "schema", "tokenizer", "strategy", "metadata"):
        assert getattr(few, name) is getattr(unrolled, name)
    one, other = (predict(each, TEXTS[:2]) for each in (few, unrolled))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, other)
