"""Checkpoints: trees of arrays, saved and restored across meshes and process counts.

A checkpoint is whole or absent. It is written under another name and renamed; on restore, file sizes, shapes and a
checksum of every leaf are compared with those at saving. Nothing is pickled. This is the only module that imports
orbax.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt

from sparsecbm_jax.core.sharding import in_turn

_SIZES_FILE = "sizes.json"
_MAX_LISTED = 20


class CheckpointError(ValueError):
    """A checkpoint that is damaged, missing, or does not fit the tree into which it is restored."""


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_leaves(tree: Any) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"two leaves of the tree are both named {name!r}; expected distinct '/'-joined paths")
        named[name] = leaf
    return named


def _to_array(name: str, leaf: Any) -> jax.Array:
    array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    if hasattr(leaf, "dtype") and leaf.dtype != array.dtype:
        raise TypeError(
            f"{name} is {leaf.dtype}, which jax would store as {array.dtype}; expected a dtype that jax can store"
        )
    return array


def _describe(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _manifest_of(leaf: jax.Array) -> dict[str, Any]:
    return {**_describe(leaf), **({"impl": str(jax.random.key_impl(leaf))} if _is_key(leaf) else {})}


@jax.jit
def _checksum(leaf: Array) -> UInt[Array, ""]:
    """Computes Σ_i (2 i + 1) x_i mod 2³² over a leaf's bits x: equal under any sharding; every element counts."""
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    # The index is built from one iota a dimension: reshaping a sharded leaf to one dimension would gather it.
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def _checksums(leaves: Mapping[str, Array]) -> dict[str, int]:
    # A program for each shape: one program for a whole tree would be compiled again for every tree that is saved.
    sums = {name: in_turn(_checksum(leaf)) for name, leaf in leaves.items()}
    return {name: int(value) for name, value in sums.items()}


def _sharding_of(leaf: Any) -> jax.sharding.Sharding:
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


