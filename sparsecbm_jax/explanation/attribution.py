"""Scores of the tokens of a text for a concept's logit u_k, through that concept's subnetwork.

With e the word embeddings of a text, and positions and token types constant, a token t scores

    gradient_norm         ‖∂u_k/∂e_t‖₂                                        no sign: how sensitive u_k is to t
    gradient_x_input      e_t · ∂u_k/∂e_t                                     signed: towards or away from the class
    integrated_gradients  (e_t − b_t) · ∫₀¹ ∂u_k/∂e_t (b + α (e − b)) dα      signed, and complete

where the baseline b is the text with the embedding of every token of a word replaced, by zeros or by that of padding.
Tokens that the tokeniser adds have their own embeddings all along the path, so the scores of the words add up to
u_k(e) − u_k(b).

Reference: Tan et al. 2024, ‖G_k(t_d)‖; Shrikumar et al. 2016, 'Not Just a Black Box'; Sundararajan et al. 2017,
'Axiomatic Attribution for Deep Networks'.
"""

import dataclasses
import functools
import typing
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.config.names import did_you_mean
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import CBMConfig, CBMOutput
from sparsecbm_jax.model.forward import forward
from sparsecbm_jax.model.sparse_cbm import ModelArrays

Method = Literal["gradient_norm", "gradient_x_input", "integrated_gradients"]
Baseline = Literal["zero", "pad"]
METHODS: tuple[str, ...] = typing.get_args(Method)
BASELINES: tuple[str, ...] = typing.get_args(Baseline)


class AttributionError(ValueError):
    """A method, baseline or number of steps that does not exist."""


class AttributionSettings(TypedDict, total=False):
    """The arguments of `Attribution`."""

    method: Method
    baseline: Baseline
    num_steps: int


@dataclasses.dataclass(frozen=True)
class Attribution:
    """A method of scoring tokens; static and hashable.

    Attributes:
        method: One of the three methods in the docstring of this module.
        baseline: Embedding of a word's tokens at the start of the path of integrated gradients.
        num_steps: Number of points of that path, at least 1; Gauss–Legendre points, which are exact for polynomials of
            a degree below twice their number.

    Raises:
        AttributionError: There is no such method or baseline, or no step.
    """

    method: Method = "integrated_gradients"
    baseline: Baseline = "zero"
    num_steps: int = 8

    def __post_init__(self) -> None:
        for kind, name, known in (("method", self.method, METHODS), ("baseline", self.baseline, BASELINES)):
            if name not in known:
                raise AttributionError(
                    f"there is no {kind} {name!r}{did_you_mean(name, known)}; expected one of {', '.join(known)}"
                )
        if self.num_steps < 1:
            raise AttributionError(f"num_steps is {self.num_steps}; expected at least 1")

    @property
    def is_integrated(self) -> bool:
        """True where the method has a path, and so a baseline and steps."""
        return self.method == "integrated_gradients"

    @property
    def is_signed(self) -> bool:
        """True where a score below zero speaks against the class."""
        return self.method != "gradient_norm"


class TokenScores(NamedTuple):
    """The result of one jitted pass over a batch; NumPy arrays of one row once it is on the host.

    Attributes:
        output: The predictions.
        classes: Class of each concept that was differentiated.
        token_scores: Score of every token; 0 for tokens of no word.
        baseline_logits: u_k of that class at the baseline; None where the method has no baseline.
    """

    output: CBMOutput
    classes: Int[Array, "B K"]
    token_scores: Float[Array, "B K T"]
    baseline_logits: Float[Array, "B K"] | None


@functools.partial(jax.jit, static_argnames=("config", "attribution"))
def score_tokens(
    config: CBMConfig,
    arrays: ModelArrays,
    batch: Batch,
    classes: Int[Array, " K"],
    is_word: Bool[Array, "B T"],
    attribution: Attribution,
) -> TokenScores:
    """Computes the predictions of a batch, and the score of every token for every concept's logit.

    All concepts' gradients come from one backward pass, since every subnetwork reads its own copy of the embeddings and
    no row depends on another. Integrated gradients scan over the steps: memory does not grow with their number.

    Args:
        config: The model's static description.
        arrays: Parameters, masks (packed or not; None for a dense model) and heads.
        batch: The texts.
        classes: Class of each concept to differentiate; −1 for the predicted one.
        is_word: True at tokens that belong to a word of the text, neither special nor padding.
        attribution: The method, with its baseline and steps.
    """
    table = arrays.params["embed"]["word"]["embedding"]
    words = table[batch.input_ids]
    baseline_logits = None
    if attribution.is_integrated:
        output = forward(config, arrays, batch)
        explained = _explained(output, classes)
        start = table[config.backbone.pad_token_id] if attribution.baseline == "pad" else 0.0
        path = jnp.where(is_word[..., None], words - start, 0)

        def step(total: Float[Array, "K B T"], point: tuple[Array, Array]) -> tuple[Float[Array, "K B T"], None]:
            to_go, weight = point
            _, grads = _gradients(config, arrays, batch, words - to_go * path, explained)
            return total + weight * jnp.sum(path * grads, axis=-1), None

        nodes, weights = np.polynomial.legendre.leggauss(attribution.num_steps)
        points = (jnp.asarray((1 - nodes) / 2, words.dtype), jnp.asarray(weights / 2, words.dtype))
        scores, _ = jax.lax.scan(step, jnp.zeros((config.num_concepts, *batch.input_ids.shape)), points)
        at_baseline = forward(config, arrays, batch, word_embeddings=words - path)
        baseline_logits = jnp.take_along_axis(at_baseline.concept_logits, explained[..., None], axis=-1)[..., 0]
    else:
        output, grads = _gradients(config, arrays, batch, words, classes)
        explained = _explained(output, classes)
        if attribution.is_signed:
            scores = jnp.sum(words * grads, axis=-1)
        else:
            scores = jnp.sqrt(jnp.sum(jnp.square(grads), axis=-1))
    scores = jnp.where(is_word[:, None], jnp.moveaxis(scores, 0, 1), 0)
    return TokenScores(output, explained, scores, baseline_logits)


def _explained(output: CBMOutput, classes: Int[Array, "*B K"]) -> Int[Array, "B K"]:
    return jnp.where(classes >= 0, classes, jnp.argmax(output.concept_logits, axis=-1))


def _gradients(
    config: CBMConfig,
    arrays: ModelArrays,
    batch: Batch,
    words: Float[Array, "B T E"],
    classes: Int[Array, "*B K"],
) -> tuple[CBMOutput, Float[Array, "K B T E"]]:
    """Computes ∂u_{k,c}/∂e at the given word embeddings for a class c of each concept; −1 is the predicted class."""

    def logits_fn(embeddings: Float[Array, "... B T E"]) -> tuple[Float[Array, "B K C"], CBMOutput]:
        output = forward(config, arrays, batch, word_embeddings=embeddings)
        return output.concept_logits, output

    is_dense = arrays.masks is None
    copies: Any = words if is_dense else jnp.broadcast_to(words, (config.num_concepts, *words.shape))
    logits, pull_back, output = jax.vjp(logits_fn, copies, has_aux=True)
    cotangent = jax.nn.one_hot(_explained(output, classes), config.num_classes, dtype=logits.dtype)
    if is_dense:
        # The concepts share one pass: their gradients are separated by one pull-back for each.
        apart = jnp.eye(config.num_concepts, dtype=logits.dtype)[:, None, :, None] * cotangent
        return output, jax.vmap(lambda one: pull_back(one)[0])(apart)
    return output, pull_back(cotangent)[0]
