"""What goes wrong, in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

Every answer that the gateway itself gives instead of an engine is one of these, so that a client needs one way to
read errors. A `retry_after_s` becomes the header that OpenAI's clients obey.
"""

import math

import msgspec

from mainsail_gateway.asgi import Headers, Message, Send


class GatewayError(Exception):
    """An answer to a client: HTTP status and the parts of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers or []

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def head(self, size: int) -> Headers:
        headers: Headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % size), *self.headers]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s))))
        return headers


async def send_error(send: Send, error: GatewayError, extra: Headers, *, more: bool = False) -> None:
    """Answer with `error`. `more` leaves the response open, for a caller that lingers before it closes."""
    body = error.body()
    start: Message = {
        "type": "http.response.start",
        "status": error.status,
        "headers": error.head(len(body)) + extra,
    }
    await send(start)
    await send({"type": "http.response.body", "body": body, "more_body": more})


def bad_request(message: str, *, param: str | None, code: str = "invalid_value") -> GatewayError:
    return GatewayError(400, message, code=code, param=param)


def unknown_model(model: str) -> GatewayError:
    shown = model if len(model) <= 200 else model[:200] + "…"
    message = f"The model `{shown}` does not exist. GET /v1/models lists the models that are served here."
    return GatewayError(404, message, code="model_not_found", param="model")


def no_capacity(model: str, retry_after_s: float) -> GatewayError:
    message = f"No replica of the model `{model}` is ready to serve. Try again later."
    return GatewayError(503, message, code="no_capacity", param="model", retry_after_s=retry_after_s)


def too_large(limit_bytes: int) -> GatewayError:
    return GatewayError(413, f"The request's body is larger than {limit_bytes} bytes.", code="request_too_large")


def too_many_clients() -> GatewayError:
    """The connection is closed, so that the next try may reach another gateway."""
    message = "This gateway has as many clients as it can serve at once. Try again."
    close: Headers = [(b"connection", b"close")]
    return GatewayError(503, message, code="too_many_connections", retry_after_s=1.0, headers=close)


def out_of_sockets(model: str) -> GatewayError:
    message = f"This gateway has no socket left to ask a replica of the model `{model}`. Try again."
    return GatewayError(503, message, code="too_many_connections", param="model", retry_after_s=1.0)
