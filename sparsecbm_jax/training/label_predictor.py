"""The end of training: concepts calibrated, and the label predictor φ fitted to the optimum, on held-out texts.

Given the activations of the concepts φ is a multinomial logistic regression, which is convex. On the texts of training,
to which the backbone was fitted, activations are surer than on others; so φ is fitted on those of the validation split,
where cross-validation there prefers it to the φ of training. A φ that is kept is rescaled, so that it reads of the
calibrated concepts what it read before.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special

from sparsecbm_jax.core import sharding
from sparsecbm_jax.model.config import CBMConfig, Heads
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.heads import activate
from sparsecbm_jax.model.mean_activations import MeanActivations, mean_activations
from sparsecbm_jax.model.reliability import Reliability, measure_reliability
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.training.calibration import MIN_LABELS, calibrated, log_loss, temperature
from sparsecbm_jax.training.setup import RunContext, placed_batches
from sparsecbm_jax.training.train_step import TrainState

NUM_FOLDS = 5
# Weights λ of the penalty ½ λ ‖φ‖² that cross-validation chooses from, for activations of mean square one.
PENALTIES = tuple(10.0 ** (power / 2) for power in range(-10, 1))
_MAX_ITERATIONS = 500


class Outputs(NamedTuple):
    """What a split's texts give and what they have, on the host, row by row; `groups` are not to be separated."""

    concept_logits: Float[np.ndarray, "N K C"]
    label_logits: Float[np.ndarray, "N Y"]
    concepts: Int[np.ndarray, "N K"]
    labels: Int[np.ndarray, " N"]
    groups: Int[np.ndarray, " N"]


class PredictorFit(NamedTuple):
    """A fitted φ.

    Attributes:
        kernel: φ.
        bias: φ_0.
        penalty: λ of ½ λ ‖φ‖² for activations of mean square one, of the least log loss in cross-validation.
        logits: y of each row, by a φ that was fitted without its fold.
    """

    kernel: Float[np.ndarray, "K C Y"]
    bias: Float[np.ndarray, " Y"]
    penalty: float
    logits: Float[np.ndarray, "N Y"]


