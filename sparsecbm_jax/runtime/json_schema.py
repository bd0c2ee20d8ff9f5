"""The JSON Schema of a dataclass, from its annotations and the texts of its docstring: one source of truth.

Reference: JSON Schema, draft 2020-12.
"""

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_SCALARS = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>.+)")


def schema_of(cls: type) -> dict[str, Any]:
    """Makes the schema of the result of `dataclasses.asdict`, nested dataclasses under '$defs'.

    >>> @dataclasses.dataclass
    ... class Point:
    ...     x: float
    >>> schema_of(Point)["properties"]
    {'x': {'type': 'number'}}

    Args:
        cls: A dataclass; the texts under 'Attributes:' in its docstring become the descriptions of its fields.

    Raises:
        TypeError: A field's type has no JSON form known here.
    """
    definitions: dict[str, Any] = {}
    whole = _object(cls, definitions)
    return {"$schema": DRAFT, "title": cls.__name__, **whole, "$defs": definitions}


def _object(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints, texts = typing.get_type_hints(cls), _attribute_texts(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        about = {"description": texts[field.name]} if field.name in texts else {}
        properties[field.name] = {**_type(hints[field.name], definitions), **about}
    return {
        "type": "object",
        "description": (inspect.getdoc(cls) or "").partition("\n")[0],
        "properties": properties,
        "required": [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING],
        "additionalProperties": False,
    }


def _type(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return {}
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is typing.Literal:
        return {"enum": list(args)}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_type(arg, definitions) for arg in args]}
    if origin is tuple and args[1:] == (...,):
        return {"type": "array", "items": _type(args[0], definitions)}
    if origin is dict and args[0] is str:
        return {"type": "object", "additionalProperties": _type(args[1], definitions)}
    raise TypeError(f"{hint} has no JSON form known here; expected scalars, Any, Literal, tuple[X, ...], dict[str, X]")


def _attribute_texts(cls: type) -> dict[str, str]:
    """Returns the docstring's text under 'Attributes:' for each field."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        if not line.startswith("     ") and (entry := _ENTRY.fullmatch(line.strip())):
            names = entry["names"].split(", ")
            texts |= dict.fromkeys(names, entry["text"])
        else:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts
