"""Decision pathways of texts: words, through each concept's subnetwork, to concepts, to the label.

A pathway is plain data (strings, floats, tuples): it becomes JSON without conversion and holds no arrays.

Reference: Tan et al. 2024, 'Holistic and Intelligible Decision-making Pathways', Figures 2, 4, 6 and 7.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsecbm_jax.config.names import name_index
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.data.schema import Schema
from sparsecbm_jax.data.words import Reading, Word, read_words
from sparsecbm_jax.explanation.attribution import (
    Attribution,
    AttributionSettings,
    Baseline,
    Method,
    TokenScores,
    score_tokens,
)
from sparsecbm_jax.explanation.contributions import (
    Reference,
    expected_label,
    label_effects,
    label_parts,
    label_values,
    reference_of,
)
from sparsecbm_jax.explanation.subnetworks import Subnetwork, summarise_subnetworks
from sparsecbm_jax.model.predictions import check_texts, text_batches
from sparsecbm_jax.model.sparse_cbm import SparseCBM
from sparsecbm_jax.runtime.json_schema import schema_of

PREDICTED = "predicted"
LABEL = "label"
# Number of batches whose texts are read at a time: enough that texts of similar length share a batch.
WINDOW_BATCHES = 16

_pack = jax.jit(masks_lib.pack)


@dataclasses.dataclass(frozen=True)
class ConceptPathway:
    """One concept's lane of a pathway.

    Attributes:
        name: Name of the concept.
        predicted_class: Class of highest probability.
        explained_class: Class that `word_scores` are for.
        probabilities: Softmax of u over the classes.
        activations: a of each class, the input of the label predictor; see `model.heads.activate`.
        contribution: What the concept adds to the logit of the explained label; see `explanation.contributions`.
        contributions: The same for every label.
        contrast: By how much more it adds to the explained label than to the foil.
        effect: By how much it moves the expected label; null where labels are not numbers.
        word_scores: Score of each word of the pathway for u of the explained class through this concept's subnetwork,
            by the pathway's method; 0 for unread words.
        explained_logit: u of the explained class.
        baseline_logit: The same at the baseline of integrated gradients, whose word scores add up to the difference;
            null for other methods.
        shows_words: False for a concept that is read as unknown and was not asked for: the text says nothing of it, and
            so no word carries it.
        is_unsure: True where the class's probability is below the concept's threshold; see `model.reliability`.
        is_guess: True for a concept that the model reads no better than by naming the most frequent class.
        subnetwork: Weights that the concept's mask keeps; null for a dense model.
    """

    name: str
    predicted_class: str
    explained_class: str
    probabilities: dict[str, float]
    activations: dict[str, float]
    contribution: float
    contributions: dict[str, float]
    contrast: float
    effect: float | None
    word_scores: tuple[float, ...]
    explained_logit: float
    baseline_logit: float | None
    shows_words: bool
    is_unsure: bool
    is_guess: bool
    subnetwork: Subnetwork | None


@dataclasses.dataclass(frozen=True)
class DecisionPathway:
    """The path of one text to its label. For every label j, base[j] + Σ_k contributions_k[j] = label_logits[j].

    Attributes:
        text: The text as given.
        target: Target of the explanation: 'predicted', or the label and classes that were named.
        method: Method of the word scores.
        is_signed: True where a word score below zero speaks against the class; a score without sign is a sensitivity.
        baseline: Embeddings of the words at the start of the path of integrated gradients; null for other methods.
        num_steps: Number of points of that path; null for other methods.
        words: Words with character offsets into `text`.
        is_truncated: True where the text is longer than the model reads.
        concepts: One lane per concept.
        label: Label of highest probability.
        is_unsure: True where the label's probability is below the label's threshold.
        explained_label: Label that `contribution` is for.
        foil: Label that the explained one is compared with.
        expected_label: Mean of the label, where labels are numbers; otherwise null.
        reference: Where contributions are counted from: 'mean', a concept's activations on average, with logits against
            the mean of the labels; or 'zero', the paper's.
        label_probabilities, label_logits, base: Values by label.
    """

    text: str
    target: str
    method: Method
    is_signed: bool
    baseline: Baseline | None
    num_steps: int | None
    words: tuple[Word, ...]
    is_truncated: bool
    concepts: tuple[ConceptPathway, ...]
    label: str
    is_unsure: bool
    explained_label: str
    foil: str
    expected_label: float | None
    reference: Reference
    label_probabilities: dict[str, float]
    label_logits: dict[str, float]
    base: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns the pathway as nested dicts and lists, ready for JSON."""
        return json.loads(self.to_json())

    def to_json(self, indent: int | None = None) -> str:
        """Returns the pathway as one JSON object.

        Args:
            indent: Spaces of indentation; None writes one line.
        """
        return json.dumps(dataclasses.asdict(self), allow_nan=False, indent=indent)


