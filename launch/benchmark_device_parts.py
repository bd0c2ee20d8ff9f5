"""What `benchmark_device.py` times of ours: scores and the cut, an intervention, the training step; on one device.

Every part makes a random model and calls the functions that training, pruning and intervening call. It prints what it
has found as soon as it knows it, and returns it as JSON. Peaks of memory are those of the process, so each part wants a
process of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsecbm_jax import backbones, fisher, intervention, minimal, programs, sharding, steps
from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax.blockwise import Report, woodfisher_scores
from sparsecbm_jax.cbm import CBMConfig, init_heads, make_forward
from sparsecbm_jax.chips import Chip, chip_of_kind
from sparsecbm_jax.config import PrunerConfig, RunConfig
from sparsecbm_jax.cutting import prune_concept
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.masks import Masks, Packed, Params
from sparsecbm_jax.pruning import final_sparsity
from sparsecbm_jax.woodfisher import form

_GB = 1e9
# Of what is left beside the model, the share that pruning may take where nothing is said.
_SHARE_FOR_PRUNING = 0.9
# Any number of steps: only the learning rates hang on it.
_NUM_STEPS = 1000


def say(text: str) -> None:
    print(text, flush=True)


class Compiler:
    """Counts the seconds of XLA's compiler, so that they can be told apart.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration


def about_device() -> dict[str, Any]:
    """Kind, memory in bytes (None on CPU) and library of the device at hand."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {"device_kind": device.device_kind, "bytes_limit": stats.get("bytes_limit"), "jax": jax.__version__}


def peak_bytes() -> int | None:
    """Most bytes of the device that this process had in use at once; None where the device does not say, as CPUs."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _chip() -> Chip | None:
    return chip_of_kind(jax.devices()[0].device_kind)


def _in_gb(size: float | None) -> str:
    return "not told by this device" if size is None else f"{size / _GB:.2f} GB"


def _share(amount: float, seconds: float, peak: float | None) -> float | None:
    return None if peak is None else amount / seconds / peak


def _percent(share: float | None) -> str:
    return "peak of this device not known" if share is None else f"{share:.1%} of the peak"


def wanted_bytes(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """What the compiler assigns a program, by kind; 'peak' is all of it at once."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    kinds = ("argument", "output", "temp", "alias")
    sizes = {kind: int(getattr(memory, f"{kind}_size_in_bytes")) for kind in kinds}
    # Donated arguments are where the outputs go.
    return sizes | {"peak": sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]}


def attempt(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a measurement found, or why it failed: one that finds too little memory leaves the others alone."""
    try:
        return measure()
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        say(f"{name}: failed: {first}")
        return {"error": first}


# --- A random model -----------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """Random weights and heads, and masks at the run's final sparsity."""

    config: CBMConfig
    params: Params
    masks: Masks
    heads: Any


def random_batch(config: CBMConfig, rows: int, length: int, seed: int) -> Batch:
    """Rows of random tokens without padding, every cell and row labelled."""
    rng, backbone = np.random.default_rng(seed), config.backbone
    # The first few ids stand for padding and the like.
    return Batch(
        rng.integers(4, backbone.vocab_size, (rows, length), np.int32),
        np.ones((rows, length), np.int32),
        rng.integers(0, config.num_classes, (rows, config.num_concepts), np.int32),
        rng.integers(0, config.num_labels, rows, np.int32),
        np.ones(rows, np.float32),
        np.arange(rows, dtype=np.int32),
    )


def _init(config: CBMConfig, dtype: str, rng: jax.Array) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), backbones.init_params(rng, config.backbone))


