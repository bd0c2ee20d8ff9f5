"""The commands of `sparsecbm`, a module each with its flags and its `main`; `launch/` starts the same ones."""
