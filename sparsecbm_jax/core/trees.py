"""Parameters as nested dicts, and their leaves by path."""

from collections.abc import Mapping, Sequence
from typing import Any

Params = Mapping[str, Any]


def leaf_at(tree: Params, path: str) -> Any:
    """The leaf of a nested dict at a '/'-joined path.

    Raises:
        KeyError: naming the path, if it is not there.
    """
    node: Any = tree
    for part in path.split("/"):
        if not isinstance(node, Mapping) or part not in node:
            raise KeyError(f"the parameters have no leaf {path!r} (nothing at {part!r})")
        node = node[part]
    return node


def with_leaf(tree: Params, path: str, leaf: Any) -> dict[str, Any]:
    """A copy of a nested dict in which the leaf at `path` is replaced."""
    head, _, rest = path.partition("/")
    return {**tree, head: with_leaf(tree[head], rest, leaf) if rest else leaf}


def path_string(path: Sequence[Any]) -> str:
    """'/'-joined name of a leaf from a JAX key path (dicts, sequences and NamedTuples)."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)
