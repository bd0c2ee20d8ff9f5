"""What subnetworks keep: counted by hand, against chance, in heads and layers, and what an edit changes there."""

import dataclasses
import json
import types

import numpy as np
import pytest

from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.correction.edit_view import view_edit
from sparsecbm_jax.explanation.subnetworks import SubnetworkReport, summarise_subnetworks, view_subnetworks
from sparsecbm_jax.intervention.mask_edit import MaskEdit
from sparsecbm_jax.intervention.stored_edit import Positions, StoredEdit

CONCEPTS = ("food", "service")
NUM_LAYERS, NUM_HEADS, WIDTH, INNER = 2, 2, 8, 16
QUERY, OUTPUT, FFN = "layers/attention/query/kernel", "layers/attention/output/kernel", "layers/ffn_in/kernel"
SHAPES = {QUERY: (WIDTH, WIDTH), OUTPUT: (WIDTH, WIDTH), FFN: (WIDTH, INNER)}
CONFIG = BackboneConfig("bert", 10, WIDTH, NUM_LAYERS, NUM_HEADS, INNER, 16)


def random_masks(density: float = 0.5, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.random((2, NUM_LAYERS, *shape)) < density for path, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def masks() -> dict[str, np.ndarray]:
    masks = random_masks()
    masks[FFN][0, 1, 3] = False  # an input that food ignores
    masks[FFN][0, 1, :, 5] = False  # an output that food never computes
    return masks


@pytest.fixture(scope="module")
def report(masks: dict[str, np.ndarray]) -> SubnetworkReport:
    return view_subnetworks(masks, CONFIG, CONCEPTS, bins=4)


def test_summaries() -> None:
    names, rng = (*CONCEPTS, "noise"), np.random.default_rng(0)
    densities = np.array([0.5, 0.25, 0.25])[:, None, None, None]
    masks = {path: rng.random((3, NUM_LAYERS, *shape)) < densities for path, shape in SHAPES.items()}
    total = sum(mask[0].size for mask in masks.values())
    flat = np.concatenate([mask.reshape(3, -1) for mask in masks.values()], axis=1)
    summaries = summarise_subnetworks(masks, names)
    for k, subnetwork in enumerate(summaries):
        assert subnetwork.density == pytest.approx(sum(mask[k].sum() for mask in masks.values()) / total)
        by_layer = [sum(mask[k, layer].sum() for mask in masks.values()) / (total / 2) for layer in range(2)]
        assert subnetwork.density_per_layer == pytest.approx(by_layer)
        assert list(subnetwork.overlap) == [name for j, name in enumerate(names) if j != k]
        # The masks are random.
        assert subnetwork.overlap == pytest.approx(subnetwork.chance_overlaps, abs=0.06)
        others = np.delete(flat, k, axis=0)
        assert subnetwork.exclusive == pytest.approx(np.mean(~others[:, flat[k]].any(axis=0)))
        assert subnetwork.shared == pytest.approx(np.mean(others[:, flat[k]].all(axis=0)))
    assert summaries[1].chance_overlap == pytest.approx(1 / 7, abs=0.03)
    assert summaries[1].chance_overlaps == pytest.approx({"food": 1 / 5, "noise": 1 / 7}, abs=0.03)
    assert summarise_subnetworks(None, names) == (None, None, None)


@pytest.mark.parametrize("k", [0, 1])
def test_kernels_are_counted_by_row_column_head_and_block(
    masks: dict[str, np.ndarray], report: SubnetworkReport, k: int
) -> None:
    views = {view.path: view for view in report.concepts[k].kernels}
    assert views.keys() == masks.keys()
    for path, view in views.items():
        mask = masks[path][k]
        assert (view.num_rows, view.num_columns) == SHAPES[path]
        assert view.density == pytest.approx(mask.mean(), abs=1e-4)
        np.testing.assert_allclose(view.density_per_layer, mask.mean(axis=(1, 2)), atol=1e-4)
        for spread, shares in ((view.rows, mask.mean(axis=2)), (view.columns, mask.mean(axis=1))):
            np.testing.assert_allclose(np.array(spread.quantiles)[:, [0, 3, 6]], five(shares), atol=1e-4)
            assert spread.num_empty == tuple((shares == 0).sum(axis=1))
        blocks = mask.reshape(NUM_LAYERS, 4, mask.shape[1] // 4, 4, mask.shape[2] // 4).mean(axis=(2, 4))
        np.testing.assert_allclose(view.density_map, blocks, atol=1e-4)
    halves = {"columns": masks[QUERY][k].reshape(2, 8, 2, 4), "rows": masks[OUTPUT][k].reshape(2, 2, 4, 8)}
    by_head = halves["columns"].mean(axis=(1, 3)), halves["rows"].mean(axis=(2, 3))
    np.testing.assert_allclose(views[QUERY].heads, by_head[0], atol=1e-4)
    np.testing.assert_allclose(views[OUTPUT].heads, by_head[1], atol=1e-4)
    assert views[FFN].heads is None
    np.testing.assert_allclose(report.concepts[k].heads, (by_head[0] + by_head[1]) / 2, atol=1e-4)
    assert views[FFN].rows.num_empty[1] >= (k == 0) and report.concepts[k].constant_level is None


def five(shares: np.ndarray) -> np.ndarray:
    return np.stack([shares.min(axis=1), np.median(shares, axis=1), shares.max(axis=1)], axis=1)


def test_overlap_beside_chance_and_beside_chance_within_kernels() -> None:
    config = dataclasses.replace(CONFIG, hidden_size=64, embedding_size=64)
    rng = np.random.default_rng(0)
    # Both concepts keep nine tenths of one kernel and a tenth of the other, at random within them.
    masks = {path: rng.random((2, NUM_LAYERS, 64, 64)) < share for path, share in ((QUERY, 0.9), (FFN, 0.1))}
    report = view_subnetworks(masks, config, CONCEPTS, bins=0)
    (pair,) = report.overlaps
    assert pair.concepts == CONCEPTS
    assert pair.chance == pytest.approx(1 / 3, abs=0.01)
    assert pair.chance_within_kernels == pytest.approx((0.81 + 0.01) / (0.99 + 0.19), abs=0.01)
    assert pair.jaccard == pytest.approx(pair.chance_within_kernels, abs=0.01)
    assert report.concepts[0].shared_by_chance == report.concepts[1].summary.density
    assert report.concepts[0].exclusive_by_chance == 1 - report.concepts[1].summary.density
    assert report.concepts[0].kernels[0].density_map is None


def constant_masks(axis: int) -> dict[str, np.ndarray]:
    """Half of every kernel's weights (axis 0) or of every column's (axis 1), others in either concept."""
    rng = np.random.default_rng(1)
    masks = {}
    for path, (rows, columns) in SHAPES.items():
        shape = (2, NUM_LAYERS, rows * columns) if axis == 0 else (2, NUM_LAYERS, columns, rows)
        half = rng.permuted(np.arange(shape[-1]) < shape[-1] // 2 + np.zeros(shape), axis=-1).astype(bool)
        masks[path] = half.reshape(2, NUM_LAYERS, rows, columns) if axis == 0 else half.swapaxes(-1, -2)
    return masks


def test_constant_density_is_said() -> None:
    for masks, level in ((constant_masks(0), "kernel"), (constant_masks(1), "column"), (random_masks(0.4), None)):
        for view in view_subnetworks(masks, CONFIG, CONCEPTS).concepts:
            assert view.constant_level == level
            assert bool(view.note) == bool(level) and ("see rows" in view.note) == (level == "column")
    # A kernel that is spared does not hide it, and one that differs shows.
    masks = constant_masks(0)
    masks[FFN] = np.ones_like(masks[FFN])
    assert view_subnetworks(masks, CONFIG, CONCEPTS).concepts[0].constant_level == "kernel"
    masks[FFN][:, 0, 0] = False
    assert view_subnetworks(masks, CONFIG, CONCEPTS).concepts[0].constant_level is None
    # A mask that keeps all, or nothing, is no news.
    for everything in (True, False):
        masks = {path: np.full_like(mask, everything) for path, mask in masks.items()}
        (pair,) = view_subnetworks(masks, CONFIG, CONCEPTS).overlaps
        assert (pair.jaccard, pair.chance, pair.chance_within_kernels) == (1, 1, 1)


def test_an_edit_is_counted_by_layer_head_and_kernel(masks: dict[str, np.ndarray]) -> None:
    dropped = {path: np.zeros(mask.shape[1:], bool) for path, mask in masks.items()}
    grown = {path: np.zeros(mask.shape[1:], bool) for path, mask in masks.items()}
    dropped[QUERY][1, 3, 5] = dropped[QUERY][1, 4, 7] = True  # columns of head 1
    dropped[FFN][0, 2, 9] = True
    grown[OUTPUT][0, 2, 6] = grown[OUTPUT][0, 5, 6] = True  # rows of heads 0 and 1
    grown[FFN][1, 0, 0] = True
    stored = StoredEdit("service", "Positive", None, "", "signed", 1, positions(dropped, grown))
    nothing = np.zeros(1)
    made = MaskEdit(np.int32(1), nothing, nothing, np.uint32(3), dropped, grown, nothing, nothing, nothing, nothing)
    for edit in (stored, made):
        change = view_edit(edit, CONFIG, CONCEPTS)
        assert (change.concept, change.num_dropped, change.num_grown) == ("service", 3, 3)
        assert (change.dropped_per_layer, change.grown_per_layer) == ((1, 2), (2, 1))
        assert (change.dropped_per_head, change.grown_per_head) == (((0, 0), (0, 2)), ((1, 1), (0, 0)))
        assert {kernel.path: (kernel.dropped, kernel.grown, kernel.rows) for kernel in change.kernels} == {
            QUERY: ((0, 2), (0, 0), (0, 2)),
            OUTPUT: ((0, 0), (2, 0), (2, 0)),
            FFN: ((1, 0), (0, 1), (1, 1)),
        }


def positions(dropped: dict[str, np.ndarray], grown: dict[str, np.ndarray]) -> dict[str, Positions]:
    return {p: Positions(dropped[p].shape, np.flatnonzero(dropped[p]), np.flatnonzero(grown[p])) for p in dropped}


def test_a_report_is_small_json(report: SubnetworkReport) -> None:
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["concepts"][0]["name"] == "food"
    # As many layers, kernels and blocks as MiniLM has, with four concepts; the page that holds it may have 2 MB.
    paths = [f"layers/attention/{name}/kernel" for name in ("query", "key", "value", "output")]
    rng = np.random.default_rng(0)
    masks = {path: rng.random((4, 6, 48, 48)) < 0.25 for path in [*paths, FFN, "layers/ffn_out/kernel"]}
    config = dataclasses.replace(CONFIG, hidden_size=48, embedding_size=48, num_layers=6, num_heads=12)
    assert len(json.dumps(view_subnetworks(masks, config, "abcd").to_dict())) < 500_000


@pytest.mark.parametrize(
    ("names", "bins", "message"),
    [(CONCEPTS, 33, "bins is 33; expected 0 to 32"), (("food",), 4, "masks for 2 concepts, but 1 names")],
)
def test_what_does_not_fit_is_refused(
    masks: dict[str, np.ndarray], names: tuple[str, ...], bins: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        view_subnetworks(masks, CONFIG, names, bins=bins)


def test_a_kernel_outside_the_layers_counts_as_one_layer() -> None:
    masks = {"embed/project_in/kernel": np.arange(24).reshape(1, 4, 6) % 2 == 0}
    config = types.SimpleNamespace(num_layers=1, num_heads=2)
    (view,) = view_subnetworks(masks, config, ["food"], bins=2).concepts[0].kernels  # type: ignore[arg-type]
    assert view.density_per_layer == (masks_lib.density(masks)[view.path][0],) == (0.5,)
    assert view.density_map == (((0.6667, 0.3333), (0.6667, 0.3333)),)
