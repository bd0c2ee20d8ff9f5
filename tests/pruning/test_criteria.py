"""Scores of every criterion against algebra written out, what is said about them, and cuts by pattern."""

import dataclasses
import logging
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.config.run_config import CRITERIA, PATTERNS, PrunerConfig
from sparsecbm_jax.pruning import criteria, fisher, patterns
from sparsecbm_jax.pruning.gradients import Kernels
from sparsecbm_jax.pruning.masks_from_scores import prune_concept
from sparsecbm_jax.pruning.woodfisher_scores import ScoreReport, updated_kernels, woodfisher_scores

PATH = "layers/ffn_in/kernel"
SHAPE = (2, 16, 3)


class Stream:
    """Gradients that may be gone through again, and how often they were."""

    def __init__(self, gradients: np.ndarray, concept: int = 0) -> None:
        self.gradients, self.concept, self.passes = gradients, concept, 0

    def __iter__(self) -> Iterator[Kernels]:
        self.passes += 1
        return iter([{PATH: jnp.asarray(gradient, jnp.float32)} for gradient in self.gradients])

    def input_norms(self) -> Kernels:
        return {PATH: jnp.arange(32.0).reshape(2, 16)}


def kernels(seed: int = 0) -> Kernels:
    return {PATH: jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)}