class Target(NamedTuple):
    """The target of an explanation: indices of the label and of each concept's class, −1 for the predicted one.

    `foil` is the index of the label that it is compared with, −1 for the most probable other one; `is_named` is True
    for concepts that are asked for by name.
    """

    name: str
    label: int
    classes: Int[np.ndarray, " K"]
    is_named: Bool[np.ndarray, " K"]
    foil: int = -1
    reference: Reference = "mean"


def explain(
    model: SparseCBM,
    texts: Sequence[str],
    target: str | Mapping[str, str] = PREDICTED,
    *,
    foil: str | None = None,
    reference: Reference | None = None,
    batch_size: int = 16,
    **attribution: Unpack[AttributionSettings],
) -> list[DecisionPathway]:
    """Explains every text, in the order given.

    A word's score combines those of its sub-word tokens d (see `attribution`): for signed methods it is their sum; for
    the gradient norm it is the norm of the word's stacked gradients, √(Σ_d ‖∂u_{k,c}/∂e_d‖²). Special tokens have no
    score.

    Args:
        model: A model with concepts, sparse or dense.
        texts: The texts; none may be empty.
        target: 'predicted' explains the predicted label and, per concept, the predicted class. A label's name explains
            that label. A mapping {concept: class} explains those classes, or with 'predicted' in place of a class the
            predicted one, and {'label': name} in it that label. A concept that is read as unknown shows words only
            if it is named.
        foil: Label that the explained one is compared with: why the one and not the other. None, or for a text
            whose explained label it is: the most probable of the others.
        reference: Where contributions are counted from: 'mean', or 'zero', as in the paper. None: 'mean' where the
            model knows its mean activations.
        batch_size: Texts in a pass, at least 1; the result does not depend on it beyond rounding.
        **attribution: How words are scored. method: 'integrated_gradients' or 'gradient_x_input' (signed), or
            'gradient_norm' (no sign, the paper's). baseline: embeddings of the words at the start of the path of
            integrated gradients, 'zero', or 'pad', the padding token's. num_steps: number of points of that path, at
            least 1; each costs a forward and a backward pass.

    Returns:
        One pathway per text.

    Raises:
        ValueError: A text is empty or holds nothing that the tokeniser reads, `target` or `foil` names no label,
            concept or class, the foil is the explained label, the model has no mean activations to count from, there
            is no such method or baseline, the model has no concepts, or its output is not finite.

    Reference: Tan et al. 2024, token scores ‖G_k(t_d)‖; contributions from Eq. 3.
    Deviation: words instead of sub-words; the L2 norm over a word's sub-words is the norm of its whole gradient.
    """
    check_texts(texts)
    return list(
        explain_stream(model, texts, target, foil=foil, reference=reference, batch_size=batch_size, **attribution)
    )


