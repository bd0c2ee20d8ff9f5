"""Parameters as nested dicts, and their leaves by path."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

Params = Mapping[str, Any]


def leaf_at(tree: Params, path: str) -> Any:
    """Returns the leaf of a nested dict at a '/'-joined path.

    Raises:
        KeyError: The dict has no such leaf; the path is named.
    """
    node: Any = tree
    for part in path.split("/"):
        if not isinstance(node, Mapping) or part not in node:
            raise KeyError(f"the parameters have no leaf {path!r} (nothing at {part!r})")
        node = node[part]
    return node


def with_leaf(tree: Params, path: str, leaf: Any) -> dict[str, Any]:
    """Returns a copy of a nested dict in which the leaf at a '/'-joined path is replaced."""
    head, _, rest = path.partition("/")
    return {**tree, head: with_leaf(tree[head], rest, leaf) if rest else leaf}


def path_string(path: Sequence[Any]) -> str:
    """Joins a JAX key path (dicts, sequences and NamedTuples) by '/' to the name of a leaf."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def add_power(
    total: dict[str, Float[Array, "..."]], gradient: Mapping[str, Float[Array, "..."]], power: int
) -> dict[str, Float[Array, "..."]]:
    """Adds a gradient, or with power 2 its squares (the diagonal of a Fisher), to a running total, which is donated."""
    return {path: leaf + gradient[path].astype(leaf.dtype) ** power for path, leaf in total.items()}