def gradients(count: int = 20, rank: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(1)
    if rank is None:
        return rng.normal(size=(count, *SHAPE))
    return np.einsum("ur,rlio->ulio", rng.normal(size=(count, rank)), rng.normal(size=(rank, *SHAPE)))


def exact_scores(weights: np.ndarray, grads: np.ndarray, block: int, damping: float) -> np.ndarray:
    """½ w² / diag F⁻¹ in float64, block by block."""
    scores = np.empty(SHAPE)
    for layer, start, output in np.ndindex(SHAPE[0], SHAPE[1] // block, SHAPE[2]):
        at = (layer, slice(start * block, (start + 1) * block), output)
        g = grads[(slice(None), *at)]
        inverse = np.linalg.inv(damping * np.eye(block) + g.T @ g / len(g))
        scores[at] = weights[at] ** 2 / (2 * np.diag(inverse))
    return scores


def whole_scores(weights: np.ndarray, grads: np.ndarray) -> np.ndarray:
    """½ w² / diag F⁻¹ in float64, with all weights in one block."""
    rows = grads.reshape(len(grads), -1)
    inverse = np.linalg.inv(0.1 * np.mean(rows**2) * np.eye(rows.shape[1]) + rows.T @ rows / len(rows))
    return weights**2 / (2 * np.diag(inverse).reshape(weights.shape))


@pytest.mark.parametrize("num_grads", [4, 20], ids=["dual", "gram"])
def test_what_float32_cannot_invert_is_done_by_qr(num_grads: int) -> None:
    grads, weights = gradients(num_grads, rank=2), kernels()
    stream, report = Stream(grads), ScoreReport()
    config = PrunerConfig(block_size=8, num_grads=num_grads, damping=1e-7, damping_mode="absolute")
    scores = woodfisher_scores(weights, stream, config=config, report=report)
    expected = exact_scores(np.asarray(weights[PATH], np.float64), grads.astype(np.float32).astype(float), 8, 1e-7)
    np.testing.assert_allclose(scores[PATH], expected, rtol=1e-3)
    assert report["form"] == ("dual" if num_grads == 4 else "gram") and report["num_grads"] == num_grads
    assert report["qr_blocks"] == {PATH: 12}
    assert stream.passes == (1 if num_grads == 4 else 2), "kept gradients are not computed again"


def allowance(for_pieces: int) -> int:
    """Of which seven eighths are the 96 weights, two gradients of them, their scores, and so many bytes of pieces."""
    return -(-8 * (16 * 96 + for_pieces) // 7)


@pytest.mark.parametrize("num_grads", [4, 20], ids=["dual", "gram"])
@pytest.mark.parametrize("rank", [None, 2], ids=["sound", "ill-conditioned"])
def test_little_memory_takes_more_passes_and_gives_the_same_bits(num_grads: int, rank: int | None) -> None:
    stream, report, plenty = Stream(gradients(num_grads, rank)), ScoreReport(), ScoreReport()
    config = PrunerConfig(block_size=8, num_grads=num_grads, damping=1e-7, damping_mode="absolute")
    expected = woodfisher_scores(kernels(), Stream(stream.gradients), config=config, report=plenty)
    little = dataclasses.replace(config, fisher_memory=allowance(8000))
    got = woodfisher_scores(kernels(), stream, config=little, report=report)
    np.testing.assert_array_equal(got[PATH], expected[PATH])
    assert plenty["passes"] == 1 and report["passes"] == (1 if num_grads == 4 else 2)
    assert report["qr_blocks"] == plenty["qr_blocks"]
    tiny = dataclasses.replace(config, fisher_memory=allowance(16 * (8 * 20 if num_grads == 20 else 12 * 12)))
    np.testing.assert_array_equal(woodfisher_scores(kernels(), stream, config=tiny)[PATH], expected[PATH])
    with pytest.raises(ValueError, match=rf"fisher_memory is 900 bytes.*one output unit of {PATH} it has to be"):
        woodfisher_scores(kernels(), stream, config=dataclasses.replace(config, fisher_memory=900))


def test_the_plan_is_said() -> None:
    config = PrunerConfig(block_size=8, num_grads=20, fisher_memory=10_972)
    assert fisher.describe_plan(kernels(), config) == (
        "gram form, m = 20 gradients of minibatches of 8, blocks of 8: 2 passes a concept, 0 MiB (of 0 MiB allowed)"
    )


def test_well_conditioned_blocks_take_one_pass() -> None:
    stream, report = Stream(gradients()), ScoreReport()
    woodfisher_scores(kernels(), stream, config=PrunerConfig(block_size=8), report=report)
    assert stream.passes == 1 and report["qr_blocks"] == {}
    assert report["mean_square_over_damping"][PATH] == pytest.approx(10.0), "ζ is a tenth of mean g²"


def test_scores_that_have_become_magnitude_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    config = PrunerConfig(block_size=8, damping=1e-3, damping_mode="absolute")
    with caplog.at_level(logging.WARNING):
        scores = woodfisher_scores(kernels(), Stream(1e-4 * gradients()), config=config)
    assert f"{PATH} 1." in caplog.text and "pruner.damping" in caplog.text
    np.testing.assert_allclose(scores[PATH], 0.5e-3 * kernels()[PATH] ** 2, rtol=1e-3)
    caplog.clear()
    woodfisher_scores(kernels(), Stream(gradients()), config=config)
    assert not caplog.text


def test_a_bad_gradient_is_named_by_kernel_and_number() -> None:
    bad = gradients(6)
    bad[4, 1, 2, 0] = np.nan
    with pytest.raises(FloatingPointError, match=rf"{PATH}: gradient 4 \(counted from 0\) is NaN or Inf"):
        woodfisher_scores(kernels(), Stream(bad), config=PrunerConfig(block_size=8, num_grads=6))


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_has_its_definition(name: str) -> None:
    weights, grads = kernels(), gradients()
    config = PrunerConfig(criterion=name, block_size=8, num_grads=20)
    got = criteria.make_criterion(config, seed=3)(weights, Stream(grads))[PATH]
    w, mean, square = np.asarray(weights[PATH], np.float64), grads.mean(axis=0), (grads**2).mean(axis=0)
    expected = {
        "woodfisher": exact_scores(w, grads, 8, 0.1 * square.mean()),
        "magnitude": np.abs(w),
        "snip": np.abs(w * mean),
        "movement": -w * mean,
        "taylor": w**2 * square,
        "diagonal_fisher": 0.5 * w**2 * (square + 0.1 * square.mean()),
        "combinatorial": 0.5 * w**2 * (square + 0.1 * square.mean()),
        "wanda": np.abs(w) * np.arange(32.0).reshape(2, 16, 1),
        "m_fac": whole_scores(w, grads),
    }
    if name != "random":
        np.testing.assert_allclose(got, expected[name], rtol=1e-4, atol=1e-6)
        return
    again, other = (criteria.make_criterion(config, seed=3)(weights, Stream(grads, k))[PATH] for k in (0, 1))
    np.testing.assert_array_equal(got, again)
    assert not np.array_equal(got, other), "concepts get masks of their own"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("criterion", ["woodfisher", "magnitude"])
def test_units_are_pruned_whole_exactly_and_nested(criterion: str, pattern: str) -> None:
    config = PrunerConfig(criterion=criterion, pattern=pattern, block_size=16)
    unit = patterns.unit_of(pattern, 16)
    total = int(np.prod(SHAPE))
    previous = {PATH: jnp.ones(SHAPE, bool)}
    for sparsity in (0.25, 0.5):
        current = {PATH: jnp.where(previous[PATH], kernels()[PATH], 0)}
        scores = criteria.make_criterion(config)(current, Stream(gradients()))
        cut = prune_concept(previous, scores, sparsity, unit=unit)
        pruned = ~np.asarray(cut[PATH])
        assert pruned.sum() == round(sparsity * total / unit.pruned) * unit.pruned
        assert not (np.asarray(cut[PATH]) & ~np.asarray(previous[PATH])).any(), "what was pruned stays pruned"
        groups = pruned.reshape(2, 16 // unit.group, unit.group, 3).sum(axis=2)
        assert set(np.unique(groups)) <= {0, unit.pruned}
        previous = cut


@pytest.mark.parametrize("memory", [None, allowance(8000)])
@pytest.mark.parametrize("num_grads", [4, 20])
def test_what_stays_moves_to_its_optimum(num_grads: int, memory: int | None) -> None:
    grads, weights = gradients(num_grads), np.asarray(kernels()[PATH], np.float64)
    kept = np.random.default_rng(5).random(SHAPE) < 0.5
    config = PrunerConfig(block_size=8, num_grads=num_grads, fisher_memory=memory)
    got = updated_kernels(kernels(), Stream(grads), {PATH: jnp.asarray(kept)}, config)[PATH]
    assert not np.asarray(got)[~kept].any()
    damping = 0.1 * np.mean(grads**2)
    for layer, start, output in np.ndindex(2, 2, 3):
        at = (layer, slice(8 * start, 8 * start + 8), output)
        g = grads[(slice(None), *at)]
        slope = (damping * np.eye(8) + g.T @ g / len(g)) @ (np.asarray(got, np.float64)[at] - weights[at])
        np.testing.assert_allclose(slope[kept[at]], 0, atol=1e-4)


def test_weights_do_not_move_by_an_inverse_that_float32_has_not(caplog: pytest.LogCaptureFixture) -> None:
    config = PrunerConfig(block_size=8, num_grads=20, damping=1e-7, damping_mode="absolute")
    kept = np.random.default_rng(5).random(SHAPE) < 0.7
    grads = gradients(20)
    grads[..., 0] = gradients(20, rank=2)[..., 0]
    got = np.asarray(updated_kernels(kernels(), Stream(grads), {PATH: jnp.asarray(kept)}, config)[PATH])
    as_they_were = np.where(kept, kernels()[PATH], 0)
    np.testing.assert_array_equal(got[..., 0], as_they_were[..., 0])
    assert (got != as_they_were)[kept & (np.arange(3) > 0)].all() and not got[~kept].any()
    assert "the kept weights of 4 of 12 blocks stay as they are" in caplog.text


def test_more_than_two_of_four_is_refused() -> None:
    mask = {PATH: jnp.ones(SHAPE, bool)}
    with pytest.raises(ValueError, match=r"0\.6 is more than 2 of 4"):
        prune_concept(mask, kernels(), 0.6, unit=patterns.unit_of("2:4", 16))


def test_groups_that_do_not_divide_a_kernel_are_refused() -> None:
    config = PrunerConfig(pattern="8", block_size=8)
    odd = {"layers/ffn_in/kernel": jnp.ones((2, 12, 3))}
    with pytest.raises(ValueError, match="ffn_in/kernel has 12 inputs, which do not divide into groups of 8"):
        woodfisher_scores(odd, Stream(gradients()), config=config)
    with pytest.raises(ValueError, match="do not divide blocks of 50"):
        criteria.make_criterion(dataclasses.replace(config, block_size=50, criterion="snip"))
