"""Lists, undoes, merges and passes on logged edits: `sparsecbm edits` from a checkout.

python launch/edits.py --model=runs/quickstart/model --log=runs/quickstart/edits.log
python launch/edits.py --model=runs/quickstart/model --log=runs/quickstart/edits.log --undo=0a1b2c3d4e5f
python launch/edits.py --model=runs/quickstart/model --log=runs/quickstart/edits.log --save=runs/quickstart/corrected
"""

from __future__ import annotations

from sparsecbm_jax.commands import main

if __name__ == "__main__":
    main.run("edits", "python launch/edits.py")
