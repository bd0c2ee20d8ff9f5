"""Exact selection against a stable sort, with ties, special values and shards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsecbm_jax.core import selection, sharding

pytestmark = [pytest.mark.well_compiled, pytest.mark.strict_rank]

VALUES = {
    "distinct": lambda rng, n: rng.normal(size=n),
    "ties": lambda rng, n: rng.integers(0, 4, n),
    "all equal": lambda rng, n: np.full(n, 2.5),
    "signed zeros": lambda rng, n: rng.choice([-0.0, 0.0], n),
    "infinities": lambda rng, n: rng.choice([-np.inf, 1.0, np.inf], n),
    "denormals": lambda rng, n: rng.choice([1e-45, 3e-45, 1e-40, 0.0], n),
    "negative": lambda rng, n: -rng.integers(0, 5, n) * 0.25,
}


def oracle(scores: dict[str, np.ndarray], count: int, eligible: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    paths = sorted(scores)
    flat = np.concatenate([scores[path].ravel() for path in paths])
    allowed = np.flatnonzero(np.concatenate([eligible[path].ravel() for path in paths]))
    # The integer view orders denormals, which a float comparison may flush; −0 equals +0.
    bits = (flat + np.float32(0)).view(np.int32).astype(np.int64)
    order = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    chosen = np.zeros(flat.size, bool)
    chosen[allowed[np.argsort(order[allowed], kind="stable")[:count]]] = True
    out, start = {}, 0
    for path in paths:
        out[path] = chosen[start : start + scores[path].size].reshape(scores[path].shape)
        start += scores[path].size
    return out


@pytest.mark.parametrize("kind", VALUES)
def test_equals_a_stable_sort(kind: str) -> None:
    rng = np.random.default_rng(0)
    select = jax.jit(selection.select_smallest)
    for trial in range(6):
        shapes = {"b": (3, 17), "a": (5, 4, 2), "c": (128, 2)}
        scores = {
            path: VALUES[kind](rng, np.prod(shape)).astype(np.float32).reshape(shape) for path, shape in shapes.items()
        }
        eligible = {path: rng.random(shape) < (0.3, 1.1)[trial % 2] for path, shape in shapes.items()}
        total = sum(int(e.sum()) for e in eligible.values())
        for count in (0, 1, total // 2, total - 1, total, total + 5):
            got = select(scores, max(count, 0), eligible)
            chex.assert_trees_all_equal(jax.tree.map(np.asarray, got), oracle(scores, max(count, 0), eligible))


def test_the_count_is_traced_not_compiled() -> None:
    select = jax.jit(chex.assert_max_traces(selection.select_smallest, n=1))
    for count in range(4):
        assert int(select({"a": jnp.arange(5.0)}, jnp.uint32(count))["a"].sum()) == count


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_ordered_as_it_is_in_float32(dtype: str) -> None:
    select = jax.jit(selection.select_smallest)
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), dtype)
    scores = scores.at[0, :4].set(jnp.array([jnp.inf, -jnp.inf, -0.0, 0.0], dtype)).at[1, 0].set(jnp.nan)
    assert selection.order_key(scores).dtype == jnp.uint16
    for count in (0, 1, 700, 64 * 32):
        picked = select({"a": scores, "b": -scores}, count)
        # A tree of several types is ordered as one.
        chex.assert_trees_all_equal(picked, select({"a": scores.astype(jnp.float32), "b": -scores}, count))
        assert sum(int(flags.sum()) for flags in picked.values()) == count


@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_counts_carry_into_their_high_part(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do beyond 2¹⁶, with a low part of three bits."""
    monkeypatch.setattr(selection, "_LOW", 3)
    rng = np.random.default_rng(2)
    shapes = {"a": (3, 17), "b": (5, 4, 2), "c": (128, 2)}
    scores = {
        path: VALUES[kind](rng, np.prod(shape)).astype(np.float32).reshape(shape) for path, shape in shapes.items()
    }
    eligible = {path: rng.random(shape) < 0.8 for path, shape in shapes.items()}
    select = jax.jit(lambda count: selection.select_smallest(scores, count, eligible))
    for count in (0, 7, 8, 9, 63, 64, 100, 200, 400):
        got = select(selection.exact_count(count))
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, got), oracle(scores, count, eligible))


def test_more_than_two_to_the_32_weights_can_be_counted() -> None:
    kernel = jax.ShapeDtypeStruct((64, 9216, 36864), jnp.float32)
    chosen = jax.eval_shape(lambda scores: selection.select_smallest({"w": scores}, 3 * 2**32), kernel)
    assert chosen["w"].shape == kernel.shape
    high, low = selection.exact_count(3 * 2**32 + 5).tolist()
    assert (high * 2**16 + low, low) == (3 * 2**32 + 5, 5)
    wide = jax.ShapeDtypeStruct((2**16, 2**17), jnp.float32)
    with pytest.raises(ValueError, match=r"w: an array of \(65536, 131072\) cannot be counted"):
        jax.eval_shape(lambda scores: selection.select_smallest({"w": scores}, 1), wide)


def test_same_bits_under_any_sharding() -> None:
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    scores = np.random.default_rng(1).integers(0, 3, (128, 16)).astype(np.float32)
    expected = np.asarray(selection.select_smallest({"w": jnp.asarray(scores)}, 961)["w"])
    for spec in (P(), P("fsdp"), P(None, "tensor"), P("fsdp", "tensor"), P(("tensor", "fsdp"))):
        placed = jax.device_put(scores, NamedSharding(mesh, spec))
        got = jax.jit(selection.select_smallest)({"w": placed}, 961)["w"]
        np.testing.assert_array_equal(np.asarray(got), expected)


@pytest.mark.parametrize("shape", [(64, 32), (128, 32), (3, 16, 32)], ids=["plain", "folded", "stacked"])
def test_no_gather_of_sharded_scores(shape: tuple[int, ...]) -> None:
    mesh = sharding.make_mesh(fsdp=8)
    spec = P("fsdp") if len(shape) == 2 else P(None, "fsdp")
    placed = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    text = jax.jit(lambda s: selection.select_smallest({"w": s}, 100)).lower(placed).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text and "all-to-all" not in text
    assert " sort(" not in text


def test_leaves_of_one_shape_that_lie_differently_are_not_gathered() -> None:
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    specs = {"a": P(None, "fsdp", "tensor"), "b": P(None, ("tensor", "fsdp"), None)}
    scores = {
        path: jax.ShapeDtypeStruct((3, 64, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
        for path, spec in specs.items()
    }
    text = jax.jit(lambda s: selection.select_smallest(s, 100)).lower(scores).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text


def test_float64_orders_by_all_its_bits() -> None:
    with jax.enable_x64(True):
        scores = jnp.asarray([1.0, 1.0 + 1e-12, 1.0 - 1e-12], jnp.float64)
        assert selection.select_smallest({"w": scores}, 2)["w"].tolist() == [True, False, True]


def test_nan_is_largest() -> None:
    scores = jnp.asarray([jnp.nan, 1.0, -jnp.nan, jnp.inf])
    assert selection.select_smallest({"w": scores}, 2)["w"].tolist() == [False, True, False, True]


def test_other_paths_or_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different paths"):
        selection.select_smallest({"a": jnp.zeros(2)}, 1, {"b": jnp.ones(2, bool)})
    with pytest.raises(ValueError, match=r"a: scores \(2,\) but eligible \(3,\)"):
        selection.select_smallest({"a": jnp.zeros(2)}, 1, {"a": jnp.ones(3, bool)})
