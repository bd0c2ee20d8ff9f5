"""Times the K-mask training step on CPU beside the same step in PyTorch and beside the authors' way of doing it.

python launch/benchmark.py --output=runs/benchmark.json
python launch/benchmark.py --config=configs/cebab.py --config.data.path=DIR --output=runs/benchmark.json

Without --config it reads the embedded reviews; DIR holds CEBaB as published. The masks are random, at the run's final
sparsity (1 − 1/K where none is set). Ours and PyTorch's do the whole of the same step (embeddings, dropout, K masked
passes, heads, joint loss, backward, norm clipping, Adam with two rates, constant here) on the same consecutive batches,
turn by turn, so that the machine's load hits both: only the ratios of one run mean anything. PyTorch first tries its
settings and keeps the fastest. The authors' way is a single step, padded to 512 tokens; with batch 8 it needs 12 GB.

Takes about ten minutes on 2 CPU cores, half of them to compile; JAX_COMPILATION_CACHE_DIR saves that the next time.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import command_line
from absl import flags

if TYPE_CHECKING:
    import jax

    from sparsecbm_jax.cbm import CBMConfig
    from sparsecbm_jax.config import OptimConfig, RunConfig
    from sparsecbm_jax.data import Batch
    from sparsecbm_jax.masks import Masks, Params

FLAGS = flags.FLAGS
command_line.define_config()
flags.adopt_module_key_flags(command_line)
flags.DEFINE_integer("num_batches", 12, "Consecutive batches of a round.", lower_bound=1)
flags.DEFINE_integer("num_rounds", 7, "Rounds, each of ours and then PyTorch's.", lower_bound=1)
flags.DEFINE_bool("authors", True, "Also time one step of the authors' way.")
flags.DEFINE_bool("torch_compile", False, "Also try torch.compile, which needs a C++ compiler and takes long.")
flags.DEFINE_string("output", None, "JSON file to write.")

DEFAULT_CONFIG = "configs/common.py"
AUTHORS_LENGTH = 512
# Seconds without work between the turns, in which the threads of the one go to sleep before the other starts.
_PAUSE = 0.3


class Workload(NamedTuple):
    """What both sides train, and on what."""

    config: CBMConfig
    params: Params
    heads: Any
    masks: Masks
    optim: OptimConfig
    epoch: list[Batch]
    padded: Batch


class OurStep:
    """`make_train_step` as the training loop calls it: the batch is placed, nothing is waited for."""

    def __init__(self, work: Workload, *, dropout: bool = True) -> None:
        import jax

        from sparsecbm_jax import masks, sharding, steps

        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        tx = steps.make_optimizer(work.optim, num_steps=1)
        self.state = steps.init_state(work.params, work.heads, tx, self.mesh)
        packed = masks.pack(work.masks)
        places = sharding.shardings(self.mesh, sharding.packed_specs(packed))
        self.state = self.state._replace(packed=jax.tree.map(jax.device_put, packed, places))
        self.step_fn = steps.make_train_step(work.config, tx, self.mesh, dropout=dropout)
        self.rng = jax.random.key(0)

    def __call__(self, batch: Batch) -> jax.Array:
        """Does the step; returns the loss."""
        from sparsecbm_jax import sharding

        self.state, metrics = self.step_fn(self.state, sharding.put_batch(batch, self.mesh), self.rng)
        return metrics["loss"]

    def wait(self) -> None:
        """Returns when the last step is done."""
        import jax

        jax.block_until_ready(self.state)


def prepare(run: RunConfig) -> Workload:
    """Weights, heads, random masks and the batches of the first epoch."""
    import jax

    from sparsecbm_jax import backbones, cbm, training
    from sparsecbm_jax.data import train_batches
    from sparsecbm_jax.masks import leaf_at

    if run.strategy != "sparse":
        raise ValueError(f"strategy is {run.strategy!r}; the benchmark times 'sparse'")
    prepared = training.prepare(run)
    config, split = prepared.config, prepared.splits["train"]
    sparsity = 1 - 1 / config.num_concepts if run.sparsity.final is None else run.sparsity.final
    paths = backbones.maskable_paths(config.backbone)
    masks = {
        path: jax.random.bernoulli(key, 1 - sparsity, (config.num_concepts, *leaf_at(prepared.params, path).shape))
        for path, key in zip(paths, jax.random.split(jax.random.key(run.seed), len(paths)), strict=True)
    }
    optim = dataclasses.replace(run.optim, warmup_fraction=0.0, decay="constant", weight_decay=0.0)
    order = functools.partial(train_batches, split, batch_size=run.training.batch_size, seed=run.seed, epoch=0)
    return Workload(
        config,
        prepared.params,
        cbm.init_heads(jax.random.key(run.seed), config),
        masks,
        optim,
        list(order()),
        next(order(buckets=(min(AUTHORS_LENGTH, split.max_length),))),
    )


def timed(step: Callable[[Batch], Any], batches: Sequence[Batch], wait: Callable[[], None] = lambda: None) -> float:
    """Mean seconds of a step over the batches."""
    time.sleep(_PAUSE)
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    wait()
    return (time.perf_counter() - start) / len(batches)


def compare(work: Workload, *, num_batches: int, num_rounds: int, authors: bool, torch_compile: bool) -> dict[str, Any]:
    """Runs the benchmark.

    Args:
        work: What is trained.
        num_batches: Batches of a round; every round has the same.
        num_rounds: Rounds of both sides.
        authors: Whether the authors' way is timed too.
        torch_compile: Whether PyTorch tries `torch.compile`.

    Returns:
        What `--output` writes: seconds a step of every round, ratios, settings and the machine.
    """
    import benchmark_torch

    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    batches = work.epoch[:num_batches]
    first_of_width = {batch.input_ids.shape[1]: batch for batch in reversed(batches)}
    load = os.getloadavg()[0]

    ours = OurStep(work)
    for width, batch in sorted(first_of_width.items()):
        _say(f"compiled ours for {width} tokens in {timed(ours, [batch], ours.wait):.0f} s")
    benchmark_torch.use_cores(num_cores)
    theirs = benchmark_torch.TorchStep(work.config, work.params, work.heads, work.masks, work.optim)
    settings, tried = benchmark_torch.fastest(theirs, batches[::2], try_compile=torch_compile)
    for candidate, took in tried:
        _say(f"torch {took / len(batches[::2]) * 1e3:7.0f} ms a step: {candidate}")
    for batch in first_of_width.values():
        theirs(batch)

    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for number in range(1, num_rounds + 1):
        seconds["ours"].append(timed(ours, batches, ours.wait))
        seconds["torch"].append(timed(theirs, batches))
        now = {name: values[-1] for name, values in seconds.items()}
        _say(
            f"round {number}/{num_rounds}: ours {now['ours'] * 1e3:.0f} ms, torch {now['torch'] * 1e3:.0f} ms a step, "
            f"ratio {now['torch'] / now['ours']:.2f}"
        )
    if authors:
        theirs.set(benchmark_torch.AUTHORS)
        theirs(batches[0])
        _say(f"one step of the authors' way, {work.padded.input_ids.shape[1]} tokens wide")
        seconds["authors"] = [timed(theirs, [work.padded])]
    pairs = [torch / our for our, torch in zip(seconds["ours"], seconds["torch"], strict=True)]
    ratios = {
        "torch_min": min(seconds["torch"]) / min(seconds["ours"]),
        "torch_median": statistics.median(seconds["torch"]) / statistics.median(seconds["ours"]),
        "torch_by_round": pairs,
    }
    if authors:
        ratios["authors_median"] = seconds["authors"][0] / statistics.median(seconds["ours"])
    return {
        "seconds_per_step": seconds,
        "ratios": ratios,
        "torch_settings": dataclasses.asdict(settings),
        "batch_size": len(batches[0].label),
        "num_batches": num_batches,
        "widths": _widths(batches),
        "widths_of_the_epoch": _widths(work.epoch),
        "width_of_authors": work.padded.input_ids.shape[1],
        "num_concepts": work.config.num_concepts,
        "density": {path: float(mask.mean()) for path, mask in work.masks.items()},
        "machine": {
            "cpu": _cpu_name(),
            "cores": num_cores,
            "load_at_start": load,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "torch", "transformers")},
        },
    }


def render(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    machine, seconds, ratios = report["machine"], report["seconds_per_step"], report["ratios"]
    rows = [f"{'step':<10}{'min ms':>10}{'median ms':>12}{'examples/s':>12}{'ours is faster by':>20}"]
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio = ""
        if name == "torch":
            ratio = f"{ratios['torch_median']:.2f} (min {ratios['torch_min']:.2f})"
        elif name == "authors":
            ratio = f"{ratios['authors_median']:.1f}"
        rate = report["batch_size"] / median
        rows.append(f"{name:<10}{min(values) * 1e3:>10.0f}{median * 1e3:>12.0f}{rate:>12.2f}{ratio:>20}")
    pairs = ratios["torch_by_round"]
    return "\n".join(
        [
            f"{machine['cores']} cores of {machine['cpu']}, load {machine['load_at_start']:.1f} at the start; "
            f"jax {machine['jax']}, torch {machine['torch']}",
            f"K = {report['num_concepts']}, batch {report['batch_size']}, {report['num_batches']} batches a round, "
            f"tokens: {_mixture(report['widths'])}; the epoch's: {_mixture(report['widths_of_the_epoch'])}",
            f"torch: {', '.join(f'{name} {value}' for name, value in report['torch_settings'].items())}",
            *rows,
            f"torch / ours round by round: {', '.join(f'{pair:.2f}' for pair in pairs)}",
        ]
    )


def main() -> None:
    run = command_line.run_config()
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError("the benchmark needs PyTorch: pip install torch") from None
    report = compare(
        prepare(run),
        num_batches=FLAGS.num_batches,
        num_rounds=FLAGS.num_rounds,
        authors=FLAGS.authors,
        torch_compile=FLAGS.torch_compile,
    )
    print(render(report))
    if FLAGS.output:
        path = Path(FLAGS.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(text, flush=True)


def _widths(batches: Sequence[Batch]) -> dict[str, float]:
    counts = Counter(batch.input_ids.shape[1] for batch in batches)
    return {str(width): counts[width] / len(batches) for width in sorted(counts)}


def _mixture(widths: dict[str, float]) -> str:
    return ", ".join(f"{share:.0%} {width}" for width, share in widths.items())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    # The benchmark is about CPUs, also on a machine that has more.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if not any(command_line.CONFIG.fullmatch(argument) for argument in sys.argv):
        sys.argv.insert(1, f"--config={DEFAULT_CONFIG}")
    command_line.run(main)
