"""The way in: 127.0.0.1:port on the host, to the API server and to the gateway's Service inside the namespace.

    python -m e2e.cluster.forward NAME API_PORT GATEWAY_PORT

One process. It makes its listening sockets first, so they stay in the host's network namespace; then it enters the
cluster's, where every onward connection starts. The gateway is asked of the cluster's own DNS at each connection, so
it may be installed later, and again. A connection that leads nowhere is closed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import secrets
import socket
import struct
import sys
from collections.abc import Awaitable, Callable

from e2e.cluster import cgroups, netns
from e2e.cluster.network import API_PORT, DNS_PORT, NODE_IP

GATEWAY_NAME = "mainsail-gateway.mainsail-system.svc.cluster.local"
GATEWAY_PORT = 80
CHUNK = 65536
DNS_AGAIN_S = 2
DNS_TRIES = 30
"""On a busy machine an answer may take long, or a datagram be dropped."""

Address = tuple[str, int]


def listen(port: int) -> socket.socket:
    """A listening socket on the host's loopback only."""
    return socket.create_server(("127.0.0.1", port), backlog=512)


def dns_question(name: str, identity: int) -> bytes:
    """A query for a name's A record (RFC 1035, section 4)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">6H", identity, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", 1, 1)


def dns_address(answer: bytes, question: bytes) -> str | None:
    """The first A record of an answer to that question; None when it has none."""
    if len(answer) < len(question) or answer[:2] != question[:2]:
        return None
    count = struct.unpack_from(">H", answer, 6)[0]
    offset = len(question)
    for _ in range(count):
        offset = _after_name(answer, offset)
        kind, _, _, length = struct.unpack_from(">HHIH", answer, offset)
        offset += 10
        if kind == 1 and length == 4:
            return str(ipaddress.IPv4Address(answer[offset : offset + 4]))
        offset += length
    return None


def _after_name(message: bytes, offset: int) -> int:
    while length := message[offset]:
        if length & 0xC0:  # a pointer: two bytes, and the name ends
            return offset + 2
        offset += length + 1
    return offset + 1


async def resolve(name: str) -> str | None:
    """Ask the cluster's DNS. Raises OSError when nobody is there, TimeoutError when nobody answers."""
    question = dns_question(name, secrets.randbelow(65536))
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.setblocking(False)
        await loop.sock_connect(asker, (NODE_IP, DNS_PORT))
        for _ in range(DNS_TRIES):
            await loop.sock_sendall(asker, question)
            with contextlib.suppress(asyncio.TimeoutError):
                answer = await asyncio.wait_for(loop.sock_recv(asker, 4096), DNS_AGAIN_S)
                return dns_address(answer, question)
    raise TimeoutError(f"{name}: no answer from the cluster's DNS")


async def api_server() -> Address | None:
    """Where the API server listens."""
    return NODE_IP, API_PORT


async def gateway() -> Address | None:
    """The gateway's Service, once there is one."""
    address = await resolve(GATEWAY_NAME)
    return None if address is None else (address, GATEWAY_PORT)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes from one side to the other, and the end of the stream as well."""
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def relay(find: Callable[[], Awaitable[Address | None]], reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter) -> None:  # fmt: skip
    """One connection of the host, for as long as either side holds it."""
    with contextlib.suppress(OSError, asyncio.TimeoutError), contextlib.closing(writer):
        target = await find()
        if target is None:
            return
        inner_reader, inner_writer = await asyncio.open_connection(*target)
        with contextlib.closing(inner_writer):
            pumps = [asyncio.create_task(pump(reader, inner_writer)), asyncio.create_task(pump(inner_reader, writer))]
            try:
                await asyncio.gather(*pumps)
            finally:  # one side broke: the other must not wait for ever
                for task in pumps:
                    task.cancel()


async def serve(ways: list[tuple[socket.socket, Callable[[], Awaitable[Address | None]]]]) -> None:
    """Serve all listening sockets until the process ends."""
    servers = [
        await asyncio.start_server(lambda reader, writer, find=find: relay(find, reader, writer), sock=listener)
        for listener, find in ways
    ]
    print(f"forwarding, pid {os.getpid()}", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main(name: str, api_port: int, gateway_port: int) -> None:
    """Join the cluster's cgroup (so that `down` ends this process too), listen outside, forward inside."""
    cgroups.enter(name)
    listeners = [listen(api_port), listen(gateway_port)]
    netns.enter(name)
    asyncio.run(serve(list(zip(listeners, (api_server, gateway), strict=True))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
