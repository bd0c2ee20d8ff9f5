"""The OpenAPI document of the JSON API, made from the operations themselves."""

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sparsecbm_jax.app.schemas import Problem
from sparsecbm_jax.app.security import COOKIE, OPEN_PATHS, Limits
from sparsecbm_jax.runtime.json_schema import schema_of
from sparsecbm_jax.version import __version__

if TYPE_CHECKING:
    from sparsecbm_jax.app.operations import Operation

VERSION = "3.1.0"
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "cookie": {"type": "apiKey", "in": "cookie", "name": COOKIE},
}
_BARE = str.maketrans("", "", "{}")


def document(operations: Iterable["Operation"], limits: Limits, *, is_token_needed: bool) -> dict[str, Any]:
    """Makes the document, as JSON values.

    Args:
        operations: The operations of the API.
        limits: The server's limits, which the description names.
        is_token_needed: True where requests need a token.

    Reference: OpenAPI 3.1, whose schemas are JSON Schema 2020-12.
    """
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for one in operations:
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one, schemas, is_token_needed)
    return {
        "openapi": VERSION,
        "info": {
            "title": "sparsecbm_jax, live",
            "version": __version__,
            "summary": "Explains texts and takes corrections of their concepts.",
            "description": f"A request has at most {limits.max_body:,} bytes, a text at most {limits.max_text:,} "
            f"characters. One address may send {limits.rate:g} requests a second, {limits.burst} at once; "
            f"{limits.max_waiting} requests wait for the model at most.",
        },
        "paths": paths,
        "components": {"schemas": schemas, **({"securitySchemes": _SECURITY} if is_token_needed else {})},
    }


def _operation(one: "Operation", schemas: dict[str, Any], is_token_needed: bool) -> dict[str, Any]:
    refusals = {403, *one.refusals}
    is_open = one.path in OPEN_PATHS
    if not is_open:
        refusals |= {429} | ({401} if is_token_needed else set())
    if one.form is not None:
        refusals |= {408, 413, 415}
    answers: dict[str, Any] = {"200": {"description": "The answer.", "content": _json(one.answer, schemas)}}
    for status in sorted(refusals):
        answers[str(status)] = {"description": HTTPStatus(status).phrase, "content": _json(Problem, schemas)}
    if "429" in answers:
        about = {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}
        answers["429"]["headers"] = {"Retry-After": about}
    name = "_".join(one.path.translate(_BARE).strip("/").split("/"))
    described: dict[str, Any] = {"operationId": f"{one.method.lower()}_{name}", "summary": one.summary}
    if names := re.findall(r"{(\w+)}", one.path):
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if one.form is not None:
        described["requestBody"] = {"required": True, "content": _json(one.form, schemas)}
    if is_token_needed and not is_open:
        described["security"] = [{"bearer": []}, {"cookie": []}]
    return {**described, "responses": answers}


def _json(kind: type | None, schemas: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object"} if kind is None else {"$ref": _add(kind, schemas)}}}


def _add(kind: type, schemas: dict[str, Any]) -> str:
    """Adds a dataclass, and those that it holds, to the document's schemas; returns the reference."""
    if kind.__name__ not in schemas:
        schema = schema_of(kind)
        del schema["$schema"]
        for name, one in {**schema.pop("$defs"), kind.__name__: schema}.items():
            schemas[name] = _moved(one)
    return f"#/components/schemas/{kind.__name__}"


def _moved(schema: Any) -> Any:
    """Returns a schema whose references point to the document's schemas."""
    if isinstance(schema, dict):
        moved = {key: _moved(value) for key, value in schema.items()}
        if isinstance(moved.get("$ref"), str):
            moved["$ref"] = moved["$ref"].replace("#/$defs/", "#/components/schemas/")
        return moved
    return [_moved(one) for one in schema] if isinstance(schema, list) else schema
