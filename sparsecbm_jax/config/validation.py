"""Checks of settings: types, ranges, choices, with the full dotted key in every message."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from sparsecbm_jax.config.names import did_you_mean

T = TypeVar("T")


class Check(NamedTuple):
    """A range that a value must lie in, and how to say so."""

    expected: str
    accepts: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


POSITIVE_INT = Check("an integer of at least 1", lambda v: v >= 1)
NON_NEGATIVE_INT = Check("an integer of at least 0", lambda v: v >= 0)
POSITIVE = Check("a finite number above 0", lambda v: 0 < v < math.inf)
NON_NEGATIVE = Check("a finite number of at least 0", lambda v: 0 <= v < math.inf)
FRACTION = Check("a fraction in [0, 1)", lambda v: 0 <= v < 1)
FRACTIONS = Check("fractions in [0, 1)", lambda values: all(0 <= v < 1 for v in values))
NON_EMPTY = Check("a non-empty string", lambda v: bool(v.strip()))


def one_of(*choices: str) -> Check:
    """Returns the check that a value is one of `choices`."""
    return Check(f"one of {', '.join(map(repr, choices))}", choices.__contains__, choices)


def setting(default: T, check: Check) -> T:
    """Returns a dataclass field with a default and a range that `__post_init__` holds it to."""
    return typing.cast(T, dataclasses.field(default=default, metadata={"check": check}))


def field_types(cls: type) -> dict[str, Any]:
    """Returns the declared types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def full_key(cls: Any, name: str) -> str:
    """Returns the dotted key of a field of a section."""
    return f"{cls.section}.{name}" if cls.section else name


def settle(config: Any) -> None:
    """Brings field values to their declared types and holds them to their ranges, in `__post_init__`."""
    hints = field_types(type(config))
    for field in dataclasses.fields(config):
        key = f"config.{full_key(config, field.name)}"
        value = _coerce(key, getattr(config, field.name), hints[field.name])
        object.__setattr__(config, field.name, value)
        check = field.metadata.get("check")
        if check is None or value is None or check.accepts(value):
            continue
        hint = did_you_mean(str(value), check.choices, "; did you mean {!r}?")
        raise ValueError(f"{key} is {value!r}; expected {check.expected}{hint}")


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """Returns `value` as the type `hint`, where that loses nothing; raises where it would."""
    optional = isinstance(hint, types.UnionType)
    if optional:
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    if hint == tuple[str, ...]:
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        expected = "a list of strings"
    elif hint == tuple[float, ...]:
        if isinstance(value, (list, tuple)) and all(_is_number(item) for item in value):
            return tuple(float(item) for item in value)
        expected = "a list of numbers"
    elif hint is float:
        if _is_number(value):
            return float(value)
        expected = "a number"
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        expected = "an integer"
    else:
        if isinstance(value, hint):
            return value
        expected = {bool: "True or False", str: "a string"}.get(hint, f"a {hint.__name__}")
    expected += " or None" if optional else ""
    raise ValueError(f"{key} is {value!r}, a {type(value).__name__}; expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
