"""The description of the API at /v1/openapi.json, from the same models that check requests."""

from typing import Any

from serve.api.schema import ChatRequest
from vlm import __version__

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
                "code": {"type": "string"},
            },
        }
    },
}
_REPLY = {"type": "object", "required": ["id", "object", "created", "model", "choices", "usage"]}
_REF = "#/components/schemas/"
_ERRORS = {
    "4XX": "The request cannot be answered; code says why.",
    "5XX": "The server cannot answer now.",
}


def describe(model_id: str) -> dict[str, Any]:
    """The description as a document of OpenAPI 3.1.

    Args:
        model_id: the one model there is.
    """
    schema = ChatRequest.model_json_schema(ref_template=f"{_REF}{{model}}")
    schemas = schema.pop("$defs")
    schema["properties"]["model"] = {"type": "string", "enum": [model_id]}
    named = {"type": "object", "required": ["id", "object"]}
    listed = {"type": "object", "required": ["object", "data"]}
    path = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    chat = {
        "summary": "Answer a conversation about pictures",
        "operationId": "chat_completions",
        "requestBody": {"required": True, "content": _json({"$ref": f"{_REF}ChatRequest"})},
        "responses": _responses(_REPLY, {"text/event-stream": {"schema": {"type": "string"}}}),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "vlm", "version": __version__},
        "servers": [{"url": "/v1"}],
        "paths": {
            "/models": {"get": {"summary": "List models", "responses": _responses(listed)}},
            "/models/{model}": {
                "get": {"summary": "One model", "parameters": path, "responses": _responses(named)}
            },
            "/chat/completions": {"post": chat},
        },
        "components": {"schemas": {**schemas, "ChatRequest": schema, "Error": _ERROR}},
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _responses(schema: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
    good = {"description": "As in the OpenAI API.", "content": {**_json(schema), **(more or {})}}
    bad = {
        status: {"description": text, "content": _json({"$ref": f"{_REF}Error"})}
        for status, text in _ERRORS.items()
    }
    return {"200": good, **bad}
