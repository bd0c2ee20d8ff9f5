"""Schemas of dataclasses: a small checker accepts what they describe, and nothing else."""

import dataclasses
import json
from typing import Any, Literal

import pytest

from sparsecbm_jax.explanation.pathways import pathway_schema
from sparsecbm_jax.runtime.json_schema import schema_of

KINDS = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "null": type(None), "array": list}


def problem(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "$") -> str | None:
    """The first place where a value is not what a schema says; None where there is none."""
    known = {"$ref", "anyOf", "enum", "type", "properties", "required", "additionalProperties", "items"}
    assert schema.keys() <= known | {"description", "title", "$schema", "$defs"}, f"not checked: {schema.keys()}"
    if "$ref" in schema:
        return problem(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, at)
    if "anyOf" in schema:
        found = [problem(value, one, root, at) for one in schema["anyOf"]]
        return None if None in found else found[0]
    if "enum" in schema:
        return None if value in schema["enum"] else f"{at} is {value!r}"
    if not schema.keys() - {"description"}:
        return None
    if schema["type"] != "object":
        if not isinstance(value, KINDS[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
            return f"{at} is a {type(value).__name__}"
        parts = [(value[i], schema["items"], f"{at}[{i}]") for i in range(len(value))] if "items" in schema else []
    else:
        if not isinstance(value, dict):
            return f"{at} is a {type(value).__name__}"
        if absent := set(schema.get("required", ())) - value.keys():
            return f"{at} lacks {sorted(absent)}"
        others, properties = schema["additionalProperties"], schema.get("properties", {})
        if others is False and (unknown := value.keys() - properties.keys()):
            return f"{at} has {sorted(unknown)}"
        parts = [(value[key], properties.get(key, others), f"{at}.{key}") for key in value]
    return next(filter(None, (problem(part, of, root, where) for part, of, where in parts)), None)


@dataclasses.dataclass
class Wheel:
    """A wheel.

    Attributes:
        radius: in metres,
            tyre included.
    """

    radius: float


@dataclasses.dataclass
class Car:
    """A car.

    Attributes:
        name, colour: what it is called, and how it looks.
    """

    name: str
    colour: Literal["red", "blue"]
    wheels: tuple[Wheel, ...]
    spare: Wheel | None
    seats: dict[str, int]
    is_sold: bool


def test_instances_are_what_the_schema_says_and_nothing_else_is() -> None:
    schema = schema_of(Car)
    content = json.loads(json.dumps(dataclasses.asdict(Car("Bee", "red", (Wheel(1.0),), None, {"front": 2}, False))))
    assert problem(content, schema, schema) is None
    assert problem({**content, "spare": {"radius": 1}}, schema, schema) is None
    for key, value, message in (
        ("colour", "green", "$.colour is 'green'"),
        ("doors", 4, "$ has ['doors']"),
        ("wheels", [{"radius": "wide"}], "$.wheels[0].radius is a str"),
        ("spare", {}, "$.spare lacks ['radius']"),
        ("seats", {"front": 2.5}, "$.seats.front is a float"),
        ("seats", {"front": True}, "$.seats.front is a bool"),
    ):
        assert problem({**content, key: value}, schema, schema) == message
    del content["name"]
    assert problem(content, schema, schema) == "$ lacks ['name']"


def test_descriptions_come_from_the_docstring() -> None:
    schema = schema_of(Car)
    assert schema["description"] == "A car."
    assert schema["properties"]["name"] == {"type": "string", "description": "what it is called, and how it looks."}
    assert schema["properties"]["colour"]["description"] == schema["properties"]["name"]["description"]
    assert schema["$defs"]["Wheel"]["properties"]["radius"]["description"] == "in metres, tyre included."


def test_every_field_of_a_pathway_is_described() -> None:
    schema = pathway_schema()
    for name, one in {"DecisionPathway": schema, **schema["$defs"]}.items():
        assert one["description"], name
        bare = [field for field, of in one["properties"].items() if not of.get("description")]
        assert not bare, f"{name}: {bare} do not stand under 'Attributes:'"


def test_a_type_without_a_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="has no JSON form known here"):
        schema_of(dataclasses.make_dataclass("Odd", [("field", complex)]))
