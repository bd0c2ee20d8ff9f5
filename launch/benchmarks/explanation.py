r"""Times explanations of a saved model against its forward pass, and measures how complete integrated gradients are.

python launch/benchmarks/explanation.py --model=runs/cebab/model --output=runs/explanation.json
python launch/benchmarks/explanation.py --model=runs/cebab/model --parts=completeness --num_texts=64 \
  --baselines=zero,pad

The texts are the first of a split of the model's own data, or of --config's. There are three parts:

  speed         `explain_stream` by gradient norm, to whole pathways, and `predict`, in turns over the same texts in the
                same batches, after compilation: only the ratios of one run are meaningful
  memory        memory of the process while it explains a sequence of texts; freed memory is returned to the system
  completeness  distance of the sum of the words' scores by integrated gradients from u(text) − u(baseline), in percent
                of the latter, over all texts and concepts, by baseline and number of steps

Speed and memory of 1,000 reviews take about five minutes on 2 CPU cores with MiniLM. Linux.
"""

from __future__ import annotations

import os
import statistics
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from sparsecbm_jax.cli import command_line, saved_runs
from sparsecbm_jax.runtime.json_files import write_json

if typing.TYPE_CHECKING:
    from sparsecbm_jax.model.sparse_cbm import SparseCBM

FLAGS = flags.FLAGS
command_line.define_config()
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("model", None, "Folder of the saved model, such as runs/cebab/model.")
flags.DEFINE_string("split", "test", "Split that the texts are of.")
flags.DEFINE_integer("num_texts", 1000, "Texts, the first of the split; fewer where it has fewer.", lower_bound=1)
flags.DEFINE_integer("batch_size", 16, "Texts in one pass.", lower_bound=1)
flags.DEFINE_list("parts", ["speed", "memory"], "Some of speed, memory, completeness, with commas.")
flags.DEFINE_integer("num_rounds", 3, "speed: rounds, each of both in turn.", lower_bound=1)
flags.DEFINE_list("num_steps", ["16", "32", "48"], "completeness: numbers of steps, with commas.")
flags.DEFINE_list("baselines", ["zero"], "completeness: baselines, with commas.")
flags.DEFINE_string("output", None, "JSON file to write.")

# Numbers of texts after which memory is noted.
MARKS = (100, 250, 500, 1000, 1500)
COMPLETE = 0.01


def main() -> None:
    """Runs the command; see the docstring of this file."""
    if not FLAGS.model:
        raise ValueError("--model is missing; expected the folder of a saved model, such as runs/cebab/model")
    command_line.check_names("parts", PARTS)

    import jax

    from sparsecbm_jax.data import load_dataset
    from sparsecbm_jax.model import saved_model

    model = saved_model.load(FLAGS.model)
    given = FLAGS["config"].value is not None
    dataset = load_dataset(
        (command_line.run_config() if given else saved_runs.own_run(model, FLAGS.model, "--config")).data
    )
    if FLAGS.split not in dataset.splits:
        raise ValueError(f"--split={FLAGS.split}: expected one of {', '.join(dataset.splits)}")
    texts = dataset.splits[FLAGS.split].texts[: FLAGS.num_texts]
    cores = os.cpu_count() if not hasattr(os, "sched_getaffinity") else len(os.sched_getaffinity(0))
    print(
        f"{cores} cores, load {os.getloadavg()[0]:.1f} at the start; jax {jax.__version__}; {len(texts)} texts of "
        f"{dataset.name}, {FLAGS.split}; batches of {FLAGS.batch_size}; {model.config.num_concepts} concepts"
    )
    report = {part: PARTS[part](model, texts) for part in FLAGS.parts}
    if FLAGS.output:
        write_json(FLAGS.output, report)


