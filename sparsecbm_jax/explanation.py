"""From a text to its decision pathway: words, through each concept's subnetwork, to concepts, to the label.

A pathway is plain data (strings, floats, tuples): it becomes JSON as it stands and knows nothing of arrays.

Reference: Tan et al. 2024, 'Holistic and Intelligible Decision-making Pathways', Figures 2, 4, 6 and 7.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsecbm_jax import cbm
from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.artifact import SparseCBM, text_batches
from sparsecbm_jax.cbm import AnyMasks, CBMConfig, CBMOutput, Heads
from sparsecbm_jax.correction import CorrectionReport, TextPrediction, name_index
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.data.schema import Schema
from sparsecbm_jax.data.words import Reading, Word, printable, read_words
from sparsecbm_jax.masks import Masks, Params

PREDICTED = "predicted"
LABEL = "label"
BAR_WIDTH = 12

_pack = jax.jit(masks_lib.pack)


@dataclasses.dataclass(frozen=True)
class Subnetwork:
    """What one concept's mask keeps, in plain numbers.

    Attributes:
        density: kept share of all maskable weights.
        density_per_layer: kept share of each transformer layer's kernels, first layer first.
        overlap: Jaccard index with each other concept's mask.
        chance_overlap: what two random masks of this density would have.
    """

    density: float
    density_per_layer: tuple[float, ...]
    overlap: dict[str, float]
    chance_overlap: float


@dataclasses.dataclass(frozen=True)
class ConceptPathway:
    """One concept's lane of a pathway.

    Attributes:
        name: the concept.
        predicted_class: class of highest probability.
        explained_class: class that `word_scores` speak about.
        probabilities: softmax of u over the classes.
        activations: a = σ(u) of each class, which is what the label reads.
        contribution: φ_k · a_k towards the explained label.
        contributions: the same towards every label.
        word_scores: ‖∂u_{k,c}/∂e‖ through this concept's subnetwork, one per word of the pathway; 0 for unread words.
        subnetwork: None for a dense model.
    """

    name: str
    predicted_class: str
    explained_class: str
    probabilities: dict[str, float]
    activations: dict[str, float]
    contribution: float
    contributions: dict[str, float]
    word_scores: tuple[float, ...]
    subnetwork: Subnetwork | None


@dataclasses.dataclass(frozen=True)
class DecisionPathway:
    """How one text became its label. For every label j, bias[j] + Σ_k contributions_k[j] = label_logits[j].

    Attributes:
        text: the text as given.
        target: what was asked to be explained: 'predicted', or the label and classes that were named.
        words: words with character offsets into `text`.
        is_truncated: whether the text is longer than the model reads.
        concepts: one lane per concept.
        label: label of highest probability.
        explained_label: label that `contribution` speaks about.
        label_probabilities, label_logits, bias: by label.
    """

    text: str
    target: str
    words: tuple[Word, ...]
    is_truncated: bool
    concepts: tuple[ConceptPathway, ...]
    label: str
    explained_label: str
    label_probabilities: dict[str, float]
    label_logits: dict[str, float]
    bias: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The pathway as nested dicts and lists, ready for JSON."""
        return json.loads(self.to_json())

    def to_json(self, indent: int | None = None) -> str:
        """The pathway as one JSON object; on one line by default."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False, indent=indent)


def explain(
    model: SparseCBM,
    texts: Sequence[str],
    target: str | Mapping[str, str] = PREDICTED,
    *,
    batch_size: int = 16,
) -> list[DecisionPathway]:
    r"""Explains every text, in the order given.

    The score of a word for concept k and class c is $\lVert \partial u_{k,c} / \partial e \rVert_2$ through subnetwork
    k, where e is the word's embeddings stacked: $\sqrt{\sum_d \lVert \partial u_{k,c} / \partial e_d \rVert^2}$ over
    its sub-words d. Special tokens have no score. All concepts' gradients come from one backward pass, since every
    subnetwork reads its own copy of the embeddings and rows do not meet.

    Args:
        model: a model with concepts, sparse or dense.
        texts: the texts; none may be empty.
        target: 'predicted' explains the predicted label and, per concept, the predicted class. A label's name explains
            that label. A mapping {concept: class} explains those classes, and {'label': name} in it that label.
        batch_size: texts in a pass; the result does not depend on it beyond rounding.

    Returns:
        One pathway per text.

    Raises:
        ValueError: if a text is empty or holds nothing that the tokeniser reads, `target` names no label, concept
            or class, the model has no concepts, or its output is not finite.

    Reference: Tan et al. 2024, token scores ‖G_k(t_d)‖; contributions from Eq. 3.
    Deviation: words instead of sub-words; the L2 norm over a word's sub-words is the norm of its whole gradient.
    """
    if "projector" not in model.heads:
        raise ValueError(f"strategy {model.strategy!r} has no concepts to explain; train 'joint' or 'sparse' instead")
    asked = _resolve_target(model.schema, target)
    texts = texts if isinstance(texts, str) else list(texts)
    if not texts:
        return []
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    # A power of two for few texts, so that calls compile seldom.
    batches = text_batches(model, texts, batch_size=min(batch_size, 1 << (len(texts) - 1).bit_length()))
    readings = read_words(texts, model.tokenizer, model.max_length)
    subnetworks = summarise_subnetworks(model.masks, model.schema.concepts)
    masks = None if model.masks is None else _pack(model.masks)
    pathways: dict[int, DecisionPathway] = {}
    for batch in batches:
        gradients = text_gradients(model.config, model.params, masks, model.heads, batch, asked.classes)
        gradients = jax.device_get(gradients)
        for row in np.flatnonzero(batch.example_weight > 0):
            n = int(batch.row_ids[row])
            of_row = jax.tree.map(lambda leaf, row=row: leaf[row], gradients)
            pathways[n] = _pathway(model, texts[n], readings[n], of_row, asked, subnetworks)
    return [pathways[n] for n in range(len(texts))]


class Target(NamedTuple):
    """What is to be explained: indices of the label and of each concept's class, −1 for the predicted one."""

    name: str
    label: int
    classes: Int[np.ndarray, " K"]