class Checkpointer:
    """The checkpoints of one run, by step.

    `save` copies the arrays to the host, so that they may be donated to the next step at once, and writes them in the
    background. Every method waits until that is done; so does the end of the context. If the process is killed before,
    the earlier checkpoints remain. With several processes, all of them must call every method.

    Args:
        directory: Directory of the checkpoints, on a file system that all processes share; made if absent.
        max_to_keep: Number of latest steps that stay on disk, at least 1.

    Raises:
        ValueError: `max_to_keep` is below 1.
    """

    def __init__(self, directory: str | Path, max_to_keep: int = 2) -> None:
        import orbax.checkpoint as ocp
        from etils import epath

        if max_to_keep < 1:
            raise ValueError(f"max_to_keep is {max_to_keep}, expected at least 1")
        self._ocp = ocp
        path = os.fspath(directory)
        self._directory = epath.Path(path if "://" in path else os.path.abspath(path))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._in_writing: int | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> tuple[int, ...]:
        """Returns all saved steps, in rising order."""
        self.wait()
        return tuple(sorted(self._manager.all_steps()))

    def latest_step(self) -> int | None:
        """Returns the last saved step, or None where there is none."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, step: int, tree: Any, meta: Mapping[str, Any] | None = None) -> None:
        """Saves a tree as the checkpoint of a step.

        Saved steps at or after `step` are removed first: they belong to a continuation that was abandoned.

        Args:
            step: Number of the step, at least 0.
            tree: Any tree of arrays, PRNG keys among them. Zero-sized leaves are allowed.
            meta: JSON values by key, which `read_meta` returns.

        Raises:
            TypeError: `meta` is not JSON, or a leaf has a dtype that jax cannot store; the leaf is named.
        """
        meta = json.loads(json.dumps(dict(meta or {})))
        leaves = {name: _to_array(name, leaf) for name, leaf in _named_leaves(tree).items()}
        manifest = {name: _manifest_of(leaf) for name, leaf in leaves.items()}
        data = {
            name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items() if leaf.size
        }
        for name, value in _checksums(data).items():
            manifest[name]["checksum"] = value
        for later in self.steps():
            if later >= step:
                self._manager.delete(later)
        items = {"meta": self._ocp.args.JsonSave({"meta": meta, "leaves": manifest})}
        if data:
            items["state"] = self._ocp.args.StandardSave(data)
        self._manager.save(step, args=self._ocp.args.Composite(**items), force=True)
        self._in_writing = step

    def restore(self, step: int, abstract_tree: Any) -> Any:
        """Restores the tree of a step, bit for bit, onto the requested shardings.

        Args:
            step: A saved step.
            abstract_tree: A tree of the same structure, of `jax.ShapeDtypeStruct` with shardings or of arrays. A leaf
                without a sharding goes to the first device. The mesh need not be the one that saved.

        Returns:
            The tree, of jax arrays.

        Raises:
            CheckpointError: There is no such step; the saved tree has other paths, shapes or dtypes, each named with
                its saved and its expected value; or the checkpoint is damaged, and the latest whole earlier step is
                named.
        """
        manifest = self._read(step)["leaves"]
        self._check_tree(step, manifest, _named_leaves(abstract_tree))
        try:
            return self._restore(step, manifest, abstract_tree)
        except _Damage as damage:
            whole = next(
                (
                    earlier
                    for earlier in reversed(self.steps())
                    if earlier < step and self._is_whole(earlier, abstract_tree)
                ),
                None,
            )
            advice = "no earlier step is whole" if whole is None else f"step {whole} is whole"
            raise CheckpointError(
                f"checkpoint {self._directory / str(step)} is damaged: {damage}; {advice}"
            ) from damage

    def read_meta(self, step: int) -> dict[str, Any]:
        """Reads the `meta` that was saved with a step.

        Raises:
            CheckpointError: There is no such step, or it cannot be read.
        """
        return self._read(step)["meta"]

    def describe(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Reads shape and dtype of every array that was saved with a step, by its path.

        `restore` accepts the result as a tree, and so checks that the checkpoint is whole.

        Raises:
            CheckpointError: There is no such step, or it cannot be read.
            TypeError: One of the arrays is a PRNG key.
        """
        leaves = self._read(step)["leaves"]
        return {name: jax.ShapeDtypeStruct(leaf["shape"], jnp.dtype(leaf["dtype"])) for name, leaf in leaves.items()}

    def clear(self) -> None:
        """Deletes all checkpoints."""
        for step in self.steps():
            self._manager.delete(step)

    def wait(self) -> None:
        """Waits until everything saved so far is on disk.

        Raises:
            OSError: It could not be written. The file system may raise other errors, too.
        """
        self._manager.wait_until_finished()
        if self._in_writing is not None and jax.process_index() == 0:
            self._write_sizes(self._in_writing)
        self._in_writing = None

    def close(self) -> None:
        """Waits until everything is on disk, and releases the checkpointer's resources."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _read(self, step: int) -> dict[str, Any]:
        if step not in self.steps():
            raise CheckpointError(f"{self._directory} has no checkpoint of step {step}, only of {list(self.steps())}")
        path = self._directory / str(step) / "meta" / "metadata"
        try:
            content = json.loads(path.read_text())
            return {"meta": content["meta"], "leaves": content["leaves"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            others = [other for other in self.steps() if other < step]
            raise CheckpointError(
                f"checkpoint {self._directory / str(step)} is damaged: {path} cannot be read ({error}); "
                f"earlier steps: {others}"
            ) from error

    def _check_tree(self, step: int, manifest: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
        def words(description: Mapping[str, Any] | None) -> str:
            return f"{description['shape']} {description['dtype']}" if description else "nothing"

        problems = []
        for name in sorted(set(manifest) | set(requested)):
            saved = manifest.get(name)
            expected = _describe(requested[name]) if name in requested else None
            if saved is None or expected is None or any(saved[key] != expected[key] for key in expected):
                problems.append(f"{name}: saved {words(saved)}, expected {words(expected)}")
        if problems:
            more = [f"and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
            raise CheckpointError(
                f"checkpoint {self._directory / str(step)} does not fit:\n  "
                + "\n  ".join(problems[:_MAX_LISTED] + more)
            )

    def _restore(self, step: int, manifest: Mapping[str, Any], abstract_tree: Any) -> Any:
        self._check_sizes(step)
        requested = _named_leaves(abstract_tree)
        abstract = {}
        for name, leaf in requested.items():
            if math.prod(leaf.shape):
                data = (
                    jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
                    if _is_key(leaf)
                    else leaf
                )
                abstract[name] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=_sharding_of(leaf))
        restored: dict[str, jax.Array] = {}
        if abstract:
            try:
                arguments = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(abstract))
                restored = self._manager.restore(step, args=arguments)["state"]
            except Exception as error:  # orbax and tensorstore raise errors of many types, bare Exception among them
                raise _Damage(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
        for name, value in _checksums(restored).items():
            if value != manifest[name]["checksum"]:
                raise _Damage(f"the bits of {name} are not those that were saved")
        leaves = []
        for name, leaf in requested.items():
            if name not in restored:
                leaves.append(jax.device_put(np.zeros(leaf.shape, leaf.dtype), _sharding_of(leaf)))
            elif _is_key(leaf):
                leaves.append(jax.random.wrap_key_data(restored[name], impl=manifest[name]["impl"]))
            else:
                leaves.append(restored[name])
        return jax.tree.unflatten(jax.tree.structure(abstract_tree), leaves)

    def _is_whole(self, step: int, abstract_tree: Any) -> bool:
        try:
            manifest = self._read(step)["leaves"]
            self._check_tree(step, manifest, _named_leaves(abstract_tree))
            self._restore(step, manifest, abstract_tree)
        except (CheckpointError, _Damage):
            return False
        return True

    def _files(self, step: int) -> dict[str, int]:
        # Level by level: epath refuses a recursive glob.
        root = self._directory / str(step) / "state"
        sizes: dict[str, int] = {}
        pending = [root] if root.exists() else []
        while pending:
            for path in pending.pop().iterdir():
                if path.is_dir():
                    pending.append(path)
                else:
                    sizes[str(path.relative_to(root))] = path.stat().length
        return sizes

    def _write_sizes(self, step: int) -> None:
        path = self._directory / str(step) / _SIZES_FILE
        # A process may be killed at any moment: there are no sizes, or all of them.
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(self._files(step), indent=0))
        partial.replace(path)

    def _check_sizes(self, step: int) -> None:
        # orbax finds a truncated file, too, but reports it in a page of asyncio tracebacks.
        path = self._directory / str(step) / _SIZES_FILE
        if not path.exists():
            return
        try:
            sizes = json.loads(path.read_text())
        except ValueError as error:
            raise _Damage(f"{path} is not JSON ({error})") from error
        found = self._files(step)
        for name, size in sizes.items():
            if found.get(name) != size:
                held = f"{found[name]} bytes" if name in found else "missing"
                raise _Damage(f"the file state/{name} is {held}, expected {size} bytes")


class _Damage(Exception):
    pass
