"""Prunes a saved model again, without training it: other sparsities, criteria and patterns, in minutes.

python launch/prune.py --model=runs/cebab/model --config=configs/cebab_minilm.py --config.data.path=DIR \
    --config.sparsity.final=0.9 --config.pruner.criterion=magnitude --save=runs/pruned

Of the config, `data`, `pruner`, `sparsity` (all but the schedule), `predictor.accepted_risk`, `seed` and batch sizes
are read. A dense joint model becomes a SparseCBM; a SparseCBM is pruned further, since what was pruned stays pruned
unless --config.sparsity.regrow. With --scores=DIR the scores are kept, and the same command with another sparsity cuts
its masks from them without another gradient. Prints the test scores before and after.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

from absl import flags

from sparsecbm_jax.cli import command_line, saved_runs

FLAGS = flags.FLAGS
command_line.define_config()
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("model", None, "Folder of the saved model, such as runs/cebab/model.")
flags.DEFINE_string("save", None, "Folder to save the pruned model to.")
flags.DEFINE_bool("optimal_update", False, "Move the surviving weights to their optimum (Eq. 10); one concept only.")
flags.DEFINE_string("scores", None, "Folder to keep the scores in, and to take them from where they are there already.")


def main() -> None:
    """Prunes the model of --model and saves it to --save."""
    run = command_line.run_config()
    if not FLAGS.model:
        raise ValueError("--model is missing; expected the folder of a saved model, such as runs/cebab/model")

    from sparsecbm_jax.core import masks
    from sparsecbm_jax.data.batches import fisher_batches
    from sparsecbm_jax.evaluation.tables import render_table
    from sparsecbm_jax.model import saved_model
    from sparsecbm_jax.model.sparse_cbm import ModelArrays, whole_masks
    from sparsecbm_jax.pruning import pruner
    from sparsecbm_jax.pruning.score_store import StoredScores
    from sparsecbm_jax.runtime import checkpoints
    from sparsecbm_jax.runtime.memory import peak_memory
    from sparsecbm_jax.runtime.progress import progress

    model, dataset, splits = found = saved_runs.read(FLAGS.model, run)
    print(f"test, as it was:\n{render_table(found.scores(run, 'test', model.masks))}", flush=True)
    start = whole_masks(model) if model.masks is None else model.masks
    if FLAGS.optimal_update and model.config.num_concepts != 1:
        raise ValueError(
            f"--optimal_update moves weights that the {model.config.num_concepts} subnetworks of {FLAGS.model} share; "
            "expected a model of one concept"
        )
    print(pruner.describe_plan(model.params, start, run.pruner), flush=True)
    pruner.try_gradients(model, splits["train"], run)
    before = peak_memory()
    about = {"model": saved_runs.fingerprint(FLAGS.model), "data": dataclasses.asdict(run.data), "seed": run.seed}
    # Memory changes no bit of a score.
    about["pruner"] = dataclasses.asdict(dataclasses.replace(run.pruner, fisher_memory=None))
    about["regrow"] = run.sparsity.regrow
    if run.sparsity.reestimations > 1:
        # The scores of a later cut depend on what was cut before.
        about["sparsity"] = dataclasses.asdict(run.sparsity)
    with contextlib.ExitStack() as stack:
        store = None
        if FLAGS.scores:
            most = model.config.num_concepts * run.sparsity.reestimations
            kept = stack.enter_context(checkpoints.Checkpointer(FLAGS.scores, most))
            store = StoredScores(kept, model.config.num_concepts, about)
        bar = functools.partial(progress, description="pruning", unit="gradient")
        pruned = pruner.prune_model(model, splits["train"], run, make_bar=bar, store=store)
    if FLAGS.optimal_update:
        batches = fisher_batches(splits["train"], run.pruner, seed=run.seed)
        arrays = ModelArrays(model.params, start, model.heads)
        params = pruner.optimal_update(model.config, arrays, pruned, batches, pruner=run.pruner)
        model = dataclasses.replace(model, params=params)
        found = found._replace(model=model)
    grown = (peak_memory() - before) / 2**20
    peak = peak_memory() / 2**20
    print(f"peak memory {peak:.0f} MiB, {grown:.0f} MiB above what the model and its gradients had taken")
    metrics = {"test": found.scores(run, "test", pruned)}
    print(f"test, pruned:\n{render_table(metrics['test'])}")
    for name, density in zip(dataset.schema.concepts, masks.total_density(pruned), strict=True):
        print(f"{name}: {100 * (1 - density):.2f} % of {masks.num_weights(pruned)} weights pruned")
    if FLAGS.save:
        pruning_config = {section: dataclasses.asdict(getattr(run, section)) for section in ("pruner", "sparsity")}
        metadata = {**model.metadata, **found.measured(run, pruned)}
        metadata["pruned"] = {"from": FLAGS.model, "seed": run.seed, **pruning_config}
        as_it_was = saved_model.load(FLAGS.model)
        result = dataclasses.replace(as_it_was, params=model.params, masks=pruned, strategy="sparse", metadata=metadata)
        print(f"saved: {saved_model.save(result, FLAGS.save, metrics=metrics)}")


if __name__ == "__main__":
    command_line.run(main, keeps_memory=False)
