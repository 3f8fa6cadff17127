"""What API keys have used, told among the workers of one pod: their limits hold for all workers together.

Each worker counts for itself and tells the others at once what it has counted: datagrams on Unix sockets, one for each
turn of its event loop in which something was counted. So a limit may be exceeded by what is begun within the moment
that a datagram takes, and by nothing else. A worker that starts asks the others how things stand; who is not there is
not told.

The message is the state of a key as far as it is the sender's: requests that run there (absolute, so a lost message
heals with the next), and requests and tokens since the last message to this receiver.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mainsail_gateway.keys import Keys

log = logging.getLogger(__name__)

AGAIN_S = 0.05
"""When a receiver's buffer is full."""
MOST_KEYS = 500
"""In one datagram."""
MOST_BYTES = 1 << 18


class Used(msgspec.Struct, array_like=True):
    """One key, at one worker."""

    running: int
    requests: int
    tokens: int


class Note(msgspec.Struct, array_like=True):
    sender: int
    hello: bool
    """The sender has just begun and knows nothing."""
    keys: dict[str, Used]


_decoder = msgspec.msgpack.Decoder(Note)


def usage_socket(folder: Path, index: int) -> Path:
    return folder / f"usage-{index}"


class Sharing:
    """One worker's end."""

    def __init__(self, keys: Keys, folder: Path, index: int, workers: int) -> None:
        self._keys = keys
        self._index = index
        self._folder = folder
        self._others = [other for other in range(workers) if other != index]
        self._pending: dict[int, dict[str, Used]] = {other: {} for other in self._others}
        self._flushing: asyncio.Handle | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    async def run(self) -> None:
        """Until cancelled."""
        path = usage_socket(self._folder, self._index)
        path.unlink(missing_ok=True)  # of a worker that died
        self._socket.bind(str(path))
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket, self._hear)
        self._keys.on_use = self.used
        for other in self._others:
            self._send(other, Note(self._index, True, {}))
        try:
            await asyncio.Event().wait()
        finally:
            loop.remove_reader(self._socket)
            self._socket.close()

    def used(self, name: str, running: int, requests: int, tokens: int) -> None:
        """A key's request has begun or ended here."""
        for pending in self._pending.values():
            known = pending.get(name) or Used(0, 0, 0)
            pending[name] = Used(running, known.requests + requests, known.tokens + tokens)
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = None
        full = False
        for other, pending in self._pending.items():
            for names in _parts(list(pending), MOST_KEYS):
                if not self._send(other, Note(self._index, False, {name: pending[name] for name in names})):
                    full = True
                    break
                for name in names:
                    del pending[name]
        if full:
            self._flushing = asyncio.get_running_loop().call_later(AGAIN_S, self._flush)

    def _send(self, other: int, note: Note) -> bool:
        """False: its buffer is full, try again."""
        try:
            self._socket.sendto(msgspec.msgpack.encode(note), str(usage_socket(self._folder, other)))
        except BlockingIOError:
            return False
        except OSError:
            pass  # it is not there, and will ask when it is
        return True

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                note = _decoder.decode(self._socket.recv(MOST_BYTES))
                if note.hello:
                    self._greet(note.sender)
                for name, used in note.keys.items():
                    self._keys.hear(note.sender, name, used.running, used.requests, used.tokens)

    def _greet(self, newcomer: int) -> None:
        """Tell a worker that has begun how things stand. What all have used, one tells: the first of the others."""
        self._keys.forget(newcomer)
        first = min(other for other in (self._index, *self._others) if other != newcomer)
        whole = self._index == first
        told = {
            name: Used(running, requests if whole else 0, tokens if whole else 0)
            for name, (running, requests, tokens) in self._keys.standing().items()
        }
        self._pending[newcomer] = told
        if told and self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_soon(self._flush)


def _parts(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[at : at + size] for at in range(0, len(names), size)]
