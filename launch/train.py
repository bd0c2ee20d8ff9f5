"""Trains, prunes, evaluates and saves a concept bottleneck model: `sparsecbm train` from a checkout.

python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart
python launch/train.py --config=configs/cebab.py:bert --config.optim.learning_rate=1e-4 --workdir=runs/x --seeds=0,1,2
python launch/train.py --data=DIR --text=review --label=stars --concepts=food,service --workdir=runs/mine
"""

from __future__ import annotations

from sparsecbm_jax.commands import main

if __name__ == "__main__":
    main.run("train", "python launch/train.py")
