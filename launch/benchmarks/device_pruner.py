"""Part 'pruner' of `benchmarks/device.py`: WoodFisher scores of every concept, and the cut."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsecbm_jax import backbones
from sparsecbm_jax.config.run_config import PrunerConfig, RunConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import Masks
from sparsecbm_jax.core.trees import Params, leaf_at
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import CBMConfig, Heads
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.heads import init_heads
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.planning import programs
from sparsecbm_jax.pruning import fisher
from sparsecbm_jax.pruning.gradients import Kernels, Subnetwork, SubnetworkGradients, subnetwork_gradient
from sparsecbm_jax.pruning.masks_from_scores import prune_concept
from sparsecbm_jax.pruning.woodfisher import form
from sparsecbm_jax.pruning.woodfisher_scores import ScoreReport, woodfisher_scores

from launch.benchmarks.device_model import (
    GB,
    Compiler,
    about_device,
    available_chip,
    density_of,
    in_gb,
    peak_bytes,
    percent,
    random_batch,
    random_params,
    say,
    share_of,
    wanted_bytes,
)

# Share of the memory that the model and its activations leave, which pruning takes by default.
_SHARE_FOR_PRUNING = 0.95


class _Enough(Exception):
    """The requested number of passes is done."""


class TimedGradients:
    """Iterates over gradients and times them: the device is waited for before and after each.

    Attributes:
        seconds: that the gradients took.
        num_passes: how often all of them were taken.
    """

    def __init__(self, gradients: Iterable[Kernels], most_passes: int | None) -> None:
        self.seconds, self.num_passes = 0.0, 0
        self._gradients, self._most_passes = gradients, most_passes

    def __iter__(self) -> Iterator[Kernels]:
        if self.num_passes == self._most_passes:
            raise _Enough
        gradients = iter(self._gradients)
        while True:
            wait_for_device()
            start = time.perf_counter()
            if (gradient := next(gradients, None)) is None:
                break
            jax.block_until_ready(gradient)
            self.seconds += time.perf_counter() - start
            yield gradient
        self.num_passes += 1


@jax.jit
def _next(number: jax.Array) -> jax.Array:
    return number + 1


def wait_for_device() -> None:
    """Waits until the device has finished all earlier work, which it does in order."""
    jax.block_until_ready(_next(jnp.int32(0)))


def least_bytes(num_weights: int, pruner: PrunerConfig, num_passes: int) -> dict[str, float]:
    """Counts the bytes that scoring and cutting one concept have to move at least, whatever a program moves besides.

    With n weights, m gradients, P passes, blocks of b and f = ⌈m / 32⌉ flushes of the gradients' buffer, in float32:

    - gradients: m P · 14 n. Each pass makes every gradient again: θ (4 n) and its mask (n) are read forward and
      backward, the gradient (4 n) is written. Activations and tokens count for nothing.
    - scoring: m · 4 n, since every weight's gradients are read once, in the pass that has its piece; 2 f · 4 b n, since
      every flush writes the Gram blocks and all but the first read them, as the factorisation does; 8 n to read θ_k and
      to write the scores. The dual form (m < b) has no Gram blocks.
    - selection: 16 · 4 n + 2 n. The threshold is found two bits at a time, and each step reads all scores; the mask is
      read and written.

    Args:
        num_weights: n, the maskable weights.
        pruner: The pruner's settings.
        num_passes: P.
    """
    n, m, b = num_weights, pruner.num_grads, pruner.block_size
    gram = 0 if form(m, b) == "dual" else 2 * math.ceil(m / fisher.BUFFER) * 4 * b
    found = {
        "gradients": float(m * num_passes * 14 * n),
        "scoring": float(n * (4 * m + gram + 8)),
        "selection": float(n * (16 * 4 + 2)),
    }
    return found | {"whole": sum(found.values())}


class _Subject(NamedTuple):
    """Holds the random dense model that is scored and cut, and the settings that it is done by."""

    run: RunConfig
    config: CBMConfig
    params: Params
    heads: Heads
    masks: Masks


def time_pruner(run: RunConfig, *, most_passes: int | None, most_concepts: int | None) -> dict[str, Any]:
    """Times WoodFisher scores from dense masks and the cut to the final sparsity, concept by concept.

    The memory holds the same arrays as in `pruning.prune`: weights, old and new masks, one concept's mask, kernels and
    scores. A warm-up, which compiles, runs the same passes of the first concept with as few gradients as compile the
    same programs.

    Args:
        run: The run, of which the backbone, `pruner`, `sparsity` and `data.max_length` are used. A
            `pruner.fisher_memory` of None takes 95 % of the memory that the model and a gradient's activations leave.
        most_passes: Number of passes of the first concept that are timed, the rest being extrapolated; None times all.
        most_concepts: Number of concepts that are timed; None times all.

    Returns:
        Seconds, bytes and shares.
    """
    compiler, subject = Compiler(), _make_subject(run)
    run, config, num_weights = subject.run, subject.config, masks_lib.num_weights(subject.masks)
    shared = {path: leaf_at(subject.params, path) for path in subject.masks}
    num_planned = len(fisher.plan_passes(shared, run.pruner))
    say(f"pruner: {fisher.describe_plan(shared, run.pruner)}")
    pairs, activation_seconds = _time_activations(subject)
    time_concept = functools.partial(_time_concept, subject, pairs, most_passes)

    few, start = _fewest_gradients(run.pruner), time.perf_counter()
    time_concept(0, few, subject.masks)
    warm_up = {"seconds": time.perf_counter() - start, "num_grads": few, "compiler_seconds": compiler.seconds}
    say(
        f"pruner: warm-up with {few} gradients a pass in {warm_up['seconds']:.1f} s; compiling took "
        f"{compiler.seconds:.1f} s so far; activations of {run.pruner.num_grads} minibatches "
        f"{activation_seconds:.2f} s"
    )
    compiled_before, masks, concepts = compiler.seconds, subject.masks, []
    num_concepts = 1 if most_passes is not None else most_concepts or config.num_concepts
    for k in range(min(num_concepts, config.num_concepts)):
        found, masks = time_concept(k, run.pruner.num_grads, masks)
        concepts.append(found)
        parts = ", ".join(f"{name} {value:.3f} s" for name, value in found["seconds"].items())
        say(f"pruner: concept {k}: {parts}; {found['num_passes']} passes")
    in_timed = compiler.seconds - compiled_before

    per_concept = _seconds_a_concept(concepts, num_planned, config.num_concepts)
    total = activation_seconds + config.num_concepts * per_concept["whole"]
    moved = least_bytes(num_weights, run.pruner, num_planned)
    shares = _shares_of_bandwidth(moved, per_concept)
    say(
        f"pruner: {total:.1f} s for {config.num_concepts} concepts of {num_weights} weights; {in_timed:.1f} s of "
        f"compiling in the timed parts; peak memory {in_gb(peak_bytes())}"
    )
    return {
        **about_device(),
        "num_weights": num_weights,
        "num_concepts": config.num_concepts,
        "pruner": dataclasses.asdict(run.pruner),
        "tokens": run.data.max_length,
        "planned_passes": num_planned,
        "is_extrapolated": not concepts[0]["is_whole"] or len(concepts) < config.num_concepts,
        "warm_up": warm_up,
        "compiler_seconds_in_timed": in_timed,
        "activation_seconds": activation_seconds,
        "by_concept": concepts,
        "seconds_a_concept": per_concept,
        "seconds_in_total": total,
        "least_bytes_a_concept": moved,
        "bandwidth_share": shares,
        "peak_bytes": peak_bytes(),
    }


def _make_subject(run: RunConfig) -> _Subject:
    config = programs.model_config(run)
    params, heads = random_params(config), init_heads(jax.random.key(2), config)
    masks = masks_lib.create(params, backbones.maskable_paths(config.backbone), config.num_concepts)
    run = dataclasses.replace(run, pruner=_with_memory(run, (params, heads), masks))
    return _Subject(run, config, params, heads, masks)


def _time_activations(subject: _Subject) -> tuple[list[tuple[Batch, jax.Array]], float]:
    """Computes σ(u) of all concepts for the minibatches that gradients are taken of, and times that."""
    run, config, params, heads, masks = subject
    forward, arrays = make_forward(config), ModelArrays(params, jax.jit(masks_lib.pack)(masks), heads)
    batches = [
        random_batch(config, run.pruner.grad_batch_size, run.data.max_length, seed)
        for seed in range(run.pruner.num_grads)
    ]
    jax.block_until_ready(forward(arrays, batches[0]))
    start = time.perf_counter()
    pairs = jax.block_until_ready([(batch, forward(arrays, batch).activations) for batch in batches])
    return pairs, time.perf_counter() - start


def _time_concept(
    subject: _Subject,
    pairs: list[tuple[Batch, jax.Array]],
    most_passes: int | None,
    k: int,
    num_grads: int,
    masks: Masks,
) -> tuple[dict[str, Any], Masks]:
    """Scores and cuts a concept as `pruning.prune` does.

    Args:
        subject: the model, whose masks are those before any cut.
        pairs: minibatches, with activations of all concepts.
        most_passes: ends after this many passes over the gradients.
        k: the concept.
        num_grads: gradients of a pass.
        masks: the masks as they have become.

    Returns:
        Seconds and what was done in them, and the new masks.
    """
    run, config, params, heads, before = subject
    sparsity, report = 1 - density_of(run, config), ScoreReport()
    wait_for_device()
    started = time.perf_counter()
    subnetwork = Subnetwork(config, params, masks_lib.concept(before, k), heads, k)
    kernels = subnetwork.kernels
    gradients = TimedGradients(SubnetworkGradients(subnetwork, pairs, limit=num_grads), most_passes)
    try:
        scores = woodfisher_scores(kernels, gradients, config=run.pruner, report=report)
        is_whole = True
    except _Enough:
        # What is cut by hardly matters for the time it takes.
        scores, is_whole = jax.tree.map(jnp.abs, kernels), False
    wait_for_device()
    scored = time.perf_counter()
    cut = prune_concept(subnetwork.mask, scores, sparsity)
    new = masks_lib.replace_concept(masks, k, cut)
    wait_for_device()
    seconds = {
        "gradients": gradients.seconds,
        "scoring": scored - started - gradients.seconds,
        "selection": time.perf_counter() - scored,
    }
    found = {"seconds": seconds | {"whole": sum(seconds.values())}, "num_passes": gradients.num_passes}
    return found | {"is_whole": is_whole, "qr_blocks": report.get("qr_blocks")}, new


def _fewest_gradients(pruner: PrunerConfig) -> int:
    """Counts the gradients that a pass needs at least to compile what it compiles with all of them."""
    m = pruner.num_grads
    if form(m, pruner.block_size) == "dual" or m <= fisher.BUFFER:
        return m
    return fisher.BUFFER + m % fisher.BUFFER


def _seconds_a_concept(concepts: list[dict[str, Any]], num_planned: int, num_concepts: int) -> dict[str, float]:
    """Averages over the concepts that were timed; extrapolates where not all passes of the first one were."""
    first = concepts[0]
    per_concept = {
        name: statistics.mean(found["seconds"][name] for found in concepts)
        for name in first["seconds"]
        if name != "whole"
    }
    if not first["is_whole"]:
        # The passes are filled to the same memory.
        scale = num_planned / first["num_passes"]
        per_concept |= {name: per_concept[name] * scale for name in ("gradients", "scoring")}
        say(
            f"pruner: measured {first['num_passes']} of {num_planned} passes of one concept, and a cut by |θ|; "
            "gradients and scoring below are extrapolated by the number of passes, and to all concepts"
        )
    elif len(concepts) < num_concepts:
        say(f"pruner: measured {len(concepts)} of {num_concepts} concepts; the total below is extrapolated")
    return per_concept | {"whole": sum(per_concept.values())}


def _shares_of_bandwidth(moved: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float | None]:
    """Compares bytes that have to be moved in some seconds with the device's bandwidth, and says so."""
    chip = available_chip()
    bandwidth = None if chip is None else chip.memory_bandwidth
    shares = {name: share_of(moved[name], seconds[name], bandwidth) for name in moved}
    for name, spent in seconds.items():
        say(
            f"pruner: {name:<10}{spent:>10.3f} s a concept, at least {moved[name] / GB:.1f} GB: "
            f"{moved[name] / spent / GB:.1f} GB/s, {percent(shares[name])}"
        )
    return shares


def _with_memory(run: RunConfig, model: Any, masks: Masks) -> PrunerConfig:
    """Returns the run's pruner, with a memory where none is set and the device has a limit."""
    limit = about_device()["bytes_limit"]
    if run.pruner.fisher_memory is not None or limit is None:
        return run.pruner
    held, of_masks = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (model, masks))
    # Old and new masks of all concepts, and one concept's.
    held += 2 * of_masks + of_masks // masks_lib.num_concepts(masks)
    config, (params, heads) = programs.model_config(run), model
    rows = run.pruner.grad_batch_size
    gradient = subnetwork_gradient.lower(
        config,
        params,
        {path: jax.ShapeDtypeStruct(mask.shape[1:], mask.dtype) for path, mask in masks.items()},
        heads,
        random_batch(config, rows, run.data.max_length, 0),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((rows, config.num_concepts, config.num_classes), jnp.float32),
    )
    needed = wanted_bytes(gradient.compile())
    activations = 0 if needed is None else needed["temp"]
    say(f"pruner: of {in_gb(limit)} the model and masks take {in_gb(held)}, one running gradient {in_gb(activations)}")
    return dataclasses.replace(run.pruner, fisher_memory=int(_SHARE_FOR_PRUNING * (limit - held - activations)))
