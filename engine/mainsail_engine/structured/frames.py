"""Messages between the core and the compiler's process: msgpack, each behind its length, over two pipes."""

from __future__ import annotations

import struct
from typing import BinaryIO

import msgspec

from mainsail_engine.structured.grammar import Grammar

LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, frozen=True):
    """The first message: the vocabulary, and the bounds of every compilation."""

    tokens: list[bytes]
    stop_token_ids: list[int]
    cpu_s: int
    memory_bytes: int
    """Data that a child may allocate beyond what it shares with its parent."""
    max_processes: int


class Job(msgspec.Struct, frozen=True, array_like=True):
    number: int
    grammar: Grammar


class Done(msgspec.Struct, frozen=True, array_like=True):
    """compiled: the serialized grammar. error: why there is none, for the client."""

    number: int
    compiled: str | None
    error: str | None


def write(stream: BinaryIO, message: Start | Job | Done) -> None:
    data = msgspec.msgpack.encode(message)
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()


def read(stream: BinaryIO) -> bytes | None:
    """One message's bytes; None at the end of the stream. Also from an unbuffered stream, which reads in pieces."""
    head = _exactly(stream, LENGTH.size)
    return None if head is None else _exactly(stream, LENGTH.unpack(head)[0])


def _exactly(stream: BinaryIO, size: int) -> bytes | None:
    parts: list[bytes] = []
    while size:
        part = stream.read(size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
