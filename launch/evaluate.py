"""Evaluates a saved model: `sparsecbm evaluate` from a checkout.

python launch/evaluate.py --model=runs/cebab/model
python launch/evaluate.py --model=runs/cebab/model --split=validation --json
python launch/evaluate.py --model=runs/cebab/model --config=configs/cebab_minilm.py --config.data.path=DIR

What corrections repair and cost: `launch/evaluate_interventions.py`.
"""

from __future__ import annotations

from sparsecbm_jax.commands import main

if __name__ == "__main__":
    main.run("evaluate", "python launch/evaluate.py")
