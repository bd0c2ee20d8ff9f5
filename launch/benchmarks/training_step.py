"""Times the K-mask training step on CPU against the same step in PyTorch and against the authors' method.

python launch/benchmarks/training_step.py --output=runs/benchmark.json
python launch/benchmarks/training_step.py --config=configs/cebab.py --config.data.path=DIR --output=runs/benchmark.json

Without --config it reads the embedded reviews; DIR holds CEBaB as published. The masks are random, at the run's final
sparsity (1 − 1/K where none is set). Ours and PyTorch's compute the whole of the same step (embeddings, dropout, K
masked passes, heads, joint loss, backward, norm clipping, Adam with two rates, constant here) on the same consecutive
batches, in turns, so that the machine's load affects both: only the ratios of one run are meaningful. PyTorch first
tries its settings and takes the fastest. It trains the whole token table, as its optimisers do. Ours trains the rows of
tokens that occur, as `training.train` does, which leaves the other rows as Adam would (--whole_vocabulary: ours trains
all rows too). The authors' method is a single step, padded to 512 tokens; with batch 8 it needs 12 GB.

Takes about ten minutes on 2 CPU cores, half of them to compile; JAX_COMPILATION_CACHE_DIR saves that the next time.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from sparsecbm_jax.cli import command_line
from sparsecbm_jax.runtime.json_files import write_json

if TYPE_CHECKING:
    import jax

    from sparsecbm_jax.config.run_config import OptimConfig, RunConfig
    from sparsecbm_jax.core.masks import Masks
    from sparsecbm_jax.core.trees import Params
    from sparsecbm_jax.data import Batch
    from sparsecbm_jax.model.config import CBMConfig

FLAGS = flags.FLAGS
command_line.define_config()
flags.adopt_module_key_flags(command_line)
flags.DEFINE_integer("num_batches", 12, "Consecutive batches of a round.", lower_bound=1)
flags.DEFINE_integer("num_rounds", 7, "Rounds, each of ours and then PyTorch's.", lower_bound=1)
flags.DEFINE_bool("whole_vocabulary", False, "Ours also trains the rows of tokens that no text has.")
flags.DEFINE_bool("authors", True, "Also time one step of the authors' method.")
flags.DEFINE_bool("torch_compile", False, "Also try torch.compile, which needs a C++ compiler and takes long.")
flags.DEFINE_string("output", None, "JSON file to write.")

DEFAULT_CONFIG = "configs/common.py"
AUTHORS_LENGTH = 512
# Seconds without work between turns, in which the threads of one side go to sleep before the other starts.
_PAUSE = 0.3


class Workload(NamedTuple):
    """The model and data that both sides train."""

    config: CBMConfig
    params: Params
    heads: Any
    masks: Masks
    optim: OptimConfig
    epoch: list[Batch]
    padded: Batch


class OurStep:
    """`make_train_step` as the training loop calls it: the batch is placed, and no call waits for the result."""

    def __init__(self, work: Workload, *, dropout: bool = True) -> None:
        import jax

        from sparsecbm_jax.core import masks as masks_lib
        from sparsecbm_jax.core import sharding
        from sparsecbm_jax.training import train_step

        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        tx = train_step.make_optimizer(work.optim, num_steps=1)
        self.state = train_step.init_state(work.params, work.heads, tx, self.mesh)
        packed = masks_lib.pack(work.masks)
        places = sharding.shardings(self.mesh, sharding.packed_specs(packed))
        self.state = self.state._replace(packed=jax.tree.map(jax.device_put, packed, places))
        self.step_fn = train_step.make_train_step(work.config, tx, self.mesh, dropout=dropout)
        self.rng = jax.random.key(0)

    def __call__(self, batch: Batch) -> jax.Array:
        """Runs the step; returns the loss."""
        from sparsecbm_jax.core import sharding

        self.state, metrics = self.step_fn(self.state, sharding.put_batch(batch, self.mesh), self.rng)
        return metrics["loss"]

    def wait(self) -> None:
        """Waits until the last step is done."""
        import jax

        jax.block_until_ready(self.state)


def prepare(run: RunConfig, *, whole_vocabulary: bool = False) -> tuple[Workload, Workload]:
    """Makes our and PyTorch's weights, heads, random masks and batches of the first epoch; only token ids differ."""
    import jax

    from sparsecbm_jax import backbones
    from sparsecbm_jax.core.trees import leaf_at
    from sparsecbm_jax.data import train_batches
    from sparsecbm_jax.model.heads import init_heads
    from sparsecbm_jax.training import setup, vocabulary

    if run.strategy != "sparse":
        raise ValueError(f"strategy is {run.strategy!r}; the benchmark times 'sparse'")
    prepared = setup.prepare(run)
    # The setting of `training.prepare` for a run that is long enough to pay for the compilation.
    config, split = dataclasses.replace(prepared.config, unroll_layers=True), prepared.splits["train"]
    sparsity = 1 - 1 / config.num_concepts if run.sparsity.final is None else run.sparsity.final
    paths = backbones.maskable_paths(config.backbone)
    masks = {
        path: jax.random.bernoulli(key, 1 - sparsity, (config.num_concepts, *leaf_at(prepared.params, path).shape))
        for path, key in zip(paths, jax.random.split(jax.random.key(run.seed), len(paths)), strict=True)
    }
    optim = dataclasses.replace(run.optim, warmup_fraction=0.0, decay="constant", weight_decay=0.0)
    order = functools.partial(train_batches, batch_size=run.training.batch_size, seed=run.seed, epoch=0)
    theirs = Workload(
        config,
        prepared.params,
        init_heads(jax.random.key(run.seed), config),
        masks,
        optim,
        list(order(split)),
        next(order(split, buckets=(min(AUTHORS_LENGTH, split.max_length),))),
    )
    if whole_vocabulary:
        return theirs, theirs
    small = vocabulary.restrict(config, prepared.params, prepared.splits)
    ours = theirs._replace(config=small.config, params=small.params, epoch=list(order(small.splits["train"])))
    return ours, theirs


