"""Writes the report of a run as one page: `sparsecbm report` from a checkout.

python launch/report.py --workdir=runs/quickstart
python launch/report.py --workdir=runs/cebab --out=report.html --figures=figures
python launch/report.py --workdir=runs/cebab --suite=runs/edits --sweep=runs/sweep
"""

from __future__ import annotations

from sparsecbm_jax.commands import main

if __name__ == "__main__":
    main.run("report", "python launch/report.py")
