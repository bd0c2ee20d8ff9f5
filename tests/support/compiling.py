"""How programs are compiled in tests that `conftest` has compiled well."""

import functools

import jax

# For what no tight bound on rounding hangs on; several times quicker to compile.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