class Seconds(NamedTuple):
    """Mean time of a step: wall-clock time, and processor time over all threads."""

    wall: float
    cpu: float


def timed(step: Callable[[Batch], Any], batches: Sequence[Batch], wait: Callable[[], None] = lambda: None) -> Seconds:
    """Times one pass over the batches.

    Args:
        step: The step.
        batches: The batches.
        wait: Waits until the last step is done.
    """
    time.sleep(_PAUSE)
    start, cpu_start = time.perf_counter(), time.process_time()
    for batch in batches:
        step(batch)
    wait()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return Seconds(wall / len(batches), cpu / len(batches))


def compare(
    our_work: Workload, work: Workload, *, num_batches: int, num_rounds: int, authors: bool, torch_compile: bool
) -> dict[str, Any]:
    """Runs the benchmark.

    Args:
        our_work: Model and data that we train.
        work: Model and data that PyTorch trains.
        num_batches: Batches of a round; every round has the same.
        num_rounds: Rounds of both sides.
        authors: True to time the authors' method, too.
        torch_compile: True to let PyTorch try `torch.compile`.

    Returns:
        The contents of `--output`: seconds a step, ratios to ours, settings and the machine.
    """
    from launch.benchmarks import training_step_torch

    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    our_batches, batches = our_work.epoch[:num_batches], work.epoch[:num_batches]
    first_of_width = {batch.input_ids.shape[1]: batch for batch in reversed(our_batches)}
    load = os.getloadavg()[0]
    if load > 0.5:
        _say(f"{load:.1f} other processes use the {num_cores} cores: the times will scatter")

    ours = OurStep(our_work)
    for width, batch in sorted(first_of_width.items()):
        _say(f"compiled ours for {width} tokens in {timed(ours, [batch], ours.wait).wall:.0f} s")
    training_step_torch.use_cores(num_cores)
    theirs = training_step_torch.TorchStep(work.config, work.params, work.heads, work.masks, work.optim)
    settings = training_step_torch.fastest(theirs, batches[::2], try_compile=torch_compile)
    # A round that does not count: after it, each side's memory is that of its steps, not of the search for settings.
    timed(ours, our_batches, ours.wait)
    timed(theirs, batches)

    times: dict[str, list[Seconds]] = {"ours": [], "torch": []}
    for number in range(1, num_rounds + 1):
        times["ours"].append(timed(ours, our_batches, ours.wait))
        times["torch"].append(timed(theirs, batches))
        now, then = times["ours"][-1].wall, times["torch"][-1].wall
        _say(f"round {number}/{num_rounds}: ours {now:.3f} s, torch {then:.3f} s a step, ratio {then / now:.2f}")
    if authors:
        _say(f"one step of the authors' method, {work.padded.input_ids.shape[1]} tokens wide")
        theirs.set(training_step_torch.AUTHORS)
        theirs(batches[0])
        times["authors"] = [timed(theirs, [work.padded])]
    return {
        "steps": {name: _summary(values, times["ours"]) for name, values in times.items()},
        "torch_settings": dataclasses.asdict(settings),
        "batch_size": len(batches[0].label),
        "num_batches": len(batches),
        "widths": _widths(batches),
        "widths_of_the_epoch": _widths(work.epoch),
        "num_concepts": work.config.num_concepts,
        "token_rows": {"ours": our_work.config.backbone.vocab_size, "torch": work.config.backbone.vocab_size},
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
    """Renders the report as text for a terminal."""
    machine, settings = report["machine"], report["torch_settings"]
    columns = ("step", "min ms", "median ms", "CPU ms", "examples/s", "/ ours: median", "min", "CPU")
    rows = [f"{columns[0]:<8}" + "".join(f"{column:>15}" for column in columns[1:])]
    for name, step in report["steps"].items():
        times = [1e3 * step[key] for key in ("min_wall", "median_wall", "median_cpu")]
        ratios = [step[key] for key in ("median_ratio", "min_ratio", "cpu_ratio")]
        cells = [f"{ms:.0f}" for ms in times] + [f"{report['batch_size'] / step['median_wall']:.2f}"]
        rows.append(f"{name:<8}" + "".join(f"{cell:>15}" for cell in (*cells, *(f"{ratio:.2f}" for ratio in ratios))))
    by_round = ", ".join(f"{ratio:.2f}" for ratio in report["steps"]["torch"]["ratio_by_round"])
    return "\n".join(
        [
            f"{machine['cores']} cores of {machine['cpu']}, load {machine['load_at_start']:.1f} at the start; "
            f"jax {machine['jax']}, torch {machine['torch']}",
            f"K = {report['num_concepts']}, batch {report['batch_size']}, {report['num_batches']} batches a round; "
            f"tokens: {_mixture(report['widths'])}; the epoch's: {_mixture(report['widths_of_the_epoch'])}",
            f"token rows trained: ours {report['token_rows']['ours']}, torch {report['token_rows']['torch']}",
            f"torch: {', '.join(f'{name} {value}' for name, value in settings.items())}",
            *rows,
            f"torch / ours, round by round: {by_round}",
        ]
    )


def main() -> None:
    """Runs the command; see the docstring of this file."""
    run = command_line.run_config()
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError("the benchmark needs PyTorch: pip install torch") from None
    report = compare(
        *prepare(run, whole_vocabulary=FLAGS.whole_vocabulary),
        num_batches=FLAGS.num_batches,
        num_rounds=FLAGS.num_rounds,
        authors=FLAGS.authors,
        torch_compile=FLAGS.torch_compile,
    )
    print(render(report))
    if FLAGS.output:
        write_json(FLAGS.output, report)


def _summary(times: Sequence[Seconds], ours: Sequence[Seconds]) -> dict[str, Any]:
    """Summarises the times of one method, also as ratios to ours in the same run."""
    wall, our_wall = [time.wall for time in times], [time.wall for time in ours]
    cpu, our_cpu = (statistics.median(time.cpu for time in some) for some in (times, ours))
    return {
        "wall": wall,
        "min_wall": min(wall),
        "median_wall": statistics.median(wall),
        "median_cpu": cpu,
        "min_ratio": min(wall) / min(our_wall),
        "median_ratio": statistics.median(wall) / statistics.median(our_wall),
        "cpu_ratio": cpu / our_cpu,
        "ratio_by_round": [one / our for one, our in zip(wall, our_wall, strict=False)],
    }


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
