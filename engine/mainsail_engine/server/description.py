"""/openapi.json: what FastAPI derives from the schemas, made true.

FastAPI knows the bodies. What it cannot know: that a body which does not fit is answered with 400 and OpenAI's error
form (never its own 422), that answers may be streams, which errors any request can meet, and that a key may be needed.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
OPEN = ("/health", "/metrics", "/version")
ANY_REQUEST = ("400", "401", "404", "405", "413", "500", "503")
"""Statuses that any request may be answered with: not read, no key, no such thing, too large, failed, ended."""
GENERATING = ("429", "504")
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
_EVENT = {
    "type": "object",
    "description": "With stream: true. Each event's data is a JSON object; the last one of a completion is [DONE].",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_WORDS = {
    "400": "The request cannot be served; `param` names the field.",
    "401": "A valid key is needed.",
    "404": "No such model, or path.",
    "405": "Not with this method.",
    "413": "The body is too large.",
    "429": "The queue is full; `Retry-After` says when to come back.",
    "500": "The engine failed at this request.",
    "503": "The server is starting, draining, asleep or ending.",
    "504": "The deadline (`timeout`) has passed.",
}


def describe(app: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI document."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _correct(operation, path)
            if needs_key and not path.startswith(OPEN):
                operation["security"] = [{"key": []}]
    components = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _correct(operation: dict[str, Any], path: str) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if path.startswith(OPEN):
        return
    for status in ANY_REQUEST + (GENERATING if "requestBody" in operation else ()):
        responses[status] = {"description": _WORDS[status], "content": _ERROR}
    if path in STREAMS:
        responses["200"]["content"]["text/event-stream"] = {"schema": _EVENT}