class TextGradients(NamedTuple):
    """What one jitted pass says about a batch; NumPy arrays of one row once it is on the host."""

    output: CBMOutput
    classes: Int[Array, "B K"]
    token_scores: Float[Array, "B K T"]
    contributions: Float[Array, "B K Y"]


@functools.partial(jax.jit, static_argnames="config")
def text_gradients(
    config: CBMConfig, params: Params, masks: AnyMasks | None, heads: Heads, batch: Batch, classes: Int[Array, " K"]
) -> TextGradients:
    """Predictions of a batch and the gradient norm of every concept's logit at every token's embedding.

    Args:
        config: the model's static description.
        params: the backbone θ.
        masks: K masks, boolean or packed; None for a dense model.
        heads: projector ψ and predictor φ.
        batch: the texts.
        classes: class of each concept to differentiate; −1 for the predicted one.
    """
    words = params["embed"]["word"]["embedding"][batch.input_ids]

    def logits_fn(embeddings: Float[Array, "... B T E"]) -> tuple[Float[Array, "B K C"], CBMOutput]:
        output = cbm.forward(config, params, masks, heads, batch, word_embeddings=embeddings)
        return output.concept_logits, output

    is_dense = masks is None
    copies = words if is_dense else jnp.broadcast_to(words, (config.num_concepts, *words.shape))
    logits, pull_back, output = jax.vjp(logits_fn, copies, has_aux=True)
    explained = jnp.where(classes >= 0, classes, jnp.argmax(logits, axis=-1))
    cotangent = jax.nn.one_hot(explained, config.num_classes, dtype=logits.dtype)
    if is_dense:
        # One shared pass: the concepts' gradients do not separate by themselves.
        apart = jnp.eye(config.num_concepts, dtype=logits.dtype)[:, None, :, None] * cotangent
        grads = jax.vmap(lambda one: pull_back(one)[0])(apart)
    else:
        (grads,) = pull_back(cotangent)
    scores = jnp.sqrt(jnp.sum(jnp.square(grads), axis=-1))
    contributions = jnp.einsum("bkc,kcy->bky", output.activations, heads["predictor"]["kernel"])
    return TextGradients(output, explained, jnp.moveaxis(scores, 0, 1), contributions)


def summarise_subnetworks(masks: Masks | None, concepts: Sequence[str]) -> tuple[Subnetwork | None, ...]:
    """Density, density by layer and overlap of every concept's mask; None for each concept of a dense model."""
    if masks is None:
        return (None,) * len(concepts)
    density, overlap = masks_lib.total_density(masks), masks_lib.overlap(masks)
    layers = [np.asarray(mask) for path, mask in masks.items() if path.startswith("layers/")]
    kept = sum(np.count_nonzero(mask.reshape(*mask.shape[:2], -1), axis=-1) for mask in layers)
    size = sum(mask[0, 0].size for mask in layers)
    return tuple(
        Subnetwork(
            density=float(density[k]),
            density_per_layer=tuple((kept[k] / size).tolist()),
            overlap={other: float(overlap[k, j]) for j, other in enumerate(concepts) if j != k},
            chance_overlap=float(masks_lib.chance_overlap(density[k])),
        )
        for k in range(len(concepts))
    )


