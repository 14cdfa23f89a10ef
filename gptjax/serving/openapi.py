"""GET /openapi.json: an OpenAPI 3.1 description, made of the tables that check the requests."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from gptjax.serving import fields

_ANY = {"type": "object"}
_ERROR = {
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
_PROBLEMS = {
    "400": "a field is wrong, not supported or unknown, or a text is too long",
    "401": "the key is missing or wrong",
    "403": "the request is addressed to another host",
    "404": "there is no such model",
    "408": "the request ran for too long",
    "413": "the body is too large",
    "415": "the body is not declared as JSON",
    "429": "the queue is full",
    "500": "a fault of the server",
    "503": "the server starts or stops",
}
_REQUESTS: Mapping[str, tuple[str, fields.Table]] = {
    "/v1/completions": ("Texts that go on from prompts", fields.COMPLETIONS),
    "/v1/chat/completions": ("The answer to a conversation", fields.CHAT),
    "/v1/embeddings": ("Vectors of texts", fields.EMBEDDINGS),
}
_LOOKS = {
    "/v1/models": "The checkpoint and its adapters",
    "/health": "Whether the server is ready: 503 while it starts or stops",
    "/openapi.json": "This description",
}


def schema_of(table: fields.Table) -> dict[str, Any]:
    """JSON schema of a request's body. Refused fields have the values that are let pass."""
    properties = {}
    for name, field in table.items():
        described = {"description": field.meaning}
        if field.refused:
            described["description"] = f"not supported: {field.refused}"
            properties[name] = {**described, "enum": [*field.unless, None]}
        elif field.required:
            properties[name] = {**field.schema, **described}
        else:
            properties[name] = {**described, "anyOf": [field.schema, {"type": "null"}]}
    return {
        "type": "object",
        "required": [name for name, field in table.items() if field.required],
        "properties": properties,
        "additionalProperties": False,
    }


@functools.cache
def describe() -> dict[str, Any]:
    """The description."""
    paths: dict[str, Any] = {}
    for path, (summary, table) in _REQUESTS.items():
        content = {"application/json": {"schema": schema_of(table)}}
        responses = _responses()
        if table is not fields.EMBEDDINGS:
            # no schema: OpenAPI 3.1 has none for the events of a stream, and readers take one of
            # the whole text for that of each event
            responses["200"]["content"]["text/event-stream"] = {}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": content},
                "responses": responses,
            }
        }
    for path, summary in _LOOKS.items():
        paths[path] = {"get": {"summary": summary, "responses": _responses()}}
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{model}"] = {
        "get": {"summary": "One model", "parameters": [model], "responses": _responses()}
    }
    text = {"description": "ok", "content": {"text/plain": {"schema": {"type": "string"}}}}
    responses = {**_responses(), "200": text}
    paths["/metrics"] = {"get": {"summary": "Numbers for Prometheus", "responses": responses}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gptjax.serve",
            "version": "1",
            "description": "OpenAI's API; what is not supported is refused by name",
        },
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
        "paths": paths,
    }


def _responses() -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {
        status: {"description": meaning, "content": error} for status, meaning in _PROBLEMS.items()
    }
    ok = {"description": "ok", "content": {"application/json": {"schema": _ANY}}}
    return {"200": ok, **responses}
