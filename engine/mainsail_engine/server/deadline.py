"""A request's deadline: the body's `timeout`, or the header that gateways and meshes set, whichever is shorter."""

from __future__ import annotations

from typing import TypeVar

from starlette.requests import Request

from mainsail_engine.errors import RequestError
from mainsail_engine.server.response_schemas import ResponsesRequest
from mainsail_engine.server.schemas import EmbeddingRequest, GenerationRequest

TIMEOUT_HEADER = "X-Request-Timeout"
Body = TypeVar("Body", bound=GenerationRequest | EmbeddingRequest | ResponsesRequest)


def timed(body: Body, request: Request) -> Body:
    """The body with the shorter of the two timeouts. Raises RequestError for a header that is no number of seconds."""
    header = request.headers.get(TIMEOUT_HEADER)
    if header is None:
        return body
    try:
        timeout_s = float(header)
    except ValueError:
        timeout_s = -1.0
    if not 0 < timeout_s < float("inf"):
        message = f"the header {TIMEOUT_HEADER} must be a number of seconds above 0, not {header!r}"
        raise RequestError(message, param=TIMEOUT_HEADER)
    shorter = timeout_s if body.timeout is None else min(body.timeout, timeout_s)
    return body.model_copy(update={"timeout": shorter})
