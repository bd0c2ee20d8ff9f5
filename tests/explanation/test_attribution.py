"""Signed scores of words: an independent model confirms them, they add up, and memory does not grow with the steps."""

import numpy as np
import pytest

from sparsecbm_jax.backbones import maskable_paths
from sparsecbm_jax.data.words import read_words
from sparsecbm_jax.explanation.attribution import BASELINES, Attribution, AttributionError, score_tokens
from sparsecbm_jax.explanation.pathways import explain, pathway_schema
from sparsecbm_jax.model.predictions import text_batches
from sparsecbm_jax.model.sparse_cbm import SparseCBM

from tests.runtime.test_json_schema import problem
from tests.support.numpy_model import COMPLEX_STEP, as_float64, concept_logits, leaf_at, pooled
from tests.support.tiny_model import TEXTS, tiny_model

IG = "integrated_gradients"
# The same everywhere, so that few programs are compiled.
FEW = {"method": IG, "baseline": "pad", "num_steps": 4}
# float32 gradients against complex-step derivatives in float64, relative to the largest score.
TOLERANCE = 1e-4
# Of u(x) − u(baseline), as the issue asks; and what float32 leaves where that is small.
COMPLETENESS, ROUNDING = 0.01, 1e-4
BATCH_TOLERANCE = 1e-5
TEXT = "Wasn't well-made, the soup."


@pytest.fixture(scope="module")
def model() -> SparseCBM:
    return tiny_model(num_layers=1)


@pytest.mark.parametrize(("strategy", "method"), [("sparse", "gradient_x_input"), ("sparse", IG), ("joint", IG)])
def test_scores_are_those_of_an_independent_model(strategy: str, method: str) -> None:
    model = tiny_model(num_layers=1, strategy=strategy)
    (pathway,) = explain(model, [TEXT], {"food": "Positive"}, **{**FEW, "method": method})
    params, heads = as_float64(dict(model.params)), as_float64(dict(model.heads))
    (reading,) = read_words([TEXT], model.tokenizer, model.max_length)
    assert any(len(tokens) > 1 for tokens in reading.tokens)
    table = params["embed"]["word"]["embedding"]
    words = table[model.tokenizer(TEXT)["input_ids"]]
    start = words.copy()
    start[[token for tokens in reading.tokens for token in tokens]] = table[model.tokenizer.pad_token_id]
    path = words if method == "gradient_x_input" else words - start
    # The rule of Gauss and Legendre with four points, written out; gradient × input looks at the end alone.
    inner, outer = np.sqrt(3 / 7 - 2 / 7 * np.sqrt(6 / 5)), np.sqrt(3 / 7 + 2 / 7 * np.sqrt(6 / 5))
    heavy, light = (18 + np.sqrt(30)) / 72, (18 - np.sqrt(30)) / 72
    rule = [(-outer, light), (-inner, heavy), (inner, heavy), (outer, light)]
    points = [(1.0, 1.0)] if method == "gradient_x_input" else [((1 + node) / 2, weight) for node, weight in rule]
    for k, lane in enumerate(pathway.concepts):
        weights = {name: leaf_at(params, name) for name in maskable_paths(model.config.backbone)}
        masks = model.masks or dict.fromkeys(weights, np.ones(3, bool))
        kernels = {name: np.where(masks[name][k], weight, 0) for name, weight in weights.items()}
        c = model.schema.classes.index(lane.explained_class)

        def logit(e: np.ndarray, k: int = k, c: int = c, kernels: dict[str, np.ndarray] = kernels) -> np.ndarray:
            return concept_logits(heads, k, pooled(model.config.backbone, params, kernels, e))[c]

        def towards(e: np.ndarray, tokens: tuple[int, ...], logit=logit) -> float:
            """The derivative at e along the path of some tokens."""
            shifted = e.astype(np.complex128)
            shifted[list(tokens)] += 1j * COMPLEX_STEP * path[list(tokens)]
            return logit(shifted).imag / COMPLEX_STEP

        wanted = [
            sum(weight * towards(start + alpha * (words - start), tokens) for alpha, weight in points)
            for tokens in reading.tokens
        ]
        np.testing.assert_allclose(lane.word_scores, wanted, atol=TOLERANCE * np.abs(wanted).max())
        assert lane.explained_logit == pytest.approx(logit(words), rel=TOLERANCE)
        if method == IG:
            assert lane.baseline_logit == pytest.approx(logit(start), rel=TOLERANCE, abs=TOLERANCE)
        else:
            assert lane.baseline_logit is None


@pytest.mark.parametrize("baseline", BASELINES)
def test_integrated_gradients_are_complete(model: SparseCBM, baseline: str) -> None:
    for pathway in explain(model, TEXTS, method=IG, baseline=baseline, num_steps=48):
        assert (pathway.baseline, pathway.num_steps, pathway.is_signed) == (baseline, 48, True)
        assert problem(pathway.to_dict(), pathway_schema(), pathway_schema()) is None
        for lane in pathway.concepts:
            difference = lane.explained_logit - lane.baseline_logit
            assert sum(lane.word_scores) == pytest.approx(difference, rel=COMPLETENESS, abs=ROUNDING)
            assert lane.explained_class == lane.predicted_class


def test_scores_do_not_depend_on_the_batch(model: SparseCBM) -> None:
    (alone,) = explain(model, [TEXT], **FEW)
    # Others beside it and a wider batch.
    together = explain(model, [TEXTS[2], TEXT, TEXTS[3]], **FEW)[1]
    for one, other in zip(alone.concepts, together.concepts, strict=True):
        np.testing.assert_allclose(one.word_scores, other.word_scores, atol=BATCH_TOLERANCE)
        assert one.baseline_logit == pytest.approx(other.baseline_logit, abs=BATCH_TOLERANCE)


def test_memory_does_not_grow_with_the_steps(model: SparseCBM) -> None:
    batch = next(text_batches(model, TEXTS, batch_size=4))
    is_word, classes = np.ones(batch.input_ids.shape, bool), np.full(3, -1, np.int32)

    def scratch(num_steps: int) -> int:
        attribution = Attribution(IG, num_steps=num_steps)
        arguments = (model.config, model.arrays, batch, classes, is_word, attribution)
        return score_tokens.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    few, many = scratch(2), scratch(256)
    # The nodes and weights themselves are a few bytes a step.
    assert many - few < 256 * 64, (few, many)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "gradient_times_input"}, r"no method 'gradient_times_input' .did you mean 'gradient_x_input'"),
        ({"baseline": "mask"}, "no baseline 'mask'.*expected one of zero, pad"),
        ({"num_steps": 0}, "num_steps is 0; expected at least 1"),
    ],
)
def test_what_does_not_exist_is_refused(asked: dict, message: str) -> None:
    with pytest.raises(AttributionError, match=message):
        Attribution(**asked)
