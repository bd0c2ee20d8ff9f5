"""Times one correction of a saved model against the authors' method, emulated in PyTorch on the same text.

python launch/benchmarks/intervention.py --model=runs/quickstart/model --output=runs/intervention_times.json

Each side takes the gradient of one concept's loss by its mask, selects the weights to drop and to grow, and runs the
subnetwork again. The PyTorch side sorts the scores of all kept and of all pruned weights, as the authors do; its text
is not padded. 'minimal' is the search for the smallest edit. Times are wall-clock times on all cores, round by round,
after compilation. Takes about a minute.
"""

from __future__ import annotations

import os
import statistics
import time
import typing
from collections.abc import Callable
from typing import Any

from absl import flags

from sparsecbm_jax.cli import command_line
from sparsecbm_jax.runtime.json_files import write_json

if typing.TYPE_CHECKING:
    from sparsecbm_jax.data.batches import Batch
    from sparsecbm_jax.model.sparse_cbm import SparseCBM

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("model", None, "Folder of the saved model, such as runs/quickstart/model; a BERT.")
flags.DEFINE_string("text", "The food was delicious, but our waiter was slow and rather rude.", "Text to correct.")
flags.DEFINE_integer("concept", 0, "Index of the concept to correct.", lower_bound=0)
flags.DEFINE_float("drop_fraction", 0.0001, "Share of the backbone's weights that is dropped, and grown.")
flags.DEFINE_integer("num_rounds", 9, "Rounds, each of all sides in turn.", lower_bound=1)
flags.DEFINE_string("output", None, "JSON file to write.")


def main() -> None:
    """Runs the command; see the docstring of this file."""
    if not FLAGS.model:
        raise ValueError("--model is missing; expected the folder of a saved model, such as runs/quickstart/model")
    try:
        import torch
    except ModuleNotFoundError:
        raise ImportError("the benchmark needs PyTorch: pip install torch") from None

    import jax

    from sparsecbm_jax.model.predictions import text_batches
    from sparsecbm_jax.model.saved_model import load

    model = load(FLAGS.model).for_few_texts()
    batch = next(text_batches(model, [FLAGS.text], batch_size=1))
    sides = {"authors": theirs(model, batch), **ours(model, batch)}
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(FLAGS.num_rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    cores = os.cpu_count() if not hasattr(os, "sched_getaffinity") else len(os.sched_getaffinity(0))
    tokens = int(batch.attention_mask.sum())
    print(
        f"{cores} cores; jax {jax.__version__}, torch {torch.__version__}; {tokens} tokens, {FLAGS.num_rounds} rounds"
    )
    print(f"{'':<12}{'median s':>10}{'authors / it':>14}  by round")
    for name, seconds in times.items():
        ratios = [their / own for their, own in zip(times["authors"], seconds, strict=True)]
        by_round = ", ".join(f"{ratio:.1f}" for ratio in ratios)
        print(f"{name:<12}{statistics.median(seconds):>10.3f}{statistics.median(ratios):>14.1f}  {by_round}")
    if FLAGS.output:
        write_json(FLAGS.output, times)


def ours(model: SparseCBM, batch: Batch) -> dict[str, Callable[[], Any]]:
    """Returns functions for the two saliencies at the given share, and for the search for the smallest edit."""
    import jax

    from sparsecbm_jax.intervention.fixed_size_edit import intervene
    from sparsecbm_jax.intervention.mask_edit import ConceptCorrection
    from sparsecbm_jax.intervention.minimal_edit import minimal_edit

    asked = (model.config, model.arrays, ConceptCorrection(batch, FLAGS.concept, _target(model, batch)))

    def at_share(saliency: str) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(intervene(*asked, FLAGS.drop_fraction, saliency=saliency))

    return {
        "signed": at_share("signed"),
        "magnitude": at_share("magnitude"),
        "minimal": lambda: jax.block_until_ready(minimal_edit(*asked)),
    }


def _target(model: SparseCBM, batch: Batch) -> int:
    """Returns the second most probable class of the concept."""
    import numpy as np

    from sparsecbm_jax.model.forward import make_forward

    output = make_forward(model.config)(model.arrays, batch)
    return int(np.argsort(np.asarray(output.concept_logits)[0, FLAGS.concept])[-2])


def theirs(model: SparseCBM, batch: Batch) -> Callable[[], Any]:
    """Returns one correction in PyTorch: a backward pass to the masks, two whole sorts, a pass under the new masks."""
    import torch

    from sparsecbm_jax.config.run_config import OptimConfig

    from launch.benchmarks import training_step_torch

    assert model.masks is not None
    step = training_step_torch.TorchStep(model.config, model.params, model.heads, model.masks, OptimConfig())
    step.bert.eval()
    weights = {name: step.bert.get_parameter(name).detach() for name in step.masks[FLAGS.concept]}
    mask = step.masks[FLAGS.concept]
    total = sum(weight.numel() for weight in weights.values())
    count = round(FLAGS.drop_fraction * total)
    target = torch.tensor([_target(model, batch)])
    inputs = {
        "input_ids": torch.from_numpy(batch.input_ids).long(),
        "attention_mask": torch.from_numpy(batch.attention_mask),
    }
    seen = inputs["attention_mask"].float()

    def logits(soft: dict[str, torch.Tensor]) -> torch.Tensor:
        masked = {name: weights[name] * soft[name] for name in weights}
        hidden = torch.func.functional_call(step.bert, masked, kwargs=inputs).last_hidden_state
        z = torch.einsum("btd,bt->bd", hidden, seen) / seen.sum(1)[:, None]
        projector = step.heads["projector/kernel"][FLAGS.concept], step.heads["projector/bias"][FLAGS.concept]
        return z @ projector[0] + projector[1]

    def correct() -> torch.Tensor:
        soft = {name: kept.float().requires_grad_() for name, kept in mask.items()}
        torch.nn.functional.cross_entropy(logits(soft), target).backward()
        scores = torch.cat([(soft[name].grad * weights[name]).abs().flatten() for name in weights])
        kept = torch.cat([mask[name].flatten() for name in weights])
        # At least as many as requested: all ties at the threshold are dropped.
        lowest = torch.sort(scores[kept]).values[count - 1]
        highest = torch.sort(scores[~kept], descending=True).values[count - 1]
        new, start = {}, 0
        flat = (kept & ~(kept & (scores <= lowest))) | (~kept & (scores >= highest))
        for name, weight in weights.items():
            new[name] = flat[start : start + weight.numel()].view_as(weight).float()
            start += weight.numel()
        with torch.no_grad():
            return logits(new)

    return correct


if __name__ == "__main__":
    command_line.run(main)