def render_text(pathway: DecisionPathway, top: int = 5) -> str:
    """The pathway for a terminal; control characters of the text are shown escaped.

    Args:
        pathway: what `explain` returned.
        top: words shown per concept, those of highest score.
    """
    label = pathway.explained_label
    share = pathway.label_probabilities
    lines = [
        f'"{printable(pathway.text, 240)}"' + (" (longer than the model reads)" if pathway.is_truncated else ""),
        f"label: {pathway.label} {share[pathway.label]:.1%}"
        + (f"; explained: {label} {share[label]:.1%}" if label != pathway.label else ""),
        f"  logit {pathway.label_logits[label]:+.3f} of {label!r} = bias {pathway.bias[label]:+.3f} + the concepts:",
    ]
    name_width = max(len(lane.name) for lane in pathway.concepts)
    class_width = max(len(lane.predicted_class) for lane in pathway.concepts)
    largest = max(abs(lane.contribution) for lane in pathway.concepts) or 1.0
    for lane in pathway.concepts:
        bar = "█" * round(abs(lane.contribution) / largest * BAR_WIDTH)
        density = "dense" if lane.subnetwork is None else f"{lane.subnetwork.density:.1%} of weights"
        lines.append(
            f"  {lane.name:{name_width}}  {lane.predicted_class:{class_width}} "
            f"{lane.probabilities[lane.predicted_class]:6.1%}  {lane.contribution:+.3f} {bar:{BAR_WIDTH}}  {density}"
        )
        ranked = sorted(zip(lane.word_scores, pathway.words, strict=True), key=lambda pair: -pair[0])[:top]
        words = "  ".join(f"{printable(word.text, 24)} {score:.3g}" for score, word in ranked if word.is_read)
        about = "" if lane.explained_class == lane.predicted_class else f"for {lane.explained_class}: "
        lines.append(f"  {'':{name_width}}  {about}{words}")
    return "\n".join(lines)


def render_correction(report: CorrectionReport) -> str:
    """A correction for a terminal: what changed, and every concept and the label before and after."""
    asked = f"{report.concept} = {report.target}" + (f", label = {report.label}" if report.label else "")
    outcome = "repaired" if report.is_repaired else "not repaired"
    if report.before.concepts[report.concept] == report.target:
        outcome = "was so before" if report.is_repaired else "lost"
    steps = f"{report.num_steps} step" + ("s" if report.num_steps > 1 else "")
    lines = [
        f'"{printable(report.text, 240)}"',
        f"asked: {asked}; {outcome}",
        f"changed: {report.num_dropped} weights dropped, {report.num_grown} grown, {report.changed_share:.4%} of the "
        f"backbone's {report.num_weights:,} ({report.saliency}, drop_fraction {report.drop_fraction:g}, {steps})",
    ]
    names = [*report.before.concepts, "label"]
    before, after = _rows(report.before), _rows(report.after)
    widths = [max(map(len, column)) for column in ([*names, "concept"], before, after)]
    lines.append(f"  {'':{widths[0]}}  {'before':{widths[1]}}  after")
    for name, old, new in zip(names, before, after, strict=True):
        mark = "*" if name == report.concept else " "
        lines.append(f"{mark} {name:{widths[0]}}  {old:{widths[1]}}  {new}")
    return "\n".join(lines)


def _rows(prediction: TextPrediction) -> list[str]:
    def row(name: str, probabilities: Mapping[str, float]) -> str:
        return f"{name} (" + ", ".join(f"{each} {share:.1%}" for each, share in probabilities.items()) + ")"

    rows = [row(name, prediction.concept_probabilities[concept]) for concept, name in prediction.concepts.items()]
    return [*rows, row(prediction.label, prediction.label_probabilities)]


def _resolve_target(schema: Schema, target: str | Mapping[str, str]) -> Target:
    classes = np.full(schema.num_concepts, -1, np.int32)
    if target == PREDICTED:
        return Target(PREDICTED, -1, classes)
    if isinstance(target, str):
        return Target(target, name_index("label", target, schema.labels), classes)
    label = -1
    for key, name in target.items():
        if key == LABEL and LABEL not in schema.concepts:
            label = name_index("label", name, schema.labels)
        else:
            concept = name_index("concept", key, schema.concepts)
            classes[concept] = name_index("class", name, schema.classes)
    return Target(", ".join(f"{key}={name}" for key, name in target.items()) or PREDICTED, label, classes)


def _pathway(
    model: SparseCBM,
    text: str,
    reading: Reading,
    values: TextGradients,
    target: Target,
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
    squares = np.square(values.token_scores.astype(np.float64))
    concepts = tuple(
        ConceptPathway(
            name=name,
            predicted_class=schema.classes[int(concept_probabilities[k].argmax())],
            explained_class=schema.classes[int(values.classes[k])],
            probabilities=by_name(schema.classes, concept_probabilities[k]),
            activations=by_name(schema.classes, output.activations[k]),
            contribution=float(values.contributions[k, explained]),
            contributions=by_name(schema.labels, values.contributions[k]),
            word_scores=tuple(float(np.sqrt(squares[k, list(tokens)].sum())) for tokens in reading.tokens),
            subnetwork=subnetworks[k],
        )
        for k, name in enumerate(schema.concepts)
    )
    return DecisionPathway(
        text=text,
        target=target.name,
        words=reading.words,
        is_truncated=reading.is_truncated,
        concepts=concepts,
        label=schema.labels[int(label_probabilities.argmax())],
        explained_label=schema.labels[explained],
        label_probabilities=by_name(schema.labels, label_probabilities),
        label_logits=by_name(schema.labels, output.label_logits),
        bias=by_name(schema.labels, np.asarray(model.heads["predictor"]["bias"])),
    )


def _softmax(logits: Float[np.ndarray, "... n"]) -> Float[np.ndarray, "... n"]:
    exponential = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)