def random_params(config: CBMConfig, dtype: str = "float32") -> Params:
    """Weights of a fresh backbone, as float32 or rounded to another type."""
    return jax.jit(functools.partial(_init, config, dtype))(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_mask(key: jax.Array, shape: tuple[int, ...], density: float) -> jax.Array:
    # A kernel at a time: the random bits of all would take four times as much as they.
    *stacked, inputs, outputs = shape
    keys = jax.random.split(key, math.prod(stacked))
    return jax.lax.map(lambda one: jax.random.bernoulli(one, density, (inputs, outputs)), keys).reshape(shape)


def random_masks(config: CBMConfig, params: Params, density: float) -> Masks:
    """Boolean masks that keep about `density` of the weights."""
    paths, k = backbones.maskable_paths(config.backbone), config.num_concepts
    keys = jax.random.split(jax.random.key(1), len(paths))
    shapes = {path: (k, *masks_lib.leaf_at(params, path).shape) for path in paths}
    return {path: _random_mask(key, shapes[path], density) for path, key in zip(paths, keys, strict=True)}


def density_of(run: RunConfig, config: CBMConfig) -> float:
    return 1 - final_sparsity(run.sparsity, config.num_concepts)[0]


def _as_shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


# --- The pruner ---------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """As many passes as were asked for are done."""


class TimedGradients:
    """A stream of gradients that takes their time: the device is waited for before and after each.

    Attributes:
        seconds: that the gradients took.
        num_passes: how often the stream was gone through.
    """

    def __init__(self, gradients: Iterable[fisher.Kernels], most_passes: int | None) -> None:
        self.seconds, self.num_passes = 0.0, 0
        self._gradients, self._most_passes = gradients, most_passes

    def __iter__(self) -> Iterator[fisher.Kernels]:
        if self.num_passes == self._most_passes:
            raise _Enough
        stream = iter(self._gradients)
        while True:
            wait_for_device()
            start = time.perf_counter()
            if (gradient := next(stream, None)) is None:
                break
            jax.block_until_ready(gradient)
            self.seconds += time.perf_counter() - start
            yield gradient
        self.num_passes += 1


@jax.jit
def _next(number: jax.Array) -> jax.Array:
    return number + 1


def wait_for_device() -> None:
    """Returns when what was asked of the device before is done: it does one thing after the other."""
    jax.block_until_ready(_next(jnp.int32(0)))


def least_bytes(num_weights: int, pruner: PrunerConfig, num_passes: int) -> dict[str, float]:
    """Bytes that scoring and cutting one concept have to move at least, whatever a program moves besides.

    With n weights, m gradients, P passes, blocks of b and f = ⌈m / 32⌉ flushes of the gradients' buffer, in float32:

    - gradients: m P · 14 n. Each pass makes every gradient anew: θ (4 n) and its mask (n) are read forward and
      backward, the gradient (4 n) is written. Activations and tokens count for nothing.
    - scoring: m · 4 n, since every weight's gradients are read once, in the pass that has its piece; 2 f · 4 b n, since
      every flush writes the Gram blocks and all but the first read them, as the factorisation does; 8 n to read θ_k and
      to write the scores. The dual form (m < b) has no Gram blocks.
    - selection: 16 · 4 n + 2 n. The threshold is found two bits at a time, each a look at all scores; the mask is read
      and written.
    """
    n, m, b = num_weights, pruner.num_grads, pruner.block_size
    gram = 0 if form(m, b) == "dual" else 2 * math.ceil(m / fisher.BUFFER) * 4 * b
    found = {
        "gradients": float(m * num_passes * 14 * n),
        "scoring": float(n * (4 * m + gram + 8)),
        "selection": float(n * (16 * 4 + 2)),
    }
    return found | {"whole": sum(found.values())}


def pruner(run: RunConfig, *, most_passes: int | None, most_concepts: int | None) -> dict[str, Any]:
    """Times WoodFisher scores from dense masks and the cut to the final sparsity, concept by concept.

    What is held meanwhile is what `pruning.prune` holds: weights, the masks as they were and as they become, one
    concept's mask, kernels and scores. A warm-up, which compiles, goes through the same passes of the first concept with
    as few gradients as compile the same programs.

    Args:
        run: of it the backbone, `pruner`, `sparsity` and `data.max_length` count; `pruner.fisher_memory` of None stands
            for nine tenths of what the device has left.
        most_passes: times this many passes of the first concept; the rest is told as extrapolated.
        most_concepts: times this many concepts; all by default.

    Returns:
        Seconds, bytes and shares.
    """
    compiler, config = Compiler(), programs.model_config(run)
    params, heads = random_params(config), init_heads(jax.random.key(2), config)
    before = masks_lib.create(params, backbones.maskable_paths(config.backbone), config.num_concepts)
    run = dataclasses.replace(run, pruner=_with_memory(run.pruner, (params, heads), before))
    num_weights, sparsity = masks_lib.num_weights(before), 1 - density_of(run, config)
    plan = fisher.plan_passes({path: masks_lib.leaf_at(params, path) for path in before}, run.pruner)
    say(f"pruner: {fisher.describe_plan({path: masks_lib.leaf_at(params, path) for path in before}, run.pruner)}")

    forward, packed = make_forward(config), jax.jit(masks_lib.pack)(before)
    batches = [
        random_batch(config, run.pruner.grad_batch_size, run.data.max_length, seed)
        for seed in range(run.pruner.num_grads)
    ]
    jax.block_until_ready(forward(params, packed, heads, batches[0]))
    start = time.perf_counter()
    pairs = jax.block_until_ready([(batch, forward(params, packed, heads, batch).activations) for batch in batches])
    activation_seconds = time.perf_counter() - start
    del packed

    def timed(k: int, num_grads: int, masks: Masks) -> tuple[dict[str, Any], Masks]:
        """Scores and cuts a concept as `pruning.prune` does."""
        report: Report = {}
        wait_for_device()
        started = time.perf_counter()
        mask = masks_lib.concept(before, k)
        kernels = masks_lib.kernels_of(params, mask)
        stream = TimedGradients(
            fisher.SubnetworkGradients(config, params, mask, heads, pairs, k, limit=num_grads), most_passes
        )
        try:
            scores = woodfisher_scores(kernels, stream, config=run.pruner, report=report)
            is_whole = True
        except _Enough:
            # What is cut by hardly matters for the time it takes.
            scores, is_whole = jax.tree.map(jnp.abs, kernels), False
        wait_for_device()
        scored = time.perf_counter()
        new = masks_lib.replace_concept(masks, k, prune_concept(mask, scores, sparsity))
        wait_for_device()
        seconds = {
            "gradients": stream.seconds,
            "scoring": scored - started - stream.seconds,
            "selection": time.perf_counter() - scored,
        }
        found = {"seconds": seconds | {"whole": sum(seconds.values())}, "num_passes": stream.num_passes}
        return found | {"is_whole": is_whole, "qr_blocks": report.get("qr_blocks")}, new

    m, is_dual = run.pruner.num_grads, form(run.pruner.num_grads, run.pruner.block_size) == "dual"
    few = m if is_dual or m <= fisher.BUFFER else fisher.BUFFER + m % fisher.BUFFER
    start = time.perf_counter()
    timed(0, few, before)
    warm_up = {"seconds": time.perf_counter() - start, "num_grads": few, "compiler_seconds": compiler.seconds}
    say(
        f"pruner: warm-up with {few} gradients a pass in {warm_up['seconds']:.1f} s; compiling took "
        f"{compiler.seconds:.1f} s so far; activations of {m} minibatches {activation_seconds:.2f} s"
    )
    compiled_before, masks, concepts = compiler.seconds, before, []
    num_concepts = 1 if most_passes is not None else most_concepts or config.num_concepts
    for k in range(min(num_concepts, config.num_concepts)):
        found, masks = timed(k, m, masks)
        concepts.append(found)
        parts = ", ".join(f"{name} {value:.3f} s" for name, value in found["seconds"].items())
        say(f"pruner: concept {k}: {parts}; {found['num_passes']} passes")
    in_timed = compiler.seconds - compiled_before

    first = concepts[0]
    per_concept = {
        name: statistics.mean(found["seconds"][name] for found in concepts) for name in first["seconds"] if name != "whole"
    }
    if not first["is_whole"]:
        # The passes are filled to the same memory.
        scale = len(plan) / first["num_passes"]
        per_concept |= {name: per_concept[name] * scale for name in ("gradients", "scoring")}
        say(
            f"pruner: measured {first['num_passes']} of {len(plan)} passes of one concept, and a cut by |θ|; gradients "
            "and scoring below are extrapolated by the number of passes, and to all concepts"
        )
    elif len(concepts) < config.num_concepts:
        say(f"pruner: measured {len(concepts)} of {config.num_concepts} concepts; the total below is extrapolated")
    per_concept["whole"] = sum(per_concept.values())
    total = activation_seconds + config.num_concepts * per_concept["whole"]
    moved, chip = least_bytes(num_weights, run.pruner, len(plan)), _chip()
    bandwidth = None if chip is None else chip.memory_bandwidth
    shares = {name: _share(moved[name], per_concept[name], bandwidth) for name in moved}
    for name, seconds in per_concept.items():
        say(
            f"pruner: {name:<10}{seconds:>10.3f} s a concept, at least {moved[name] / _GB:.1f} GB: "
            f"{moved[name] / seconds / _GB:.1f} GB/s, {_percent(shares[name])}"
        )
    say(
        f"pruner: {total:.1f} s for {config.num_concepts} concepts of {num_weights} weights; {in_timed:.1f} s of "
        f"compiling in what was timed; peak memory {_in_gb(peak_bytes())}"
    )
    return {
        **about_device(),
        "num_weights": num_weights,
        "num_concepts": config.num_concepts,
        "pruner": dataclasses.asdict(run.pruner),
        "tokens": run.data.max_length,
        "planned_passes": len(plan),
        "is_extrapolated": not first["is_whole"] or len(concepts) < config.num_concepts,
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


def _with_memory(pruner: PrunerConfig, model: Any, masks: Masks) -> PrunerConfig:
    limit = about_device()["bytes_limit"]
    if pruner.fisher_memory is not None or limit is None:
        return pruner
    held, of_masks = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (model, masks))
    # The masks of all as they were and as they become, and one concept's.
    one = of_masks // masks_lib.num_concepts(masks)
    return dataclasses.replace(pruner, fisher_memory=int(_SHARE_FOR_PRUNING * (limit - held - 2 * of_masks - one)))


# --- An intervention ----------------------------------------------------------------------------------------------


def one_text(run: RunConfig, *, param_dtype: str, drop_fraction: float, num_rounds: int) -> dict[str, Any]:
    """Times a forward pass of one text, `intervene` and `minimal_edit`; first tells what the compiler wants for each.

    Args:
        run: of it the backbone, `sparsity` and `data.max_length`, the text's tokens, count.
        param_dtype: type of the weights; heads are float32.
        drop_fraction: of `intervene`.
        num_rounds: calls of each, after one that compiles.

    Returns:
        By name, bytes and milliseconds, or what went wrong.
    """
    compiler, config = Compiler(), programs.model_config(run)
    heads, batch = init_heads(jax.random.key(2), config), random_batch(config, 1, run.data.max_length, 0)
    params = jax.eval_shape(functools.partial(_init, config, param_dtype), jax.random.key(0))
    masks = {
        path: jax.ShapeDtypeStruct((config.num_concepts, *masks_lib.leaf_at(params, path).shape), jnp.bool_)
        for path in backbones.maskable_paths(config.backbone)
    }
    packed = jax.eval_shape(masks_lib.pack, masks)
    programs_of: dict[str, Callable[[], Any]] = {
        "forward": lambda: make_forward(config).lower(params, packed, heads, batch),  # type: ignore[attr-defined]
        "intervene": lambda: _lower_intervene(config, params, masks, heads, batch),
        "minimal_edit": lambda: _lower_minimal_edit(config, params, masks, heads, batch),
    }
    found: dict[str, Any] = {name: {"wanted_bytes": None} for name in programs_of}
    for name, lower in programs_of.items():
        found[name] |= attempt(name, lambda lower=lower: {"wanted_bytes": wanted_bytes(lower().compile())})  # type: ignore[misc]
        if found[name]["wanted_bytes"] is not None:
            sizes = ", ".join(f"{kind} {size / _GB:.2f}" for kind, size in found[name]["wanted_bytes"].items())
            say(f"intervention: {name} wants GB: {sizes}")

    model: dict[str, Any] = {}

    def make() -> dict[str, Any]:
        model["params"] = random_params(config, param_dtype)
        model["masks"] = random_masks(config, model["params"], density_of(run, config))
        model["packed"] = jax.jit(masks_lib.pack)(model["masks"])
        return {"peak_bytes": peak_bytes()}

    found["model"] = attempt("a random model", make)
    if "error" in found["model"]:
        return {**about_device(), **found}
    say(f"intervention: {masks_lib.num_weights(model['masks'])} maskable weights, peak so far {_in_gb(peak_bytes())}")
    arguments = (config, model["params"], model["masks"], heads, batch, 0, 1)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: make_forward(config)(model["params"], model["packed"], heads, batch),
        "intervene": lambda: intervention.intervene(*arguments, drop_fraction),
        "minimal_edit": lambda: minimal.minimal_edit(*arguments),
    }
    for name, call in calls.items():
        found[name] |= attempt(name, functools.partial(_times_of, name, call, num_rounds))
        # Only the forward pass takes packed masks.
        model.pop("packed", None)
    return {
        **about_device(),
        "param_dtype": param_dtype,
        "tokens": run.data.max_length,
        "drop_fraction": drop_fraction,
        "compiler_seconds": compiler.seconds,
        **found,
    }