def speed(model: SparseCBM, texts: Sequence[str]) -> dict[str, Any]:
    """Measures the seconds of the forward pass and of the explanations, round by round."""
    from sparsecbm_jax.explanation.pathways import WINDOW_BATCHES
    from sparsecbm_jax.model.predictions import predict

    size = FLAGS.batch_size
    windows = [texts[n : n + WINDOW_BATCHES * size] for n in range(0, len(texts), WINDOW_BATCHES * size)]
    sides = {
        "forward": lambda: [predict(model, window, batch_size=size) for window in windows],
        "explanation": lambda: _explain(model, texts),
    }
    every_width = _every_width(model, texts)
    predict(model, every_width, batch_size=size)
    _explain(model, every_width)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, FLAGS.num_rounds + 1):
        for name, run in sides.items():
            times[name].append(_seconds(run))
        forward, explanation = (times[name][-1] for name in ("forward", "explanation"))
        print(
            f"round {number}/{FLAGS.num_rounds}: forward {forward:.2f} s, explanation {explanation:.2f} s, "
            f"ratio {explanation / forward:.2f}",
            flush=True,
        )
    ratios = [ours / theirs for ours, theirs in zip(times["explanation"], times["forward"], strict=True)]
    print(f"explanation / forward: {statistics.median(ratios):.2f} (median)")
    return {**times, "ratio": statistics.median(ratios), "ratio_by_round": ratios}


def memory(model: SparseCBM, texts: Sequence[str]) -> dict[str, float]:
    """Measures the largest resident memory so far, in MB, after several numbers of texts of a sequence."""
    from sparsecbm_jax.explanation.pathways import explain_stream
    from sparsecbm_jax.runtime import memory

    noted: dict[str, float] = {}
    with memory.giving_back():
        _explain(model, _every_width(model, texts))
        most = noted["0"] = _resident_mb()
        for n, _ in enumerate(
            explain_stream(model, iter(texts), batch_size=FLAGS.batch_size, method="gradient_norm"), 1
        ):
            most = max(most, _resident_mb())
            if n in MARKS or n == len(texts):
                noted[str(n)] = most
    print("memory, the most so far: " + ", ".join(f"{mb:.0f} MB after {n} texts" for n, mb in noted.items()))
    return noted


def completeness(model: SparseCBM, texts: Sequence[str]) -> dict[str, Any]:
    """Measures the distance of Σ word scores from u(text) − u(baseline) by baseline and steps."""
    import numpy as np

    from sparsecbm_jax.explanation.pathways import explain

    model = model.for_few_texts()  # every number of steps is another program
    heads = ("median %", "90 %", "99 %", "most %", "within 1 %", "most, of u")
    print(f"{'baseline':<10}{'steps':>6}" + "".join(f"{head:>12}" for head in heads))
    report: dict[str, Any] = {}
    for baseline, num_steps in ((name, n) for name in FLAGS.baselines for n in command_line.numbers("num_steps", int)):
        pathways = explain(
            model,
            texts,
            method="integrated_gradients",
            baseline=baseline,
            num_steps=num_steps,
            batch_size=FLAGS.batch_size,
        )
        lanes = [lane for pathway in pathways for lane in pathway.concepts]
        difference = np.array([lane.explained_logit for lane in lanes])
        # NaN would be a lane without a baseline, which integrated gradients always have.
        difference -= np.array([lane.baseline_logit for lane in lanes], float)
        apart = np.abs([sum(lane.word_scores) for lane in lanes] - difference)
        share = apart / np.abs(difference)
        percent = [*100 * np.quantile(share, [0.5, 0.9, 0.99, 1.0]), 100 * np.mean(share <= COMPLETE)]
        columns = "".join(f"{value:>12.3f}" for value in percent)
        print(f"{baseline:<10}{num_steps:>6}{columns}{apart.max():>12.5f}", flush=True)
        report[f"{baseline}, {num_steps}"] = {"wanted": difference.tolist(), "apart": apart.tolist()}
    return report


PARTS: dict[str, Callable[[SparseCBM, Sequence[str]], dict[str, Any]]] = {
    "speed": speed,
    "memory": memory,
    "completeness": completeness,
}


def _every_width(model: SparseCBM, texts: Sequence[str]) -> list[str]:
    """Returns a few texts that fill a batch of every width, so that every program is compiled."""
    from sparsecbm_jax.model.predictions import text_batches

    of_width = {batch.input_ids.shape[1]: texts[batch.row_ids[0]] for batch in text_batches(model, texts, batch_size=1)}
    return [text for text in of_width.values() for _ in range(min(FLAGS.batch_size, len(texts)))]


def _explain(model: SparseCBM, texts: Sequence[str]) -> None:
    from sparsecbm_jax.explanation.pathways import explain_stream

    for _ in explain_stream(model, iter(texts), batch_size=FLAGS.batch_size, method="gradient_norm"):
        pass


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    # The benchmark is about CPUs, also on a machine that has more.
    os.environ["JAX_PLATFORMS"] = "cpu"
    command_line.run(main)
