"""Edits of masks as data: applied and undone to the bit, small on disk, and checked against the masks they change.

A `MaskEdit` is the result of a program: booleans as large as the masks. A `StoredEdit` is the same edit for a file: the
changed positions alone, with the request and the predictions, in a few kilobytes.
"""

import base64
import binascii
import dataclasses
import functools
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sparsecbm_jax.config.names import did_you_mean
from sparsecbm_jax.core.masks import Masks
from sparsecbm_jax.intervention.mask_edit import MaskEdit
from sparsecbm_jax.runtime.json_files import read_json, write_json

FORMAT = "sparsecbm_jax edit 1"
_KEPT, _PRUNED = True, False
_LARGEST_KERNEL = 2**40  # weights, beyond any kernel of a layer


class Positions(NamedTuple):
    """Changed positions of one kernel, as rising row-major indices into its shape (int64)."""

    shape: tuple[int, ...]
    dropped: Int[np.ndarray, " d"]
    grown: Int[np.ndarray, " g"]


@dataclasses.dataclass(frozen=True, eq=False)
class StoredEdit:
    """An edit for a file: the request, the changed positions, and the predictions.

    Attributes:
        concept, target, label: Names; label is None where it did not enter the loss.
        text_sha256: SHA-256 of the corrected text; the text itself is not stored.
        saliency, num_steps: Method by which the weights were chosen.
        positions: {path: changed positions}, without kernels that have none.
        before, after: Predictions for the text before and after the edit, as JSON.
    """

    concept: str
    target: str
    label: str | None
    text_sha256: str
    saliency: str
    num_steps: int
    positions: Mapping[str, Positions] = dataclasses.field(repr=False)
    before: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    after: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the edit's JSON: equal for equal edits, on any machine."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredEdit) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def num_changed(self) -> tuple[int, int]:
        """Numbers of weights that the edit dropped and grew."""
        found = self.positions.values()
        return sum(len(one.dropped) for one in found), sum(len(one.grown) for one in found)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, with positions as differences, deflated, in base 64."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        positions = {
            path: {"shape": list(one.shape), "dropped": _encode(one.dropped), "grown": _encode(one.grown)}
            for path, one in sorted(self.positions.items())
        }
        return {"format": FORMAT, **fields, "positions": positions}

    @classmethod
    def from_dict(cls, data: Any, source: str = "the edit") -> "StoredEdit":
        """Makes an edit from plain data: the inverse of `to_dict`.

        Args:
            data: The plain data.
            source: Place of the data, such as a file and its line, for errors.

        Raises:
            ValueError: A field is missing, or has another type or format, or positions lie outside their kernel.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"{source}: format is {found!r}; expected {FORMAT!r}")
        kinds: dict[str, Any] = dict.fromkeys(("concept", "target", "text_sha256", "saliency"), str)
        kinds |= {"label": (str, type(None)), "num_steps": int, "positions": dict, "before": dict, "after": dict}
        for name, kind in kinds.items():
            if name not in data or not isinstance(data[name], kind):
                found = f"is a {type(data[name]).__name__}" if name in data else "is missing"
                expected = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
                raise ValueError(f"{source}: {name!r} {found}; expected {expected}")
        for name in ("before", "after"):
            if not isinstance(data[name].get("concepts", {}), dict):
                raise ValueError(f"{source}: {name!r} has no classes by concept; expected an object of them")
        positions = {path: _positions(one, f"{source}: {path}") for path, one in data["positions"].items()}
        return cls(**{**{name: data[name] for name in kinds}, "positions": positions})

    def save(self, path: str | Path) -> Path:
        """Writes the edit to a file of its own, whole or not at all."""
        write_json(path, self.to_dict(), indent=1)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "StoredEdit":
        """Reads an edit from a file that `save` wrote.

        Raises:
            ValueError: The file holds no edit; it is named.
        """
        return cls.from_dict(read_json(Path(path), "a saved edit"), str(path))


def text_hash(text: str) -> str:
    """Computes SHA-256 of a text's UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def positions_of(edit: MaskEdit) -> dict[str, Positions]:
    """Returns the changed positions of every kernel that has any."""
    found: dict[str, Positions] = {}
    for path in edit.dropped:
        dropped, grown = (np.flatnonzero(np.asarray(side[path])) for side in (edit.dropped, edit.grown))
        if len(dropped) or len(grown):
            found[path] = Positions(edit.dropped[path].shape, dropped, grown)
    return found


def apply_stored(masks: Masks, edit: StoredEdit, concepts: Sequence[str]) -> Masks:
    """Applies a stored edit, to the bit; the masks' sharding stays as it is.

    Args:
        masks: Masks of booleans, sharded or not.
        edit: The edit.
        concepts: The model's concepts, in order.

    Raises:
        ValueError: The model has no such concept or kernel, or its weights are in another state; the edit is named.
    """
    return _flip_stored(masks, edit, concepts, dropped=_KEPT, verb="apply")


def undo_stored(masks: Masks, edit: StoredEdit, concepts: Sequence[str]) -> Masks:
    """Undoes a stored edit: the inverse of `apply_stored`.

    Args:
        masks: As for `apply_stored`.
        edit: As for `apply_stored`.
        concepts: As for `apply_stored`.

    Raises:
        ValueError: As `apply_stored`.
    """
    return _flip_stored(masks, edit, concepts, dropped=_PRUNED, verb="undo")


