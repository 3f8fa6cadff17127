import asyncio
import socket
import struct

import pytest
from e2e.cluster import forward
from e2e.cluster.forward import dns_address, dns_question
from tests.ports import free_ports

QUESTION = dns_question("gateway.example", 7)


def answer(*records: bytes, identity: int = 7) -> bytes:
    header = struct.pack(">6H", identity, 0x8180, 1, len(records), 0, 0)
    return header + QUESTION[12:] + b"".join(records)


def record(kind: int, data: bytes, name: bytes = b"\xc0\x0c") -> bytes:
    return name + struct.pack(">HHIH", kind, 1, 1, len(data)) + data


def test_question_on_the_wire():
    assert QUESTION == b"\0\7\1\0\0\1\0\0\0\0\0\0\7gateway\7example\0\0\1\0\1"


def test_first_address_after_an_alias():
    alias = record(5, b"\3foo\xc0\x14")
    assert dns_address(answer(alias, record(1, bytes([10, 96, 0, 9]))), QUESTION) == "10.96.0.9"


def test_name_written_out():
    assert dns_address(answer(record(1, bytes([10, 0, 0, 1]), b"\1a\0")), QUESTION) == "10.0.0.1"


def test_no_such_name_has_no_address():
    assert dns_address(answer(), QUESTION) is None


def test_answer_to_another_question_is_no_answer():
    assert dns_address(answer(record(1, b"\1\2\3\4"), identity=8), QUESTION) is None


async def test_a_question_that_is_lost_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        monkeypatch.setattr(forward, "NODE_IP", "127.0.0.1")
        monkeypatch.setattr(forward, "DNS_PORT", server.getsockname()[1])
        monkeypatch.setattr(forward, "DNS_AGAIN_S", 0.05)

        async def answer_the_second() -> None:
            await loop.sock_recvfrom(server, 512)
            asked, client = await loop.sock_recvfrom(server, 512)
            (identity,) = struct.unpack_from(">H", asked)
            await loop.sock_sendto(server, answer(record(1, bytes([10, 96, 0, 9])), identity=identity), client)

        serving = asyncio.create_task(answer_the_second())
        assert await forward.resolve("gateway.example") == "10.96.0.9"
        await serving


async def test_nobody_to_ask_is_said_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forward, "NODE_IP", "127.0.0.1")
    monkeypatch.setattr(forward, "DNS_PORT", free_ports(1)[0])
    with pytest.raises(ConnectionRefusedError):
        await forward.resolve("gateway.example")
