"""Parts 'intervention' and 'step' of `benchmarks/device.py`: one text through a sparse model, and the training step."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsecbm_jax import backbones
from sparsecbm_jax.config.run_config import RunConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.masks import Packed
from sparsecbm_jax.core.trees import leaf_at
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.fixed_size_edit import _intervene, intervene
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection
from sparsecbm_jax.intervention.minimal_edit import _minimal_edit, minimal_edit
from sparsecbm_jax.intervention.ranking import signed
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.heads import init_heads
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.planning import programs
from sparsecbm_jax.training import train_step

from launch.benchmarks.device_model import (
    GB,
    Compiler,
    about_device,
    attempt,
    available_chip,
    density_of,
    in_gb,
    init,
    peak_bytes,
    percent,
    random_batch,
    random_masks,
    random_params,
    say,
    share_of,
    wanted_bytes,
)

# Any number of steps: only the learning rates depend on it.
_NUM_STEPS = 1000


def time_text(run: RunConfig, *, param_dtype: str, drop_fraction: float, num_rounds: int) -> dict[str, Any]:
    """Times a forward pass of one text, `intervene` and `minimal_edit`; first reports the memory of each program.

    Args:
        run: The run, of which the backbone, `sparsity` and `data.max_length` (the text's tokens) are used.
        param_dtype: Type of the weights; heads are float32.
        drop_fraction: Share of the backbone's weights that `intervene` drops, and grows.
        num_rounds: Number of timed calls of each, after one that compiles.

    Returns:
        By name, bytes and milliseconds, or the error.
    """
    compiler, config = Compiler(), programs.model_config(run)
    heads, batch = init_heads(jax.random.key(2), config), random_batch(config, 1, run.data.max_length, 0)
    params = jax.eval_shape(functools.partial(init, config, param_dtype), jax.random.key(0))
    masks = {
        path: jax.ShapeDtypeStruct((config.num_concepts, *leaf_at(params, path).shape), jnp.bool_)
        for path in backbones.maskable_paths(config.backbone)
    }
    arrays = ModelArrays(params, jax.eval_shape(masks_lib.pack, masks), heads)
    programs_of: dict[str, Callable[[], Any]] = {
        "forward": lambda: make_forward(config).lower(arrays, batch),  # type: ignore[attr-defined]
        "intervene": lambda: _lower_intervene(config, arrays, batch),
        "minimal_edit": lambda: _lower_minimal_edit(config, arrays, batch),
    }
    found: dict[str, Any] = {name: {"wanted_bytes": None} for name in programs_of}
    for name, lower in programs_of.items():
        found[name] |= attempt(name, lambda lower=lower: {"wanted_bytes": wanted_bytes(lower().compile())})  # type: ignore[misc]
        if found[name]["wanted_bytes"] is not None:
            sizes = ", ".join(f"{kind} {size / GB:.2f}" for kind, size in found[name]["wanted_bytes"].items())
            say(f"intervention: {name} needs GB: {sizes}")

    model: dict[str, Any] = {}

    def make() -> dict[str, Any]:
        model["params"] = random_params(config, param_dtype)
        masks = random_masks(config, model["params"], density_of(run, config))
        model["masks"] = jax.jit(masks_lib.pack)(masks)
        return {"peak_bytes": peak_bytes()}

    found["model"] = attempt("a random model", make)
    if "error" in found["model"]:
        return {**about_device(), **found}
    say(f"intervention: {masks_lib.num_weights(model['masks'])} maskable weights, peak so far {in_gb(peak_bytes())}")
    made = ModelArrays(model["params"], model["masks"], heads)
    correction = ConceptCorrection(batch, 0, 1)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: make_forward(config)(made, batch),
        "intervene": lambda: intervene(config, made, correction, drop_fraction),
        "minimal_edit": lambda: minimal_edit(config, made, correction),
    }
    for name, call in calls.items():
        found[name] |= attempt(name, functools.partial(_times_of, name, call, num_rounds))
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
        f"{max(times):.1f}); peak memory so far {in_gb(peak_bytes())}"
    )
    return {"median_ms": statistics.median(times), "ms": times, "peak_bytes": peak_bytes()}


def _lower_intervene(config: CBMConfig, arrays: ModelArrays, batch: Batch) -> jax.stages.Lowered:
    index, row = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    count = jax.ShapeDtypeStruct((), jnp.uint32)
    correction = ConceptCorrection(batch, index, row, row)  # type: ignore[arg-type]
    return _intervene.lower(config, arrays, correction, count, index, None, saliency_fn=signed)


def _lower_minimal_edit(config: CBMConfig, arrays: ModelArrays, batch: Batch) -> jax.stages.Lowered:
    index, row = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    margin = jax.ShapeDtypeStruct((), jnp.float32)
    most = min(4096, masks_lib.num_weights(arrays.concept_masks))
    correction = ConceptCorrection(batch, index, row, row)  # type: ignore[arg-type]
    return _minimal_edit.lower(config, arrays, correction, margin, None, max_pairs=most)


def time_train_step(
    run: RunConfig, *, dropout: bool, unroll_layers: bool, num_rounds: int, num_steps: int
) -> dict[str, Any]:
    """Times the jitted training step, its state donated, over batches of random texts.

    Args:
        run: The run, of which the backbone, `training.batch_size`, `optim`, `sparsity` and `data.max_length` (the
            width) are used.
        dropout: True trains with the backbone's own dropout, False without.
        unroll_layers: See `CBMConfig`.
        num_rounds: Number of timed rounds, after a step that warms up.
        num_steps: Steps of a round; the round ends when the device has finished.

    Returns:
        Seconds a step of every round, and the rates that follow from their median.
    """
    compiler, mesh = Compiler(), sharding.make_mesh(devices=jax.devices()[:1])
    shapes = programs.Shapes(run, mesh)
    config = dataclasses.replace(shapes.config, unroll_layers=unroll_layers)
    rows, length = run.training.batch_size, shapes.length
    tx = train_step.make_optimizer(run.optim, _NUM_STEPS)
    state = _train_state(run, config, tx, mesh)
    batches = [sharding.put_batch(random_batch(config, rows, length, seed), mesh) for seed in range(num_steps)]
    step_fn = train_step.make_train_step(config, tx, mesh, dropout=dropout)
    rng = jax.random.key(3)
    start = time.perf_counter()
    compiled = step_fn.lower(state, batches[0], rng).compile()  # type: ignore[attr-defined]
    needed = wanted_bytes(compiled)
    say(
        f"step: compiled in {time.perf_counter() - start:.1f} s, of which the compiler {compiler.seconds:.1f} s; needs "
        f"{in_gb(None if needed is None else needed['peak'])}"
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
    chip, flops, median = available_chip(), programs.model_flops("train_step", shapes), statistics.median(seconds)
    mfu = share_of(flops, median, None if chip is None else chip.flops)
    say(
        f"step: ours {median:.4f} s (median of {num_rounds} rounds; {min(seconds):.4f} to {max(seconds):.4f}), "
        f"{rows * length / median:.0f} tokens/s, {flops / median / 1e12:.1f} TFLOP/s, MFU: {percent(mfu)}; "
        f"peak memory {in_gb(peak_bytes())}; loss {float(metrics['loss']):.3f}"
    )
    return {
        **about_device(),
        "batch_size": rows,
        "length": length,
        "remat": config.remat,
        "unroll_layers": unroll_layers,
        "dropout": dropout,
        "compiler_seconds": compiler.seconds,
        "wanted_bytes": needed,
        "seconds": seconds,
        "median_seconds": median,
        "tokens_a_second": rows * length / median,
        "model_flops": flops,
        "mfu": mfu,
        "peak_bytes": peak_bytes(),
    }


def _train_state(run: RunConfig, config: CBMConfig, tx: Any, mesh: Any) -> train_step.TrainState:
    """Makes a fresh state with random masks; intermediate arrays are freed when it is returned."""
    params = random_params(config)
    packed: Packed = jax.jit(masks_lib.pack)(random_masks(config, params, density_of(run, config)))
    places: Mapping[str, Any] = sharding.shardings(mesh, sharding.packed_specs(packed))
    state = train_step.init_state(params, init_heads(jax.random.key(2), config), tx, mesh)
    return state._replace(packed=jax.tree.map(jax.device_put, packed, dict(places)))