def _times_of(name: str, call: Callable[[], Any], num_rounds: int) -> dict[str, Any]:
    jax.block_until_ready(call())
    times = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - start))
        # Its masks are as large as the model's.
        del result
    say(
        f"intervention: {name:<13}{statistics.median(times):>9.1f} ms (median of {num_rounds}; {min(times):.1f} to "
        f"{max(times):.1f}); peak memory so far {_in_gb(peak_bytes())}"
    )
    return {"median_ms": statistics.median(times), "ms": times, "peak_bytes": peak_bytes()}


def _lower_intervene(config: CBMConfig, params: Any, masks: Any, heads: Any, batch: Batch) -> jax.stages.Lowered:
    index, row = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    count = jax.ShapeDtypeStruct((), jnp.uint32)
    arguments = (config, params, masks, heads, batch, index, row, count, row, index, None)
    return intervention._intervene.lower(*arguments, saliency_fn=intervention.signed)


def _lower_minimal_edit(config: CBMConfig, params: Any, masks: Any, heads: Any, batch: Batch) -> jax.stages.Lowered:
    index, row = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    margin = jax.ShapeDtypeStruct((), jnp.float32)
    most = min(4096, masks_lib.num_weights(masks))
    return minimal._minimal_edit.lower(
        config, params, masks, heads, batch, index, row, margin, None, max_pairs=most
    )


