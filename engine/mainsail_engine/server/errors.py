"""Errors as HTTP answers, always in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from mainsail_engine.errors import RequestError

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def error_body(error: RequestError) -> dict[str, Any]:
    kind = TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError) -> Response:
    """ASCII only: a message may quote what the client sent, and that may be no valid Unicode."""
    headers = {} if error.retry_after_s is None else {"retry-after": str(math.ceil(error.retry_after_s))}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    content = json.dumps(error_body(error)).encode()
    return Response(content, status_code=error.status, headers=headers, media_type="application/json")


def from_validation(problems: Sequence[Any]) -> RequestError:
    """The first problem that the schema found, with the field's path."""
    problem = _most_telling(problems)
    kind, message = str(problem["type"]), str(problem["msg"])
    if kind == "json_invalid":
        reason = problem.get("ctx", {}).get("error", message)
        return RequestError(f"the body is not valid JSON: {reason}", code="invalid_json")
    param = _param(problem["loc"], kind)
    named, _, rest = message.partition(": ")
    if param is None and rest and named.isidentifier():
        param, message = named, rest
    elif rest and named.isidentifier() and param is not None:
        param, message = f"{param}.{named}", rest
    if kind == "extra_forbidden":
        message = "is not a field of this request"
    elif kind == "missing":
        message = "is required"
    if param is None:
        return RequestError("the body must be a JSON object (content-type: application/json)", code="invalid_body")
    code = "unknown_field" if kind == "extra_forbidden" else "unsupported" if kind == "unsupported" else "invalid_value"
    return RequestError(f"{param}: {message}", param=param, code=code)


def _most_telling(problems: Sequence[Any]) -> Any:
    """A union reports a problem for each of its members: the deepest one says most."""
    first = problems[0]
    same_field = [problem for problem in problems if problem["loc"][:2] == first["loc"][:2]]
    return max(same_field, key=lambda problem: len(problem["loc"]))


def _param(location: Sequence[Any], kind: str) -> str | None:
    """messages.0.content from pydantic's path, without the names of union members that it mixes in."""
    parts = [part for part in location if part != "body"]
    if not parts:
        return None
    named = [part for part in parts[:-1] if not _is_type_name(part)]
    last = parts[-1]
    keep_last = kind == "extra_forbidden" or len(parts) == 1 or not _is_type_name(last)
    return ".".join(str(part) for part in [*named, *([last] if keep_last else [])])


def _is_type_name(part: Any) -> bool:
    if not isinstance(part, str):
        return False
    return part in ("str", "int", "float", "bool") or "[" in part or part[:1].isupper()
