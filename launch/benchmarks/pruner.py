"""Times WoodFisher scores on one core against the sequential rank-1 update in PyTorch, and selection against kthvalue.

python launch/benchmarks/pruner.py --output=runs/pruner.json

Both sides get the same gradients of one kernel of a million weights and return the score of every weight, in turns;
only the ratios of one run are meaningful. The PyTorch side is our implementation of the method of SparseML and the
authors: F⁻¹ starts as I/ζ and takes each gradient by a Woodbury step over all blocks. Selection marks half of ten
million scores.

Takes about five minutes on a CPU core.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from sparsecbm_jax.cli import command_line
from sparsecbm_jax.runtime.json_files import write_json

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
flags.DEFINE_integer("num_rounds", 3, "Rounds, each of ours and then PyTorch's.", lower_bound=1)
flags.DEFINE_integer("inputs", 1024, "Inputs of the kernel.", lower_bound=1)
flags.DEFINE_integer("outputs", 977, "Outputs of the kernel.", lower_bound=1)
flags.DEFINE_list("num_grads", ["20", "128", "256"], "Numbers of gradients m.")
flags.DEFINE_integer("selected_from", 10_000_000, "Number of scores, of which half are selected.", lower_bound=10_000)
flags.DEFINE_string("output", None, "JSON file to write.")

BLOCK_SIZE, DAMPING = 64, 0.1
PATH = "embed/project_in/kernel"


def main() -> None:
    """Runs the command; see the docstring of this file."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    try:
        import torch
    except ModuleNotFoundError:
        raise ImportError("the benchmark needs PyTorch: pip install torch") from None
    torch.set_num_threads(1)
    report = {f"m = {m}": compare(*scoring(int(m)), num_rounds=FLAGS.num_rounds) for m in FLAGS.num_grads} | {
        "selection": compare(*selecting(FLAGS.selected_from), num_rounds=FLAGS.num_rounds)
    }
    print(f"{'':<12}{'ours s':>10}{'torch s':>10}{'ratio':>8}  by round")
    for name, row in report.items():
        by_round = ", ".join(f"{ratio:.1f}" for ratio in row["ratio_by_round"])
        print(f"{name:<12}{min(row['ours']):>10.3f}{min(row['torch']):>10.3f}{row['ratio']:>8.1f}  {by_round}")
    if FLAGS.output:
        write_json(FLAGS.output, report)


def scoring(num_grads: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns our and PyTorch's scoring of the same weights from the same gradients, after a check that both agree."""
    import jax
    import numpy as np
    import torch

    from sparsecbm_jax.config.run_config import PrunerConfig
    from sparsecbm_jax.pruning.woodfisher_scores import woodfisher_scores

    rng = np.random.default_rng(num_grads)
    shape = (FLAGS.inputs, FLAGS.outputs)
    weights = rng.normal(size=shape).astype(np.float32)
    gradients = [rng.normal(size=shape).astype(np.float32) for _ in range(num_grads)]
    config = PrunerConfig(block_size=BLOCK_SIZE, num_grads=num_grads, damping=DAMPING, damping_mode="absolute")
    kernels = {PATH: jax.numpy.asarray(weights)}
    stream = [{PATH: jax.numpy.asarray(gradient)} for gradient in gradients]
    in_blocks = [torch.from_numpy(np.ascontiguousarray(g.T).reshape(-1, BLOCK_SIZE)) for g in gradients]
    weight_blocks = torch.from_numpy(np.ascontiguousarray(weights.T).reshape(-1, BLOCK_SIZE))

    def ours() -> Any:
        return jax.block_until_ready(woodfisher_scores(kernels, stream, config=config))

    def theirs() -> Any:
        return rank_1_scores(weight_blocks, in_blocks, DAMPING)

    got = np.asarray(ours()[PATH]).T.reshape(-1, BLOCK_SIZE)
    np.testing.assert_allclose(got, theirs().numpy(), rtol=1e-3)
    return ours, theirs


def rank_1_scores(weights: Any, gradients: list[Any], damping: float) -> Any:
    """Computes ρ of every weight from F⁻¹ by one Woodbury step a gradient, all blocks at once."""
    import torch

    num_blocks, size = weights.shape
    inverse = (torch.eye(size) / damping).repeat(num_blocks, 1, 1)
    for gradient in gradients:
        along = torch.einsum("nij,nj->ni", inverse, gradient)
        scale = torch.sqrt(len(gradients) + torch.einsum("ni,ni->n", gradient, along)).unsqueeze(1)
        along = along / scale
        inverse.baddbmm_(along.unsqueeze(2), along.unsqueeze(1), alpha=-1)
    return weights**2 / (2 * inverse.diagonal(dim1=1, dim2=2))


def selecting(num_scores: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns our and PyTorch's selection of the lower half, after a check that both agree."""
    import jax
    import numpy as np
    import torch

    from sparsecbm_jax.core.selection import select_smallest

    # Ten stacked layers.
    scores = np.random.default_rng(0).normal(size=(10, num_scores // 10_000, 1000)).astype(np.float32) ** 2
    ours_fn, tree, flat = jax.jit(select_smallest), {"w": jax.numpy.asarray(scores)}, torch.from_numpy(scores).flatten()
    count = scores.size // 2

    def ours() -> Any:
        return jax.block_until_ready(ours_fn(tree, count))

    def theirs() -> Any:
        return flat <= torch.kthvalue(flat, count).values

    assert int(ours()["w"].sum()) == count == int(theirs().sum())
    return ours, theirs


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], *, num_rounds: int) -> dict[str, Any]:
    """Measures the processor seconds of each, round by round."""
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(num_rounds):
        for name, function in (("ours", ours), ("torch", theirs)):
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    ratios = [theirs / our for our, theirs in zip(times["ours"], times["torch"], strict=True)]
    return {**times, "ratio": statistics.median(ratios), "ratio_by_round": ratios}


if __name__ == "__main__":
    # The benchmark is about one CPU core, also on a machine that has more.
    os.environ["JAX_PLATFORMS"] = "cpu"
    command_line.run(main)
