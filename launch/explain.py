"""Explains texts with a saved model: `sparsecbm explain` from a checkout.

python launch/explain.py --model=runs/quickstart/model --text="The food was great, but the waiter was rude."
python launch/explain.py --model=runs/quickstart/model --file=reviews.txt --format=json --output=pathways.jsonl
python launch/explain.py --model=runs/quickstart/model --file=reviews.txt --format=html --output=pathways.html
"""

from __future__ import annotations

from sparsecbm_jax.commands import main

if __name__ == "__main__":
    main.run("explain", "python launch/explain.py")
