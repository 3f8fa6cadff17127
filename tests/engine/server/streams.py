"""A client that measures: streams over plain sockets, with as little of its own work in between as can be."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(slots=True)
class Seen:
    """One stream, as its client saw it; seconds on the monotonic clock."""

    sent_s: float = 0.0
    ended_s: float = 0.0
    lines: list[tuple[float, bytes]] = field(default_factory=list[tuple[float, bytes]])

    def events(self) -> list[tuple[float, dict[str, Any]]]:
        return [(at_s, json.loads(line[6:])) for at_s, line in self.lines if line.startswith(b"data: {")]

    def arrivals_s(self) -> list[float]:
        """When each token came (with return_token_ids)."""
        return [at_s for at_s, event in self.events() for _ in event["choices"][0].get("token_ids", ())]


async def watch(url: str, path: str, body: dict[str, Any], *, until: int | None = None) -> Seen:
    """Post the body and read the stream to its end; or hang up after so many events."""
    parts = urlsplit(url)
    content = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**20)
    seen = Seen(time.monotonic())
    try:
        writer.write(head.encode() + content)
        while line := await reader.readline():
            seen.lines.append((time.monotonic(), line))
            if until is not None and sum(line.startswith(b"data: ") for _, line in seen.lines) >= until:
                break
    finally:
        writer.close()
    seen.ended_s = time.monotonic()
    return seen