def explain_stream(
    model: SparseCBM,
    texts: Iterable[str],
    target: str | Mapping[str, str] = PREDICTED,
    *,
    foil: str | None = None,
    reference: Reference | None = None,
    batch_size: int = 16,
    **attribution: Unpack[AttributionSettings],
) -> Iterator[DecisionPathway]:
    """Explains any number of texts, in order, in the memory of a few batches.

    Texts are read some batches ahead, so that those of similar length share a pass.

    Args:
        model: As for `explain`.
        texts: The texts, read as they are needed.
        target: As for `explain`.
        foil: As for `explain`.
        reference: As for `explain`.
        batch_size: As for `explain`.
        **attribution: As for `explain`.

    Yields:
        One pathway per text.

    Raises:
        ValueError: As `explain`. Errors in the other arguments are raised at once; an error in a text is raised in its
            turn and names its position, after the pathways of all earlier windows of texts.
    """
    if "projector" not in model.heads:
        raise ValueError(f"strategy {model.strategy!r} has no concepts to explain; train 'joint' or 'sparse' instead")
    if isinstance(texts, str | bytes):
        check_texts(texts)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    asked = _resolve_target(model, target, foil, reference)
    return _explain_windows(model, iter(texts), asked, Attribution(**attribution), batch_size)


def _explain_windows(
    model: SparseCBM, texts: Iterator[str], asked: Target, attribution: Attribution, batch_size: int
) -> Iterator[DecisionPathway]:
    window = list(itertools.islice(texts, WINDOW_BATCHES * batch_size))
    if not window:
        return
    # A power of two for few texts, so that few programs are compiled.
    batch_size = min(batch_size, 1 << (len(window) - 1).bit_length())
    subnetworks = summarise_subnetworks(model.masks, model.schema.concepts)
    masks = None if model.masks is None else _pack(model.masks)
    start = 0
    while window:
        batches = text_batches(model, window, batch_size=batch_size, start=start)
        readings = read_words(window, model.tokenizer, model.max_length)
        pathways: dict[int, DecisionPathway] = {}
        for batch in batches:
            is_word = _word_tokens(batch, readings)
            arrays = model.arrays._replace(masks=masks)
            scores = score_tokens(model.config, arrays, batch, asked.classes, is_word, attribution)
            scores = jax.device_get(scores)
            for row in np.flatnonzero(batch.example_weight > 0):
                n = int(batch.row_ids[row])
                of_row = jax.tree.map(lambda leaf, row=row: leaf[row], scores)
                pathways[n] = _pathway(model, window[n], readings[n], of_row, asked, attribution, subnetworks)
        yield from (pathways[n] for n in range(len(window)))
        start += len(window)
        window = list(itertools.islice(texts, WINDOW_BATCHES * batch_size))


def pathway_schema() -> dict[str, Any]:
    """Returns the JSON Schema of `DecisionPathway.to_dict()`."""
    return schema_of(DecisionPathway)


def _resolve_target(
    model: SparseCBM, target: str | Mapping[str, str], foil: str | None, reference: Reference | None
) -> Target:
    schema = model.schema
    other = -1 if foil is None else name_index("label", foil, schema.labels)
    asked = _named_target(schema, target)._replace(foil=other, reference=reference_of(model, reference))
    if other >= 0 and other == asked.label:
        raise ValueError(f"the foil {foil!r} is the label that is explained; expected another")
    return asked


def _named_target(schema: Schema, target: str | Mapping[str, str]) -> Target:
    classes, is_named = np.full(schema.num_concepts, -1, np.int32), np.zeros(schema.num_concepts, bool)
    if target == PREDICTED:
        return Target(PREDICTED, -1, classes, is_named)
    if isinstance(target, str):
        return Target(target, name_index("label", target, schema.labels), classes, is_named)
    label = -1
    for key, name in target.items():
        if key == LABEL and LABEL not in schema.concepts:
            label = name_index("label", name, schema.labels)
        else:
            concept = name_index("concept", key, schema.concepts)
            is_named[concept] = True
            if name != PREDICTED:
                classes[concept] = name_index("class", name, schema.classes)
    name = ", ".join(f"{key}={name}" for key, name in target.items()) or PREDICTED
    return Target(name, label, classes, is_named)