def finish_heads(context: RunContext, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Calibrates the concepts, fits φ, and calibrates the label, as `config.predictor` and the strategy ask for.

    Args:
        context: the run.
        state: the best epoch's.

    Returns:
        The state with its new heads, and what was done, as data for `metrics.json`.
    """
    strategy = STRATEGIES[context.settings.strategy]
    outputs = outputs_of(context, state, "validation") if context.settings.predictor.is_finished else None
    if outputs is None or (strategy.predictor_inputs and (outputs.labels >= 0).sum() < MIN_LABELS):
        return _fitted_on_train(context, state) if strategy.predictor_inputs else (state, {})
    if not strategy.has_bottleneck:
        found = temperature(outputs.label_logits, outputs.labels)
        heads = calibrated(state.heads, "classifier", np.asarray(found))
        return state._replace(heads=heads), {"label_temperature": found}
    config, temperatures = context.prepared.config, concept_temperatures(outputs)
    heads = calibrated(state.heads, "projector", temperatures)
    if strategy.predictor_inputs == "gold":
        state, report = _fitted_on_train(context, state._replace(heads=heads))
    else:
        activations = _activations(config, outputs.concept_logits / temperatures[:, None])
        kept = _reading_as_before(state.heads, heads, temperatures) if config.activation == "log_odds" else state.heads
        is_trained = strategy.predictor_inputs is None
        heads, report = _fitted_on(outputs, activations, kept, heads, is_trained=is_trained)
        state = state._replace(heads=heads)
    if report["fitted_on"] != "nothing" or config.activation == "log_odds":
        names = context.prepared.dataset.schema.concepts
        report["concept_temperatures"] = dict(zip(names, temperatures.tolist(), strict=True))
    return state, report


def describe_finish(report: Mapping[str, Any]) -> str:
    """Says in a line what `finish_heads` did."""
    parts = [f"label predictor: fitted on {report['fitted_on']}"] if "fitted_on" in report else []
    if "cross_validated" in report:
        scores = [f"{100 * report['cross_validated']['accuracy']:.1f} % cross-validated"]
        scores += [f"{100 * report['as_trained']['accuracy']:.1f} % as trained"] if "as_trained" in report else []
        parts.append(f"accuracy on validation {', '.join(scores)}")
    if "concept_temperatures" in report:
        found = (f"{name} {value:.2f}" for name, value in report["concept_temperatures"].items())
        parts.append(f"temperatures {', '.join(found)}")
    if "label_temperature" in report:
        parts.append(f"of the label {report['label_temperature']:.2f}")
    return "; ".join(parts)


def concept_temperatures(outputs: Outputs) -> Float[np.ndarray, " K"]:
    """Finds the temperature of each concept; see `calibration.temperature`."""
    columns = range(outputs.concepts.shape[1])
    return np.array([temperature(outputs.concept_logits[:, k], outputs.concepts[:, k]) for k in columns])


def fit_predictor(
    activations: Float[np.ndarray, "N K C"],
    labels: Int[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    *,
    num_labels: int,
) -> PredictorFit:
    """Fits φ by penalised maximum likelihood, to the optimum, with the penalty that cross-validation chooses.

    Args:
        activations: what the label is to be read from.
        labels: task labels; rows with a negative one are left out.
        groups: rows of one group fall into one fold.
        num_labels: Y.

    Raises:
        ValueError: if no row has a label.
        AssertionError: if the shapes do not fit.
    """
    chex.assert_shape(activations, (len(labels), None, None), custom_message="activations")
    known = labels >= 0
    if not known.any():
        raise ValueError("the label predictor cannot be fitted: no row has a task label")
    inputs, gold = np.asarray(activations, float).reshape(len(labels), -1), labels
    unit = float(np.sqrt(np.mean(np.square(inputs[known])))) or 1.0
    inputs, folds = inputs / unit, _folds(groups)
    best: PredictorFit | None = None
    for penalty in PENALTIES:
        logits = np.zeros((len(labels), num_labels))
        for fold in range(NUM_FOLDS):
            rows = known & (folds != fold)
            if rows.any():
                kernel, bias = _optimum(inputs[rows], gold[rows], penalty, num_labels)
                logits[folds == fold] = inputs[folds == fold] @ kernel + bias
        if best is None or log_loss(logits[known], gold[known]) < log_loss(best.logits[known], gold[known]):
            best = PredictorFit(np.zeros(0), np.zeros(0), penalty, logits)
    assert best is not None
    kernel, bias = _optimum(inputs[known], gold[known], best.penalty, num_labels)
    return best._replace(kernel=kernel.reshape(*activations.shape[1:], num_labels) / unit, bias=bias)


def outputs_of(context: RunContext, state: TrainState, split: str) -> Outputs:
    """Runs the model over a split."""
    forward = make_forward(context.prepared.config, context.mesh)
    arrays = ModelArrays(state.params, state.packed, state.heads)
    examples = context.prepared.dataset.splits[split]
    groups = dict(zip(examples.row_ids.tolist(), examples.groups or examples.row_ids.tolist(), strict=True))
    number = {group: n for n, group in enumerate(dict.fromkeys(groups.values()))}
    parts: list[tuple[np.ndarray, ...]] = []
    for batch in placed_batches(context, split):
        output = forward(arrays, batch)
        leaves = (output.concept_logits, output.label_logits, batch.concepts, batch.label, batch.row_ids)
        real = sharding.to_host(batch.example_weight) > 0
        parts.append(tuple(sharding.to_host(leaf)[real] for leaf in leaves))
    *found, rows = (np.concatenate(leaves) for leaves in zip(*parts, strict=True))
    order = np.argsort(rows, kind="stable")
    group_of = np.array([number[groups[row]] for row in rows[order].tolist()])
    logits, label_logits, concepts, labels = (leaf[order] for leaf in found)
    return Outputs(logits, label_logits, concepts, labels, group_of)


def mean_activations_of(context: RunContext, state: TrainState) -> MeanActivations:
    """Averages a state's activations over the training split."""
    logits = outputs_of(context, state, "train").concept_logits
    return mean_activations(_activations(context.prepared.config, logits), logits.argmax(axis=-1))


def reliability_of(context: RunContext, state: TrainState) -> Reliability:
    """Measures on the validation split where a state's predictions are unsure."""
    outputs, risk = outputs_of(context, state, "validation"), context.settings.predictor.accepted_risk
    concepts, label = (special.softmax(logits, axis=-1) for logits in (outputs.concept_logits, outputs.label_logits))
    return measure_reliability(concepts, outputs.concepts, label, outputs.labels, risk)


def _fitted_on(
    outputs: Outputs,
    activations: Float[np.ndarray, "N K C"],
    trained: Heads,
    heads: dict[str, Any],
    *,
    is_trained: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fits φ on held-out activations, or leaves the heads as training did, with the label at its temperature.

    Args:
        outputs: those of the validation split, as training left the heads.
        activations: those of the calibrated concepts.
        trained: heads with the φ of training.
        heads: the heads with calibrated concepts.
        is_trained: whether training fitted a φ, which may be the better one.
    """
    known, gold = outputs.labels >= 0, outputs.labels[outputs.labels >= 0]
    if known.sum() < MIN_LABELS:
        return dict(trained), {"fitted_on": "nothing"}
    own = temperature(outputs.label_logits, outputs.labels)
    as_trained = _scores(outputs.label_logits[known] / own, gold)
    fit = fit_predictor(activations, outputs.labels, outputs.groups, num_labels=outputs.label_logits.shape[1])
    found = temperature(fit.logits, outputs.labels)
    held_out = _scores(fit.logits[known] / found, gold)
    is_better = not is_trained or held_out["log_loss"] < as_trained["log_loss"]
    report = {
        "fitted_on": "validation" if is_better else "nothing",
        "cross_validated": held_out,
        **({"as_trained": as_trained} if is_trained else {}),
        "penalty": fit.penalty,
        "label_temperature": found if is_better else own,
    }
    if not is_better:
        return calibrated(trained, "predictor", np.asarray(own)), report
    return _with_predictor(heads, fit, found), report


def _fitted_on_train(context: RunContext, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Fits φ on gold ('independent') or predicted concepts ('sequential') of the training split."""
    outputs = outputs_of(context, state, "train")
    activations, source = _activations(context.prepared.config, outputs.concept_logits), "train"
    if STRATEGIES[context.settings.strategy].predictor_inputs == "gold":
        source = "gold concepts of train"
        if context.prepared.config.activation == "log_odds":
            activations = _of_gold_classes(activations, outputs.concepts)
        else:
            # A missing cell (−1) activates no class.
            activations = np.asarray(jax.nn.one_hot(outputs.concepts, context.prepared.config.num_classes))
    fit = fit_predictor(activations, outputs.labels, outputs.groups, num_labels=outputs.label_logits.shape[1])
    report = {"fitted_on": source, "penalty": fit.penalty}
    return state._replace(heads=_with_predictor(state.heads, fit, 1.0)), report


def _reading_as_before(trained: Heads, heads: dict[str, Any], temperatures: Float[np.ndarray, " K"]) -> dict[str, Any]:
    """Returns heads with calibrated concepts whose φ gives the labels that it gave before, where a is linear in u.

    Args:
        trained: the heads as training left them.
        heads: the heads with calibrated concepts.
        temperatures: by which the logits of the concepts were divided.
    """
    factors = np.asarray(temperatures, np.float32)[:, None, None]
    return {**heads, "predictor": {**trained["predictor"], "kernel": trained["predictor"]["kernel"] * factors}}


def _of_gold_classes(
    activations: Float[np.ndarray, "N K C"], concepts: Int[np.ndarray, "N K"]
) -> Float[np.ndarray, "N K C"]:
    """Gives each text, of each concept, the mean activations of the texts of its gold class, or without one of all."""
    gold = np.broadcast_to(activations.mean(axis=0), activations.shape).copy()
    for concept in range(concepts.shape[1]):
        for value in set(concepts[:, concept].tolist()) - {-1}:
            rows = concepts[:, concept] == value
            gold[rows, concept] = activations[rows, concept].mean(axis=0)
    return gold


def _optimum(
    inputs: Float[np.ndarray, "N P"], labels: Int[np.ndarray, " N"], penalty: float, num_labels: int
) -> tuple[Float[np.ndarray, "P Y"], Float[np.ndarray, " Y"]]:
    """Minimises the mean cross-entropy + ½ λ ‖kernel‖² by L-BFGS, in float64."""
    num_rows, width = inputs.shape
    gold = np.eye(num_labels)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel, bias = flat[: width * num_labels].reshape(width, num_labels), flat[width * num_labels :]
        logits = inputs @ kernel + bias
        logits -= logits.max(axis=1, keepdims=True)
        total = np.log(np.exp(logits).sum(axis=1))
        error = (np.exp(logits - total[:, None]) - gold) / num_rows
        value = np.mean(total - (logits * gold).sum(axis=1)) + 0.5 * penalty * np.sum(kernel**2)
        return float(value), np.concatenate([(inputs.T @ error + penalty * kernel).ravel(), error.sum(axis=0)])

    start = np.zeros((width + 1) * num_labels)
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": _MAX_ITERATIONS}).x
    return found[: width * num_labels].reshape(width, num_labels), found[width * num_labels :]


def _folds(groups: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Deals the groups to the folds, in an order that depends on nothing but their number."""
    names, place = np.unique(groups, return_inverse=True)
    return (np.random.default_rng(len(names)).permutation(len(names)) % NUM_FOLDS)[place]


def _activations(config: CBMConfig, u: Float[np.ndarray, "N K C"]) -> Float[np.ndarray, "N K C"]:
    return np.asarray(activate(config, jnp.asarray(u, jnp.float32)))


def _scores(logits: Float[np.ndarray, "N Y"], labels: Int[np.ndarray, " N"]) -> dict[str, float]:
    return {"accuracy": float((logits.argmax(axis=1) == labels).mean()), "log_loss": log_loss(logits, labels)}


def _with_predictor(heads: Heads, fit: PredictorFit, label_temperature: float) -> dict[str, Any]:
    own: Mapping[str, Any] = heads["predictor"]
    fitted = {"kernel": fit.kernel / label_temperature, "bias": fit.bias / label_temperature}
    # From the host, so that every process of a mesh can place it.
    placed = {name: jax.device_put(np.asarray(fitted[name], leaf.dtype), leaf.sharding) for name, leaf in own.items()}
    return {**heads, "predictor": placed}
