"""The OpenAPI document of what clients reach at a gateway: administration, which is served here, and the rest.

Bodies for engines and what they answer are vLLM's; of them it says what a gateway itself looks at.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from modelpool import __version__
from modelpool.control_http import body_schema, share_schemas
from modelpool.messages.models import CHANGEABLE, ModelSpec
from modelpool.relay.inference import FORM_PATHS, JSON_PATHS

Json = dict[str, Any]

_JSON_BODY: Json = {
    "type": "object",
    "required": ["model"],
    "properties": {"model": {"type": "string"}, "stream": {"type": "boolean"}},
}
_FORM_BODY: Json = {
    "type": "object",
    "required": ["model", "file"],
    "properties": {"model": {"type": "string"}, "file": {"type": "string", "format": "binary"}},
}
_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_RESPONSES: Json = {
    "200": {"description": "As asked"},
    "default": {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    },
}


def document(app: FastAPI) -> Json:
    """Of the control routes of `app`, and of what a gateway serves itself or passes on to engines."""
    document = get_openapi(title="Model Pool", version=__version__, routes=app.routes)
    paths: dict[str, Json] = document["paths"]
    paths["/v1/models/register"] = {"post": {**paths["/admin/models/register"]["post"], "operationId": "register_v1"}}
    for path in sorted(JSON_PATHS):
        paths[path] = {"post": _operation("Inference", body=("application/json", _JSON_BODY))}
    for path in sorted(FORM_PATHS):
        paths[path] = {"post": _operation("Inference", body=("multipart/form-data", _FORM_BODY))}
    paths["/v1/responses/{id}"] = {"get": _operation("A stored response", ["id"])}
    paths["/v1/responses/{id}/cancel"] = {"post": _operation("Cancel a response in the background", ["id"])}
    paths["/v1/models"] = {"get": _operation("All registered models")}
    paths["/v1/models/{id}"] = {"get": _operation("A registered model", ["id"])}
    paths["/admin/explain/{id}"] = {"get": _operation("What was decided for a recent request", ["id"])}
    paths["/admin/requests"] = {"get": _operation("What became of the latest requests")}
    paths["/metrics"] = {"get": _operation("Prometheus metrics")}
    paths["/"] = {"get": _operation("What this is")}
    for operations in paths.values():
        for operation in operations.values():
            operation["responses"] = _RESPONSES
    schemes = {"key": {"type": "http", "scheme": "bearer"}}
    document["components"] = {"schemas": {"Error": _ERROR}, "securitySchemes": schemes}
    document["security"] = [{"key": []}, {}]
    return share_schemas(document)


def change_schema() -> Json:
    """`openapi_extra` for the change of a model: the fields of a registration that may change, or null."""
    (spec,) = (body["schema"] for body in body_schema(ModelSpec)["requestBody"]["content"].values())
    fields = {name: {"anyOf": [spec["properties"][name], {"type": "null"}]} for name in CHANGEABLE}
    schema = {"type": "object", "properties": fields, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _operation(summary: str, names: Iterable[str] = (), *, body: tuple[str, Json] | None = None) -> Json:
    """`names`: of what stands in the path."""
    operation: Json = {"summary": summary}
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {body[0]: {"schema": body[1]}}}
    return operation
