"""Exchanges of kept and pruned weights against brute force, and masks that are made by them."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from sparsecbm_jax.backbones import BackboneConfig, input_products, input_squares
from sparsecbm_jax.config.run_config import PrunerConfig, RunConfig, SparsityConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.pruning import criteria, swaps
from sparsecbm_jax.pruning.masks_from_scores import prune_concept
from sparsecbm_jax.pruning.pruner import PruningHooks, PruningOptions, prune

from tests.pruning.test_fisher import build, random_batch

# What the search may lose to the best of all sets, and float32 to float64.
LARGEST_GAP, ROUNDING = 0.05, 1e-5
PATH = "layers/ffn_in/kernel"
SPARSITIES = [0.7, 0.75, 0.8]
SHAPES = {PATH: (2, 16, 24), "layers/ffn_out/kernel": (2, 32, 16), "embed/project_in/kernel": (8, 20)}


def quadratics(size: int, rank: int, count: int = 40) -> np.ndarray:
    """Blocks H = F ∘ θθᵀ, F of so many gradients and a tenth of its mean as damping."""
    rng = np.random.default_rng(size * 100 + rank)
    gradients, weights = rng.normal(size=(count, rank, size)), rng.normal(size=(count, size))
    fisher = np.einsum("nri,nrj->nij", gradients, gradients) / rank + 0.1 * np.eye(size)
    return fisher * weights[:, :, None] * weights[:, None, :]


def total(h: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    return 0.5 * np.einsum("ni,nij,nj->n", pruned, h, pruned)


def by_diagonal(h: np.ndarray, num_pruned: int) -> np.ndarray:
    diagonal = np.diagonal(h, axis1=1, axis2=2)
    return np.argsort(np.argsort(diagonal, axis=1), axis=1) < num_pruned


@functools.partial(jax.jit, static_argnums=2)
def search(h: Any, pruned: Any, size: int, free: Any) -> Any:
    rows = lambda index: h[jnp.arange(h.shape[0]), index]  # noqa: E731
    diagonal = jnp.diagonal(h, axis1=1, axis2=2)
    return swaps.lowest(rows, diagonal, jnp.einsum("nij,nj->ni", h, pruned.astype(h.dtype)), pruned, free)


@pytest.mark.parametrize("rank", [1, 2, 4, 16])
@pytest.mark.parametrize("num_pruned", [3, 6, 9])
def test_search_comes_within_5_percent_of_brute_force(rank: int, num_pruned: int) -> None:
    h = quadratics(12, rank)
    start = by_diagonal(h, num_pruned)
    found, before, after = map(np.asarray, search(jnp.float32(h), start, 12, np.ones_like(start)))
    sets = [np.isin(np.arange(12), chosen) for chosen in itertools.combinations(range(12), num_pruned)]
    best = np.min([total(h, np.broadcast_to(one, start.shape)) for one in sets], axis=0)
    assert (found.sum(axis=1) == num_pruned).all()
    np.testing.assert_allclose(before, total(h, start), rtol=ROUNDING)
    np.testing.assert_allclose(after, total(h, found), rtol=1e-3)
    assert (total(h, found) <= total(h, start) * (1 + ROUNDING)).all(), "never above the diagonal's choice"
    assert (total(h, found) <= best * (1 + LARGEST_GAP)).all(), (total(h, found) / best).max()


def test_what_may_not_move_stays() -> None:
    h = quadratics(12, 4)
    start, free = by_diagonal(h, 6), np.random.default_rng(2).random((40, 12)) < 0.6
    found, _, _ = map(np.asarray, search(jnp.float32(h), start, 12, free))
    np.testing.assert_array_equal(found[~free], start[~free])
    assert (found != start).any()


def random_tree(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}


def products_of(seed: int, size: int) -> dict[str, jax.Array]:
    """Σ x xᵀ of correlated inputs; one input is zero at all tokens."""
    rng, found = np.random.default_rng(seed), {}
    for path, (*layers, inputs, _) in SHAPES.items():
        padded = inputs + -inputs % size
        x = rng.normal(size=(50, *layers, padded)) + 2 * rng.normal(size=(50, *layers, 1))
        x[..., inputs:] = 0
        x[..., 1] = 0
        blocks = x.reshape(50, *layers, -1, size)
        found[path] = jnp.asarray(np.einsum("t...ic,t...id->...icd", blocks, blocks), jnp.float32)
    return found


def loss_of(
    scores: dict[str, jax.Array], kernels: Any, products: Any, pruned: dict[str, np.ndarray], size: int
) -> dict[tuple[Any, ...], float]:
    """½ θ_Qᵀ F_QQ θ_Q of every block in float64, written out."""
    losses = {}
    for path, kernel in kernels.items():
        leaves = [np.asarray(leaf, np.float64) for leaf in (kernel, scores[path], products[path])]
        w, s, p = (leaf[None] if kernel.ndim == 2 else leaf for leaf in leaves)
        out = pruned[path].reshape(w.shape)
        for layer, block, unit in np.ndindex(w.shape[0], p.shape[1], w.shape[2]):
            at = [i for i in range(block * size, min((block + 1) * size, w.shape[1])) if out[layer, i, unit]]
            loss = 0.0
            for i, j in itertools.product(at, at):
                h = 2 * np.sqrt(s[layer, i, unit] * s[layer, j, unit]) * np.sign(w[layer, i, unit] * w[layer, j, unit])
                own = p[layer, block, i % size, j % size]
                both = p[layer, block, i % size, i % size] * p[layer, block, j % size, j % size]
                loss += 0.5 * h * (1.0 if i == j else own / np.sqrt(both) if both else 0.0)
            losses[path, layer, block, unit] = loss
    return losses


@pytest.mark.parametrize("scope", ["global", "per_kernel", "per_row"])
def test_no_block_loses_more_than_by_the_cut(scope: str) -> None:
    kernels, products = random_tree(0), products_of(1, 6)
    start = {path: leaf > -1 for path, leaf in random_tree(4).items()} if scope == "global" else None
    start = start or {path: jnp.ones(shape, bool) for path, shape in SHAPES.items()}
    kernels = {path: jnp.where(start[path], leaf, 0) for path, leaf in kernels.items()}
    scores = {path: 0.5 * leaf**2 * (0.1 + random_tree(3)[path] ** 2) for path, leaf in kernels.items()}
    cut = prune_concept(start, scores, 0.5, scope=scope)
    found = swaps.swap(kernels, scores, products, start, cut)
    before, after = (
        loss_of(scores, kernels, products, {p: np.asarray(start[p] & ~of[p]) for p in SHAPES}, 6)
        for of in (cut, found.mask)
    )
    assert all(after[block] <= before[block] * (1 + ROUNDING) for block in before)
    assert found.before == pytest.approx(sum(before.values()), rel=1e-4)
    assert found.after == pytest.approx(sum(after.values()), rel=1e-4) and found.after < 0.9 * found.before
    for path, mask in found.mask.items():
        assert int(mask.sum()) == int(cut[path].sum())
        assert not np.asarray(mask & ~start[path]).any(), "what was pruned stays pruned"


@pytest.mark.well_compiled
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}], ids=["fsdp", "tensor"])
def test_swaps_on_a_mesh_are_those_of_one_device(sizes: dict[str, int]) -> None:
    mesh = sharding.make_mesh(**sizes)

    def placed(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
        specs = {path: NamedSharding(mesh, sharding.spec_for(path, leaf.ndim)) for path, leaf in tree.items()}
        return {path: jax.device_put(leaf, specs[path]) for path, leaf in tree.items()}

    kernels, products = random_tree(0), products_of(1, 6)
    scores = {path: 0.5 * leaf**2 for path, leaf in kernels.items()}
    start = {path: jnp.ones(shape, bool) for path, shape in SHAPES.items()}
    cut = prune_concept(start, scores, 0.5)
    expected = swaps.swap(kernels, scores, products, start, cut)
    got = swaps.swap(*map(placed, (kernels, scores)), products, *map(placed, (start, cut)))
    for path, mask in got.mask.items():
        np.testing.assert_array_equal(mask, expected.mask[path])
        assert mask.sharding.is_equivalent_to(NamedSharding(mesh, sharding.spec_for(path, mask.ndim)), mask.ndim)
    assert got.after == pytest.approx(expected.after, rel=1e-5)


def test_input_products_are_of_blocks_and_padded(tiny_backbone_config: BackboneConfig) -> None:
    config, params, _, _ = build(tiny_backbone_config)
    batch = random_batch(0)
    found = input_products(config.backbone, params, batch.input_ids, batch.attention_mask, block_size=12)
    squares = input_squares(config.backbone, params, batch.input_ids, batch.attention_mask)
    for path, leaf in found.items():
        diagonal = np.diagonal(leaf, axis1=-2, axis2=-1).reshape(*leaf.shape[:-3], -1)
        width = squares[path].shape[-1]
        np.testing.assert_allclose(diagonal[..., :width], squares[path], rtol=1e-5)
        assert not diagonal[..., width:].any() and (np.linalg.eigvalsh(leaf) > -1e-3).all()
        np.testing.assert_allclose(leaf, np.swapaxes(leaf, -1, -2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "cutting",
    [
        SparsityConfig(),
        SparsityConfig(regrow=True),
        SparsityConfig(reestimations=2),
        SparsityConfig(allotment="loss"),
        SparsityConfig(pinned=("layers/attention/key/kernel",)),
    ],
    ids=["plain", "regrow", "reestimations", "allotment", "pinned"],
)
def test_cut_goes_with_other_settings(cutting: SparsityConfig, tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config)
    arrays, batches = ModelArrays(params, masks, heads), [random_batch(seed) for seed in range(3)]
    pruner = PrunerConfig(criterion="combinatorial", block_size=8, num_grads=3)
    reports: list[Any] = []
    got = prune(config, arrays, batches, SPARSITIES, PruningOptions(pruner, cutting), PruningHooks(reports=reports))
    diagonal = dataclasses.replace(pruner, criterion="diagonal_fisher")
    by_diagonal = prune(config, arrays, batches, SPARSITIES, PruningOptions(diagonal, cutting))
    np.testing.assert_allclose(masks_lib.total_density(got), masks_lib.total_density(by_diagonal))
    assert any((np.asarray(got[path]) != np.asarray(by_diagonal[path])).any() for path in got)
    assert all(report["loss_after_swaps"] < report["loss_of_cut"] for report in reports)
    if not cutting.regrow:
        assert not any(np.asarray(got[path] & ~masks[path]).any() for path in got)
    for path in cutting.pinned:
        np.testing.assert_array_equal(got[path], masks[path])


def test_refused_combinations_name_the_setting(tiny_backbone_config: BackboneConfig) -> None:
    with pytest.raises(ValueError, match=r"expected config\.pruner\.pattern='1', not '2:4'"):
        PrunerConfig(criterion="combinatorial", pattern="2:4")
    pruner, cutting = PrunerConfig(criterion="combinatorial", num_grads=3), SparsityConfig(shared_fraction=0.5)
    with pytest.raises(ValueError, match=r"config\.sparsity\.shared_fraction does not go with"):
        RunConfig(pruner=pruner, sparsity=cutting)
    config, params, masks, heads = build(tiny_backbone_config)
    with pytest.raises(ValueError, match=r"config\.sparsity\.shared_fraction does not go with"):
        prune(config, ModelArrays(params, masks, heads), [random_batch(0)], 0.8, PruningOptions(pruner, cutting))


def test_a_bad_gradient_is_named_by_its_kernel() -> None:
    weights = {PATH: jnp.ones((2, 4, 3))}
    with pytest.raises(FloatingPointError, match=rf"{PATH}: a gradient is NaN or Inf"):
        criteria.combinatorial_scores(weights, [{PATH: weights[PATH].at[0, 1, 2].set(jnp.nan)}])
