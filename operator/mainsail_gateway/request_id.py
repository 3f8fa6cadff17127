"""The name of a request, the same for the client, the gateway and the engine: the header `x-request-id`.

What a client sends is kept; without it, or with one that is no name, the gateway gives one. It goes on to the engine,
comes back with every answer (the gateway's own refusals among them), and is in the access log.
"""

import re
import uuid
from collections.abc import Awaitable

from mainsail_gateway.asgi import Message, Scope, Send

HEADER = b"x-request-id"
_NAME = re.compile(rb"[!-~]{1,128}")


def named(scope: Scope) -> bytes:
    """The request's name, which is among its headers from now on."""
    given = [value for name, value in scope["headers"] if name == HEADER]
    if len(given) == 1 and _NAME.fullmatch(given[0]):
        return given[0]
    made = b"req_" + uuid.uuid4().hex.encode()
    scope["headers"] = [*(header for header in scope["headers"] if header[0] != HEADER), (HEADER, made)]
    return made


def telling(name: bytes, send: Send) -> Send:
    """`send` for answers that tell the name, unless whoever gave them has named them."""

    def send_named(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start" and not any(key == HEADER for key, _ in message["headers"]):
            message = {**message, "headers": [*message["headers"], (HEADER, name)]}
        return send(message)

    return send_named