# --- The training step --------------------------------------------------------------------------------------------


def train_step(
    run: RunConfig, *, dropout: bool, unroll_layers: bool, num_rounds: int, num_steps: int
) -> dict[str, Any]:
    """Times the jitted training step, its state donated, over batches of random texts.

    Args:
        run: of it the backbone, `training.batch_size`, `optim`, `sparsity` and `data.max_length`, the width, count.
        dropout: as the backbone's own; False trains without.
        unroll_layers: see `CBMConfig`.
        num_rounds: after a step that warms up.
        num_steps: of a round; the device is waited for at its end.

    Returns:
        Seconds a step of every round, and what follows from their median.
    """
    compiler, mesh = Compiler(), sharding.make_mesh(devices=jax.devices()[:1])
    shapes = programs.Shapes(run, mesh)
    config = dataclasses.replace(shapes.config, unroll_layers=unroll_layers)
    rows, length = run.training.batch_size, shapes.length
    tx = steps.make_optimizer(run.optim, _NUM_STEPS)
    state = _train_state(run, config, tx, mesh)
    batches = [sharding.put_batch(random_batch(config, rows, length, seed), mesh) for seed in range(num_steps)]
    step_fn = steps.make_train_step(config, tx, mesh, dropout=dropout)
    rng = jax.random.key(3)
    start = time.perf_counter()
    compiled = step_fn.lower(state, batches[0], rng).compile()  # type: ignore[attr-defined]
    wanted = wanted_bytes(compiled)
    say(
        f"step: compiled in {time.perf_counter() - start:.1f} s, of which the compiler {compiler.seconds:.1f} s; wants "
        f"{_in_gb(None if wanted is None else wanted['peak'])}"
    )
    state, metrics = compiled(state, batches[0], rng)
    jax.block_until_ready(state)
    seconds = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        for batch in batches:
            state, metrics = compiled(state, batch, rng)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - start) / num_steps)
    chip, flops, median = _chip(), programs.model_flops("train_step", shapes), statistics.median(seconds)
    mfu = _share(flops, median, None if chip is None else chip.flops)
    say(
        f"step: ours {median:.4f} s (median of {num_rounds} rounds; {min(seconds):.4f} to {max(seconds):.4f}), "
        f"{rows * length / median:.0f} tokens/s, {flops / median / 1e12:.1f} TFLOP/s, MFU: {_percent(mfu)}; peak memory "
        f"{_in_gb(peak_bytes())}; loss {float(metrics['loss']):.3f}"
    )
    return {
        **about_device(),
        "batch_size": rows,
        "length": length,
        "remat": config.remat,
        "unroll_layers": unroll_layers,
        "dropout": dropout,
        "compiler_seconds": compiler.seconds,
        "wanted_bytes": wanted,
        "seconds": seconds,
        "median_seconds": median,
        "tokens_a_second": rows * length / median,
        "model_flops": flops,
        "mfu": mfu,
        "peak_bytes": peak_bytes(),
    }


def _train_state(run: RunConfig, config: CBMConfig, tx: Any, mesh: Any) -> steps.TrainState:
    """A fresh state with random masks; what only led to it is gone when it is returned."""
    params = random_params(config)
    packed: Packed = jax.jit(masks_lib.pack)(random_masks(config, params, density_of(run, config)))
    places: Mapping[str, Any] = sharding.shardings(mesh, sharding.packed_specs(packed))
    state = steps.init_state(params, init_heads(jax.random.key(2), config), tx, mesh)
    return state._replace(packed=jax.tree.map(jax.device_put, packed, dict(places)))