def _flip_stored(masks: Masks, edit: StoredEdit, concepts: Sequence[str], *, dropped: bool, verb: str) -> Masks:
    if edit.concept not in concepts:
        expected = ", ".join(map(repr, concepts))
        raise ValueError(
            f"cannot {verb} edit {edit.id}: there is no concept {edit.concept!r}"
            f"{did_you_mean(edit.concept, concepts)}; expected one of {expected}"
        )
    k, flipped, num_stale = list(concepts).index(edit.concept), dict(masks), 0
    for path, one in edit.positions.items():
        shape = masks[path].shape[1:] if path in masks else None
        if shape != one.shape:
            raise ValueError(f"cannot {verb} edit {edit.id}: {path} has mask shape {shape} but edit shape {one.shape}")
        for side, state in ((one.dropped, dropped), (one.grown, not dropped)):
            if len(side):
                flipped[path], stale = _flip_at(flipped[path], k, _indices(side, one.shape), state)
                num_stale += int(stale)
    if num_stale:
        raise ValueError(
            f"cannot {verb} edit {edit.id} of {edit.concept}: {num_stale} of its positions are in another state; "
            f"expected masks {'as they were before it' if verb == 'apply' else 'that still hold it'}"
        )
    return flipped


def _indices(flat: Int[np.ndarray, " n"], shape: tuple[int, ...]) -> tuple[Int[np.ndarray, " p"], ...]:
    """Returns an index for each dimension, padded by the first position to few lengths, for few programs."""
    length = 1 << max(8, (len(flat) - 1).bit_length())
    padded = np.concatenate([flat, np.full(length - len(flat), flat[0])])
    return tuple(index.astype(np.int32) for index in np.unravel_index(padded, shape))


@functools.partial(jax.jit, static_argnums=3)
def _flip_at(
    mask: Bool[Array, "K ..."], k: int | Int[Array, ""], index: tuple[Int[Array, " p"], ...], state: bool
) -> tuple[Bool[Array, "K ..."], Int[Array, ""]]:
    """Flips booleans that are `state`; also counts the distinct positions that were not in that state."""
    before = mask[(k, *index)]
    # The first position is repeated where it fills up the rest.
    is_first = functools.reduce(jnp.logical_and, (axis == axis[0] for axis in index))
    counted = ~is_first | (jnp.arange(is_first.shape[0]) == 0)
    return mask.at[(k, *index)].set(not state), jnp.sum((before != state) & counted)


def _encode(positions: Int[np.ndarray, " n"]) -> str:
    """Encodes rising integers as base 64 of deflated differences, with their low bytes first and together."""
    steps = np.diff(np.asarray(positions, np.uint64), prepend=np.uint64(0))
    shuffled = np.ascontiguousarray(steps.astype("<u8").view(np.uint8).reshape(-1, 8).T)
    return base64.b64encode(zlib.compress(shuffled.tobytes(), 9)).decode("ascii")


def _decode(encoded: Any, size: int, source: str) -> Int[np.ndarray, " n"]:
    try:
        # At most all positions of the kernel are inflated: a small file cannot take much memory.
        inflater = zlib.decompressobj()
        plain = inflater.decompress(base64.b64decode(encoded, validate=True), 8 * size + 1)
        if not inflater.eof or len(plain) % 8:
            raise ValueError
    except (ValueError, TypeError, binascii.Error, zlib.error):
        raise ValueError(f"{source} do not decode; expected what saving an edit writes") from None
    steps = np.frombuffer(plain, np.uint8).reshape(8, -1).T.copy().view("<u8").reshape(-1)
    if (steps > size).any():
        raise ValueError(f"{source} lie outside the kernel's {size} weights")
    positions = np.cumsum(steps, dtype=np.int64)
    if len(positions) and (positions[-1] >= size or (np.diff(positions) <= 0).any()):
        raise ValueError(f"{source} do not rise within the kernel's {size} weights")
    return positions


def _positions(data: Any, source: str) -> Positions:
    if not isinstance(data, Mapping) or not {"shape", "dropped", "grown"} <= set(data):
        raise ValueError(f"{source} lacks one of 'shape', 'dropped' and 'grown'")
    shape = data["shape"]
    if not isinstance(shape, list) or not shape or not all(type(side) is int and side > 0 for side in shape):
        raise ValueError(f"{source} has shape {shape!r}; expected a list of positive integers")
    size = math.prod(shape)
    if size > _LARGEST_KERNEL:
        raise ValueError(f"{source} has shape {shape!r}; expected at most {_LARGEST_KERNEL} weights")
    dropped = _decode(data["dropped"], size, f"{source}: the dropped positions")
    grown = _decode(data["grown"], size, f"{source}: the grown positions")
    if both := len(np.intersect1d(dropped, grown, assume_unique=True)):
        raise ValueError(f"{source}: {both} positions are both dropped and grown")
    return Positions(tuple(shape), dropped, grown)


def overlapping(edit: StoredEdit, others: Iterable[StoredEdit]) -> dict[str, int]:
    """Counts the weights that an edit shares with each of the others of the same concept, where it shares any."""
    found: dict[str, int] = {}
    for other in others:
        shared = 0
        if other.concept == edit.concept:
            for path in edit.positions.keys() & other.positions.keys():
                own, their = (
                    np.concatenate([one.dropped, one.grown]) for one in (edit.positions[path], other.positions[path])
                )
                shared += len(np.intersect1d(own, their, assume_unique=True))
        if shared:
            found[other.id] = shared
    return found
