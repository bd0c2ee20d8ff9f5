"""Serves the live page of a saved model: `sparsecbm serve` from a checkout.

python launch/serve.py --model=runs/quickstart/model
python launch/serve.py --model=runs/quickstart/model --port=8080 --edits=runs/quickstart/edits.log
SPARSECBM_TOKEN=... python launch/serve.py --model=runs/quickstart/model --host=0.0.0.0
"""

from __future__ import annotations

from sparsecbm_jax.commands import main

if __name__ == "__main__":
    main.run("serve", "python launch/serve.py")
