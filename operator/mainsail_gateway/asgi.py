"""The few ASGI types that the gateway speaks (https://asgi.readthedocs.io/en/latest/specs/www.html)."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OnGone = Callable[[Callable[[], None] | None], None]
"""Tells a function, instead of the one told before, when the client has left; None: nobody any more."""
GONE = "mainsail.on_gone"
"""Our server's extension in `scope["extensions"]`, with an OnGone as `tell`. ASGI itself tells it only to who waits in
`receive`, and that takes a task for each stream."""
Headers = list[tuple[bytes, bytes]]
"""Header lines in order; names in lower case."""
