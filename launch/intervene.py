r"""Corrects one concept of one text by changing a few weights of its mask: `sparsecbm correct` from a checkout.

python launch/intervene.py --model=runs/quickstart/model --text="The waiter was rude." --concept=service \
    --target=Negative
python launch/intervene.py --model=runs/quickstart/model --find --log=runs/quickstart/edits.log
python launch/intervene.py --model=runs/quickstart/model --find --editor=minimal --html=correction.html
python launch/intervene.py --model=runs/quickstart/model --find --editor=fixed_size --drop_fraction=0.001
"""

from __future__ import annotations

from sparsecbm_jax.commands import main

if __name__ == "__main__":
    main.run("correct", "python launch/intervene.py")