def _pathway(
    model: SparseCBM,
    text: str,
    reading: Reading,
    values: TokenScores,
    target: Target,
    attribution: Attribution,
    subnetworks: Sequence[Subnetwork | None],
) -> DecisionPathway:
    schema, output = model.schema, values.output
    finite = (output.concept_logits, output.label_logits, values.token_scores)
    if not all(np.isfinite(leaf).all() for leaf in finite):
        raise ValueError(
            f"the model's output for {text[:40]!r} is not finite; its parameters may have diverged in training"
        )

    def by_name(names: Sequence[str], numbers: Array | np.ndarray) -> dict[str, float]:
        return dict(zip(names, numbers.tolist(), strict=True))

    concept_probabilities = _softmax(np.asarray(output.concept_logits))
    label_probabilities = _softmax(np.asarray(output.label_logits))
    explained = target.label if target.label >= 0 else int(label_probabilities.argmax())
    foil = _foil(target.foil, explained, label_probabilities)
    parts = label_parts(model, np.asarray(output.activations), target.reference)
    values_of = label_values(schema.labels)
    effects = None if values_of is None else label_effects(parts, values_of)
    is_integrated, reliability = attribution.is_integrated, model.reliability
    concepts = tuple(
        ConceptPathway(
            name=name,
            predicted_class=schema.classes[int(concept_probabilities[k].argmax())],
            explained_class=schema.classes[int(values.classes[k])],
            probabilities=by_name(schema.classes, concept_probabilities[k]),
            activations=by_name(schema.classes, output.activations[k]),
            contribution=float(parts.contributions[k, explained]),
            contributions=by_name(schema.labels, parts.contributions[k]),
            contrast=float(parts.contributions[k, explained] - parts.contributions[k, foil]),
            effect=None if effects is None else float(effects[k]),
            word_scores=_word_scores(np.asarray(values.token_scores[k]), reading, attribution.is_signed),
            explained_logit=float(output.concept_logits[k, values.classes[k]]),
            baseline_logit=float(values.baseline_logits[k]) if values.baseline_logits is not None else None,
            shows_words=bool(target.is_named[k]) or int(concept_probabilities[k].argmax()) != schema.unknown_class,
            is_unsure=bool(concept_probabilities[k].max() < reliability.concept_thresholds[k]),
            is_guess=bool(reliability.is_guess[k]),
            subnetwork=subnetworks[k],
        )
        for k, name in enumerate(schema.concepts)
    )
    return DecisionPathway(
        text=text,
        target=target.name,
        method=attribution.method,
        is_signed=attribution.is_signed,
        baseline=attribution.baseline if is_integrated else None,
        num_steps=attribution.num_steps if is_integrated else None,
        words=reading.words,
        is_truncated=reading.is_truncated,
        concepts=concepts,
        label=schema.labels[int(label_probabilities.argmax())],
        is_unsure=bool(label_probabilities.max() < reliability.label_threshold),
        explained_label=schema.labels[explained],
        foil=schema.labels[foil],
        expected_label=None if values_of is None else float(expected_label(parts.logits, values_of)),
        reference=target.reference,
        label_probabilities=by_name(schema.labels, label_probabilities),
        label_logits=by_name(schema.labels, parts.logits),
        base=by_name(schema.labels, parts.base),
    )


def _foil(asked: int, explained: int, probabilities: Float[np.ndarray, " Y"]) -> int:
    """Returns the label to compare with: the one that is asked for, or the most probable one that is not explained."""
    if asked >= 0 and asked != explained:
        return asked
    others = [label for label in np.argsort(-probabilities, kind="stable").tolist() if label != explained]
    return others[0] if others else explained


def _word_tokens(batch: Batch, readings: Sequence[Reading]) -> Bool[np.ndarray, "B T"]:
    """Marks the tokens of a batch that belong to a word."""
    is_word = np.zeros(batch.input_ids.shape, bool)
    for row in np.flatnonzero(batch.example_weight > 0):
        for tokens in readings[batch.row_ids[row]].tokens:
            is_word[row, list(tokens)] = True
    return is_word


def _word_scores(token_scores: Float[np.ndarray, " T"], reading: Reading, is_signed: bool) -> tuple[float, ...]:
    exact = token_scores.astype(np.float64)
    if is_signed:
        return tuple(float(exact[list(tokens)].sum()) for tokens in reading.tokens)
    return tuple(float(np.sqrt(np.square(exact[list(tokens)]).sum())) for tokens in reading.tokens)


def _softmax(logits: Float[np.ndarray, "... n"]) -> Float[np.ndarray, "... n"]:
    exponential = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)
