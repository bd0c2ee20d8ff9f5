"""Evaluates a saved model: its scores on a split of its own data, or of a config's.

sparsecbm evaluate --model=runs/cebab/model
sparsecbm evaluate --model=runs/cebab/model --split=validation --json
sparsecbm evaluate --model=runs/cebab/model --config=configs/cebab_minilm.py --config.data.path=DIR

What corrections repair and cost: `launch/evaluate_interventions.py` of a checkout.
"""

from __future__ import annotations

import json

from absl import flags

from sparsecbm_jax.cli import command_line, saved_runs

FLAGS = flags.FLAGS
command_line.define_config()
command_line.define_model()
command_line.define_former_flags(
    suite="scores need no flag now, and corrections are evaluated by launch/evaluate_interventions.py"
)
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("split", "test", "Split to evaluate on.")
flags.DEFINE_bool("json", False, "Print JSON.")


def main() -> None:
    """Runs the command."""
    from sparsecbm_jax.evaluation.tables import render_table

    run, found = saved_runs.read_with_data()
    scores = found.scores(run, FLAGS.split, found.model.masks)
    print(json.dumps(scores, indent=2) if FLAGS.json else render_table(scores))
