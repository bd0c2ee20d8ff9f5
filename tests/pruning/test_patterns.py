"""Scores of what is pruned together, against the algebra written out and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.config.run_config import PATTERNS
from sparsecbm_jax.pruning import patterns
from sparsecbm_jax.pruning.patterns import Unit

pytestmark = pytest.mark.strict_rank

TOLERANCE = 1e-9


def problem(seed: int, num: int = 6, size: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, Fisher and its inverse in float64."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(num, 2 * size, size)) * np.exp(rng.normal(size=(num, 1, size)))
    fisher = np.einsum("nmb,nmc->nbc", gradients, gradients) / (2 * size) + 0.05 * np.eye(size)
    return rng.normal(size=(num, size)), fisher, np.linalg.inv(fisher)


def loss(weights: np.ndarray, inverse: np.ndarray, group: list[int]) -> float:
    return 0.5 * weights[group] @ np.linalg.solve(inverse[np.ix_(group, group)], weights[group])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_units_divide_a_block(pattern: str) -> None:
    unit = patterns.unit_of(pattern, 64)
    assert 64 % unit.group == 0 and 1 <= unit.pruned <= unit.group
    assert patterns.unit_of("block", 48) == Unit(48, 48) and patterns.unit_of("2:4", 48) == Unit(4, 2)
    if unit.group > 1 and pattern != "block":
        with pytest.raises(ValueError, match=r"do not divide blocks of 50"):
            patterns.unit_of(pattern if unit.group > 2 else "4", 50)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_groups_score_their_joint_loss(size: int) -> None:
    with jax.enable_x64(True):
        scored = jax.jit(lambda weights, inverse: patterns.group_scores(weights, inverse, size))
        for seed in range(20):
            weights, _, inverse = problem(seed)
            scores = np.asarray(scored(jnp.asarray(weights), jnp.asarray(inverse)))
            for n, start in itertools.product(range(len(weights)), range(0, 8, size)):
                group = list(range(start, start + size))
                expected = np.full(size, loss(weights[n], inverse[n], group) / size)
                np.testing.assert_allclose(scores[n, group], expected, rtol=TOLERANCE)


def test_two_of_four_is_the_cheapest_pair() -> None:
    with jax.enable_x64(True):
        scored = jax.jit(lambda weights, inverse: patterns.n_of_m_scores(weights, inverse, Unit(4, 2)))
        for seed in range(20):
            weights, _, inverse = problem(seed)
            scores = np.asarray(scored(jnp.asarray(weights), jnp.asarray(inverse)))
            for n, start in itertools.product(range(len(weights)), (0, 4)):
                pairs = list(itertools.combinations(range(start, start + 4), 2))
                losses = [loss(weights[n], inverse[n], list(pair)) for pair in pairs]
                best = list(pairs[int(np.argmin(losses))])
                assert np.flatnonzero(np.isfinite(scores[n, start : start + 4])).tolist() == [i - start for i in best]
                np.testing.assert_allclose(scores[n, best], min(losses) / 2, rtol=TOLERANCE)


def test_greedy_follows_obs_and_never_beats_brute_force() -> None:
    with jax.enable_x64(True):
        for seed in range(20):
            weights, fisher, inverse = problem(seed, num=5, size=6)
            scores = np.asarray(patterns.greedy_scores(jnp.asarray(weights), jnp.asarray(inverse)))
            for w, f, inv, got in zip(weights, fisher, inverse, scores, strict=True):
                left, removed, losses = np.arange(6), [], []
                while left.size:
                    # Written out: every candidate's joint loss from scratch.
                    joint = [loss(w, inv, [*removed, i]) for i in left]
                    losses.append(min(joint))
                    removed.append(int(left[np.argmin(joint)]))
                    left = np.setdiff1d(left, removed)
                assert np.argsort(got, kind="stable").tolist() == removed or np.any(np.diff(np.sort(got)) == 0)
                steps = np.maximum.accumulate(np.diff(losses, prepend=0.0))
                np.testing.assert_allclose(got[removed], steps, rtol=1e-7)
                for count in range(1, 6):
                    best = min(loss(w, inv, list(group)) for group in itertools.combinations(range(6), count))
                    assert best <= losses[count - 1] * (1 + TOLERANCE)
                    # Removed with the optimal update, the others' loss is what was predicted.
                    group = removed[:count]
                    delta = -inv[:, group] @ np.linalg.solve(inv[np.ix_(group, group)], w[group])
                    np.testing.assert_allclose(0.5 * delta @ f @ delta, losses[count - 1], rtol=1e-7)


def test_single_scores_are_spread_over_their_unit() -> None:
    scores = {"a": jnp.asarray([[4.0], [1.0], [3.0], [2.0]])}
    assert patterns.spread(scores, Unit(4, 4))["a"].ravel().tolist() == [2.5] * 4
    assert patterns.spread(scores, Unit(4, 2))["a"].ravel().tolist() == [np.inf, 1.5, np.inf, 1.5]
    with pytest.raises(ValueError, match="a has 4 inputs, which do not divide into groups of 8"):
        patterns.spread(scores, Unit(8, 8))
