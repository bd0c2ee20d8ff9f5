"""Runs the command `sparsecbm` as `python -m sparsecbm_jax`."""

from sparsecbm_jax.commands.main import main

if __name__ == "__main__":
    main()
