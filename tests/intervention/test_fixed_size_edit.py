"""One correction: exact counts, one concept, to the bit and back, and the positions that an independent model picks."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.selection import count_true
from sparsecbm_jax.correction.corrections import correct
from sparsecbm_jax.correction.report import render_correction
from sparsecbm_jax.correction.request_file import CorrectionRequest
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.evaluation.editing.baselines import oracle_activations
from sparsecbm_jax.intervention import editors
from sparsecbm_jax.intervention.fixed_size_edit import _change_count, intervene
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection, MaskEdit, apply, num_changed, undo
from sparsecbm_jax.intervention.ranking import EditCosts, project_out, signed
from sparsecbm_jax.model.predictions import predict, text_batches
from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM

from tests.support.numpy_model import (
    activation,
    as_float64,
    complex_gradient,
    concept_logits,
    cross_entropy,
    label_logits,
    leaf_at,
    pooled,
)
from tests.support.tiny_model import TEXTS, tiny_model

LOGIT_TOLERANCE = 1e-5
SERVICE = 2
NEGATIVE, POSITIVE, UNKNOWN = range(3)

num_traces = 0


def counted(weight: jax.Array, grad: jax.Array) -> jax.Array:
    """The signed saliency; Python runs it once for each kernel that is traced."""
    global num_traces
    num_traces += 1
    return signed(weight, grad)


@pytest.fixture(scope="module")
def model() -> SparseCBM:
    return tiny_model(num_layers=1)


@pytest.fixture(scope="module")
def batch(model: SparseCBM) -> Batch:
    """One text and a row of padding: one shape, and so one compilation, for most tests."""
    return next(text_batches(model, TEXTS[:1], batch_size=2))


def edit_of(
    model: SparseCBM, batch: Batch, concept: Any, target: Any, fraction: Any, label: Any = None, **kwargs: Any
) -> tuple[Any, MaskEdit]:
    kwargs = {"saliency": counted, **kwargs}
    return intervene(model.config, model.arrays, ConceptCorrection(batch, concept, target, label), fraction, **kwargs)


def as_numpy(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in tree.items()}


@pytest.mark.parametrize("concept", range(3))
@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.3])
def test_an_edit_keeps_the_sparsity_and_touches_one_concept(
    model: SparseCBM, batch: Batch, concept: int, fraction: float
) -> None:
    masks, edit = edit_of(model, batch, concept, NEGATIVE, fraction)
    count = round(fraction * masks_lib.num_weights(masks))
    old, new = as_numpy(model.masks), as_numpy(masks)
    assert num_changed(edit) == (count, count)
    assert int(edit.num_per_step) == count
    np.testing.assert_array_equal(masks_lib.num_kept(masks), masks_lib.num_kept(model.masks))
    for path in old:
        others = np.arange(3) != concept
        np.testing.assert_array_equal(new[path][others], old[path][others])
        dropped, grown = np.asarray(edit.dropped[path]), np.asarray(edit.grown[path])
        assert not np.any(dropped & grown)
        np.testing.assert_array_equal(old[path][concept] & ~new[path][concept], dropped)
        np.testing.assert_array_equal(~old[path][concept] & new[path][concept], grown)


def test_every_kernel_of_every_layer_may_have_its_own_share(model: SparseCBM, batch: Batch) -> None:
    masks, edit = edit_of(model, batch, SERVICE, NEGATIVE, 0.02, scope="per_kernel")
    old = as_numpy(masks_lib.concept(model.masks, SERVICE))
    dropped, grown = as_numpy(edit.dropped), as_numpy(edit.grown)
    for path, kept in old.items():
        wanted = [round(0.02 * layer.size) for layer in kept]
        assert [layer.sum() for layer in dropped[path]] == [layer.sum() for layer in grown[path]] == wanted
    assert int(edit.num_per_step) == sum(flags.sum() for flags in dropped.values())
    chex.assert_trees_all_equal(undo(masks, edit), model.masks)

    def traced(fraction: jax.Array) -> tuple[Any, Any]:
        return edit_of(model, batch, SERVICE, NEGATIVE, fraction, scope="per_kernel")

    chex.assert_trees_all_equal(jax.jit(traced)(0.02)[0], masks)


def test_costs_keep_an_edit_from_what_is_dear(model: SparseCBM, batch: Batch) -> None:
    costs = {path: jnp.ones(mask.shape[1:]) for path, mask in model.masks.items()}
    dear = "layers/ffn_in/kernel"
    asked = (model, batch, SERVICE, NEGATIVE, 0.02)
    _, free = edit_of(*asked, saliency=EditCosts(costs))
    _, spared = edit_of(*asked, saliency=EditCosts({**costs, dear: 1e12 * costs[dear]}))
    counts = [count_true({dear: edit.dropped[dear] | edit.grown[dear]}) for edit in (free, spared)]
    assert counts[0] > counts[1] == 0
    assert num_changed(free) == num_changed(spared)


def test_what_is_spared_does_not_move_to_first_order(model: SparseCBM) -> None:
    rng = np.random.default_rng(0)
    shapes = {path: mask.shape[1:] for path, mask in model.masks.items()}
    draw = {path: jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32) for path, shape in shapes.items()}
    grads = {path: leaf[0] + leaf[2] for path, leaf in draw.items()}
    costs = {path: jnp.exp(leaf[1]) for path, leaf in draw.items()}
    # The second direction is the first one again, and the third nothing at all.
    directions = {path: jnp.stack([leaf[0], leaf[0], 0 * leaf[0], leaf[1]]) for path, leaf in draw.items()}
    left = project_out(grads, EditCosts(costs, directions))
    for p in (0, 3):
        moved, full = (sum(jnp.vdot(directions[path][p] / costs[path], g[path]) for path in g) for g in (left, grads))
        assert abs(float(moved)) < 1e-3 * abs(float(full)) + 1e-2
    assert all(np.isfinite(leaf).all() for leaf in left.values())
    chex.assert_trees_all_equal(project_out(grads, EditCosts(costs)), grads)


def test_undo_and_apply_are_exact(model: SparseCBM, batch: Batch) -> None:
    masks, edit = edit_of(model, batch, SERVICE, NEGATIVE, 0.02)
    chex.assert_trees_all_equal(undo(masks, edit), model.masks)
    chex.assert_trees_all_equal(apply(model.masks, edit), masks)
    chex.assert_trees_all_equal(jax.jit(apply)(model.masks, edit), masks)
    with pytest.raises(ValueError, match=r"cannot apply the edit of concept 2: 72 of its positions"):
        apply(masks, edit)
    with pytest.raises(ValueError, match=r"cannot undo the edit of concept 2: 72 of its positions"):
        undo(model.masks, edit)
    other = tiny_model(num_layers=2).masks
    with pytest.raises(ValueError, match=r"layers/attention/key/kernel has mask shape \(2, 16, 16\) but edit shape"):
        undo(other, edit)


def test_an_edit_is_deterministic_and_compiled_once(model: SparseCBM, batch: Batch) -> None:
    first = edit_of(model, batch, SERVICE, NEGATIVE, 0.02)
    before = num_traces
    chex.assert_trees_all_equal(edit_of(model, batch, SERVICE, NEGATIVE, 0.02), first)
    for arguments in [(0, POSITIVE, 0.001), (1, UNKNOWN, 0.1, 1), (2, NEGATIVE, 0.0, -1)]:
        edit_of(model, batch, *arguments, num_steps=1 + arguments[0])
    assert num_traces == before


def test_a_fraction_of_zero_changes_nothing(model: SparseCBM, batch: Batch) -> None:
    masks, edit = edit_of(model, batch, SERVICE, NEGATIVE, 0.0)
    chex.assert_trees_all_equal(masks, model.masks)
    assert num_changed(edit) == (0, 0)
    chex.assert_trees_all_close(edit.concept_logits_after, edit.concept_logits_before, atol=LOGIT_TOLERANCE)


def test_the_logits_of_an_edit_are_those_of_the_model(model: SparseCBM, batch: Batch) -> None:
    masks, edit = edit_of(model, batch, SERVICE, NEGATIVE, 0.02, 0)
    for some, concepts, labels in (
        (model.masks, edit.concept_logits_before, edit.label_logits_before),
        (masks, edit.concept_logits_after, edit.label_logits_after),
    ):
        predicted = predict(dataclasses.replace(model, masks=some), TEXTS[:1])
        np.testing.assert_allclose(jax.nn.softmax(concepts)[:1], predicted.concept_probabilities, atol=LOGIT_TOLERANCE)
        np.testing.assert_allclose(jax.nn.softmax(labels)[:1], predicted.label_probabilities, atol=LOGIT_TOLERANCE)


def test_concept_target_and_fraction_may_be_traced(model: SparseCBM, batch: Batch) -> None:
    def traced(concept: jax.Array, target: jax.Array, fraction: jax.Array) -> Any:
        return edit_of(model, batch, concept, target, fraction)

    masks, edit = jax.eval_shape(traced, jnp.int32(0), jnp.int32(0), jnp.float32(0.1))
    assert masks.keys() == model.masks.keys()
    assert edit.dropped["layers/ffn_in/kernel"].shape == (1, 16, 24)
    count = jax.jit(lambda r: _change_count(model.masks, 0, r, "global"))
    pruned = masks_lib.num_weights(model.masks) - int(masks_lib.num_kept(model.masks)[0])
    assert [int(count(r)) for r in (0.0, 0.02, 1.0)] == [0, 36, pruned]


def test_rows_are_corrected_together_and_padding_rows_count_for_nothing(model: SparseCBM, batch: Batch) -> None:
    alone = edit_of(model, batch, SERVICE, NEGATIVE, 0.02, 1)[0]
    twice = jax.tree.map(lambda leaf: np.repeat(leaf[:1], 2, axis=0), batch)
    chex.assert_trees_all_equal(edit_of(model, twice, SERVICE, NEGATIVE, 0.02, 1)[0], alone)
    # The other row asks for the opposite.
    targets, labels = np.array([NEGATIVE, POSITIVE]), np.array([1, 0])
    padded = twice._replace(example_weight=np.array([1, 0], np.float32))
    chex.assert_trees_all_equal(edit_of(model, padded, SERVICE, targets, 0.02, labels)[0], alone)
    torn, edit = edit_of(model, twice, SERVICE, targets, 0.02, labels)
    assert masks_lib.fingerprint(torn) != masks_lib.fingerprint(alone)
    assert edit.concept_logits_after.shape == (2, 3, 3)


def test_several_steps_keep_the_count(model: SparseCBM, batch: Batch) -> None:
    masks, edit = edit_of(model, batch, SERVICE, NEGATIVE, 0.01, num_steps=3)
    num_dropped, num_grown = num_changed(edit)
    assert num_dropped == num_grown <= 3 * int(edit.num_per_step)
    np.testing.assert_array_equal(masks_lib.num_kept(masks), masks_lib.num_kept(model.masks))
    chex.assert_trees_all_equal(undo(masks, edit), model.masks)

    by_hand = model
    for _ in range(3):
        by_hand = dataclasses.replace(by_hand, masks=edit_of(by_hand, batch, SERVICE, NEGATIVE, 0.01)[0])
    chex.assert_trees_all_equal(masks, by_hand.masks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 0, 0.1), r"concept is 3; expected an integer in \[0, 2\]"),
        ((0, 3, 0.1), r"target is 3; expected an integer in \[0, 2\]"),
        ((0, 0, 0.1, 2), r"label is 2; expected an integer in \[-1, 1\]"),
        ((0, 0, -0.1), r"drop_fraction is -0.1; expected a share of the backbone in \[0, 1\]"),
        ((0, 0, float("nan")), "drop_fraction is nan"),
        (
            (0, 0, 0.5),
            r"drop_fraction 0.5 asks to grow 896 weights, but .* concept 0 has only \d+ pruned",
        ),
        (
            (0, 0, 0.9),
            r"drop_fraction 0.9 asks to drop 1613 weights, but .* concept 0 has only \d+ kept",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(model: SparseCBM, batch: Batch, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edit_of(model, batch, *arguments)


def test_packed_masks_get_the_same_edit_and_stay_packed(model: SparseCBM, batch: Batch) -> None:
    packed = dataclasses.replace(model, masks=masks_lib.pack(model.masks))
    (expected, edit), (new, of_packed) = (edit_of(one, batch, SERVICE, NEGATIVE, 0.01) for one in (model, packed))
    chex.assert_trees_all_equal(new, masks_lib.pack(expected))
    chex.assert_trees_all_equal((of_packed.dropped, of_packed.grown), (edit.dropped, edit.grown))
    chex.assert_trees_all_equal(undo(new, of_packed), packed.masks)
    chex.assert_trees_all_equal(apply(packed.masks, of_packed), new)
    with pytest.raises(ValueError, match=r"cannot apply the edit of concept 2: .* positions are in another state"):
        apply(new, of_packed)


def test_wrong_masks_and_options_are_refused(model: SparseCBM, batch: Batch) -> None:
    with pytest.raises(ValueError, match="the model has no masks"):
        edit_of(dataclasses.replace(model, masks=None), batch, 0, 0, 0.1)
    floats = {path: mask.astype(jnp.float32) for path, mask in model.masks.items()}
    with pytest.raises(ValueError, match="the masks are float32; expected booleans, or their bits"):
        edit_of(dataclasses.replace(model, masks=floats), batch, 0, 0, 0.1)
    with pytest.raises(ValueError, match="saliency is 'sgined'; expected one of 'signed', 'magnitude'"):
        edit_of(model, batch, 0, 0, 0.1, saliency="sgined")
    with pytest.raises(ValueError, match="num_steps is 0"):
        edit_of(model, batch, 0, 0, 0.1, num_steps=0)


def test_oracle_activations(model: SparseCBM) -> None:
    activations = np.random.default_rng(0).random((2, 3, 3)).astype(np.float32)
    corrected, labels = oracle_activations(model.heads, activations, SERVICE, np.eye(3)[[0, 2]])
    np.testing.assert_array_equal(corrected[:, SERVICE], [[1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(corrected[:, :SERVICE], activations[:, :SERVICE])
    heads = as_float64(model.heads)
    wanted = [label_logits(heads, row) for row in np.asarray(corrected)]
    np.testing.assert_allclose(labels, wanted, atol=LOGIT_TOLERANCE)
    with pytest.raises(ValueError, match="concept is 5"):
        oracle_activations(model.heads, activations, 5, np.eye(3)[0])


def test_correct_by_name(model: SparseCBM) -> None:
    corrected, report = correct(
        model, CorrectionRequest(TEXTS[0], "service", "Negative"), editor=editors.fixed_size(0.02, counted)
    )
    assert report.is_repaired
    assert report.before.concepts["service"] != "Negative"
    assert report.after.concepts["food"] == report.before.concepts["food"]
    assert (report.num_dropped, report.num_grown, report.num_weights) == (36, 36, 1792)
    predicted = predict(corrected, TEXTS[:1])
    assert model.schema.classes[predicted.concepts[0, SERVICE]] == "Negative"
    content = json.loads(json.dumps(report.to_dict()))
    assert content["is_repaired"] and content["changed_share"] == 72 / 1792
    settings = {"drop_fraction": 0.02, "saliency": "counted", "num_steps": 1}
    assert content["editor"] == {"name": "fixed_size", "settings": settings}
    assert content["after"]["concept_probabilities"]["service"]["Negative"] > 0.5
    text = render_correction(report)
    assert "36 weights dropped, 36 grown, 4.0179% of the backbone's 1,792" in text
    assert "asked: service = Negative; repaired" in text and "why:" not in text
    failed = render_correction(dataclasses.replace(report, after=report.before))
    assert "service = Negative; not repaired" in failed and "why: a change of this share does not suffice" in failed
    lost = render_correction(dataclasses.replace(report, before=report.after, after=report.before))
    assert "service = Negative; lost" in lost and "why:" not in lost


@pytest.mark.parametrize(
    ("text", "concept", "target", "label", "message"),
    [
        ("fine", "servce", "Negative", None, r"there is no concept 'servce' \(did you mean 'service'\?\)"),
        ("fine", "service", "negativ", None, r"there is no class 'negativ' \(did you mean 'Negative'\?\)"),
        ("fine", "service", "Negative", "finn", r"there is no label 'finn' \(did you mean 'fine'\?\)"),
        ("  \n", "service", "Negative", None, r"texts\[0\] is '  \\n', expected a text that is not empty"),
        ("\x00\x07", "service", "Negative", None, r"in which the tokeniser finds nothing to read"),
        ("a\ud800", "service", "Negative", None, r"character 1 is a lone surrogate"),
    ],
)
def test_correct_refuses_by_name(
    model: SparseCBM, text: str, concept: str, target: str, label: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        correct(model, CorrectionRequest(text, concept, target, label))


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The whole model in float64: norms, softmax and pooling are pinned to float32, so here the pin is float64."""
    with jax.enable_x64(True):
        monkeypatch.setattr(jnp, "float32", jnp.float64)
        yield


@pytest.mark.parametrize(("saliency", "label"), [("signed", 1), ("magnitude", None)])
def test_float64_positions_are_those_of_an_independent_model(float64: None, saliency: str, label: int | None) -> None:
    model = tiny_model(num_layers=1)
    # With so small a γ the positions depend on the label as well.
    config = dataclasses.replace(model.config, dtype="float64", gamma=0.01)
    params, heads = (as_float64(jax.device_get(tree)) for tree in (model.params, model.heads))
    masks = as_numpy(model.masks)
    batch = next(text_batches(model, [TEXTS[3]], batch_size=1))
    count, target = 25, NEGATIVE
    arrays = ModelArrays(jax.tree.map(jnp.asarray, params), model.masks, jax.tree.map(jnp.asarray, heads))
    correction = ConceptCorrection(batch, SERVICE, target, label)
    _, edit = intervene(config, arrays, correction, count / masks_lib.num_weights(masks), saliency=saliency)

    words = params["embed"]["word"]["embedding"][batch.input_ids[0][batch.attention_mask[0] > 0]]
    weights = {path: leaf_at(params, path) for path in masks}

    def kernels_of(concept: int) -> dict[str, np.ndarray]:
        return {path: np.where(masks[path][concept], weights[path], 0) for path in masks}

    logits = [concept_logits(heads, k, pooled(config.backbone, params, kernels_of(k), words)) for k in range(3)]
    np.testing.assert_allclose(edit.concept_logits_before[0], logits, rtol=1e-12)
    own = kernels_of(SERVICE)

    def loss(path: str, kernel: np.ndarray) -> np.ndarray:
        u = concept_logits(heads, SERVICE, pooled(config.backbone, params, {**own, path: kernel}, words))
        task = 0.0
        if label is not None:
            activations = np.stack([activation(u) if k == SERVICE else activation(logits[k]) for k in range(3)])
            task = cross_entropy(label_logits(heads, activations), label)
        return config.gamma * cross_entropy(u, target) + task

    paths = sorted(masks)
    grads = [complex_gradient(lambda kernel, path=path: loss(path, kernel), own[path]) for path in paths]
    flat_grad, flat_weight = (
        np.concatenate([leaf.ravel() for leaf in leaves]) for leaves in (grads, [weights[path] for path in paths])
    )
    gradient_of_mask = flat_grad * flat_weight
    score = -gradient_of_mask if saliency == "signed" else np.abs(gradient_of_mask * flat_weight)
    kept = np.concatenate([masks[path][SERVICE].ravel() for path in paths])
    order = np.argsort(score, kind="stable")
    dropped, grown = order[kept[order]][:count], order[~kept[order]][::-1][:count]
    for positions, found in ((dropped, edit.dropped), (grown, edit.grown)):
        flat = np.concatenate([np.asarray(found[path]).ravel() for path in paths])
        np.testing.assert_array_equal(np.flatnonzero(flat), np.sort(positions))
