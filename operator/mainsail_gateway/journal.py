"""What a client has of a streamed answer, in tokens: so that another replica can go on where one broke off.

A gateway asks engines for their side form of streams (`x-mainsail-stream: ids`): each piece of the answer comes behind
a comment with its length in bytes and the tokens that it shows (the engine's `server/handover.py` has the format).
`Journal.feed` takes the comments out and keeps them; the events themselves are not looked into. Only whole pieces are
handed on, so what the client has is always exactly what the journal says. Nothing is parsed until it is needed:
`resume` then writes the tokens down in front of the request's body, for the next engine.

An engine that does not know the side form does not confirm it in its answer's head; its bytes pass as they are, and
cannot be resumed.
"""

import re
from typing import Any

import msgspec

from mainsail_gateway.asgi import Headers
from mainsail_gateway.kv_index import BLOCKS_HEADER
from mainsail_gateway.upstream import UpstreamError

STREAM_HEADER = b"x-mainsail-stream"
RESUME_HEADER = b"x-mainsail-resume"
NO_FAILOVER_HEADER = b"x-mainsail-no-failover"
"""Of a client that wants its request never to run twice: it is retried only where nothing was sent."""
OWN_HEADERS = frozenset((STREAM_HEADER, RESUME_HEADER, NO_FAILOVER_HEADER, BLOCKS_HEADER))
"""Between gateway and engine (or client and gateway) only: never passed on from the other side."""
MAX_LINE_BYTES = 1 << 20
MAX_PIECE_BYTES = 16 << 20
MAX_NOTES = 256
"""Then they are joined: an object for each would weigh more than the tokens."""

_CONFIRMED = re.compile(rb"ids id=([A-Za-z0-9_-]{1,128}) created=([0-9]{1,12})")
_IDS = b":ids "
_HANDOVER = b":handover "
_END = b":end"
"""Of a stream whose last event is not [DONE]."""
_DONE = b"data: [DONE]\n\n"


class Journal:
    """One answer, over all the engines that give it."""

    def __init__(self, answer_id: str, created: int) -> None:
        self.answer_id = answer_id
        self.created = created
        self.complete = False
        """The last event has passed: whatever happens to the connection now, the client has everything."""
        self._notes: list[bytes] = []
        self._rest = b""

    @classmethod
    def of(cls, headers: Headers) -> "Journal | None":
        """A journal for an answer with this head; None when it is not in the side form."""
        value = next((value for name, value in headers if name == STREAM_HEADER), b"")
        match = _CONFIRMED.fullmatch(value)
        return cls(match[1].decode(), int(match[2])) if match else None

    @property
    def empty(self) -> bool:
        """The client has nothing of the answer yet."""
        return not self._notes

    def broken(self) -> None:
        """The engine is gone, and with it the rest of a piece that had begun."""
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The whole pieces in these bytes, without the lines between them.

        Raises UpstreamError: `handover` when the engine hands the rest to another, `garbage` for what is neither."""
        if self._rest:
            data = self._rest + data
        shown: list[bytes] = []
        at, size = 0, len(data)
        while at < size:
            end = data.find(b"\n", at, at + MAX_LINE_BYTES)
            if end < 0:
                break
            line = data[at:end]
            if line == _END:
                self.complete = True
                at = end + 1
                continue
            if shown and line.startswith(_HANDOVER):
                break  # first what comes before it
            length, notes = _line(line)
            stop = end + 1 + _number(length)
            if stop > size:
                break
            shown.append(data[end + 1 : stop])
            self._notes.append(notes)
            at = stop
        self._rest = data[at:]
        if len(self._notes) > MAX_NOTES:
            self._notes = [b" ".join(self._notes)]
        if len(self._rest) > MAX_LINE_BYTES + MAX_PIECE_BYTES:
            raise UpstreamError("garbage", "a piece of a stream without an end")
        passed = shown[0] if len(shown) == 1 else b"".join(shown)
        self.complete = self.complete or passed.endswith(_DONE)
        return passed

    def end(self) -> None:
        """The engine has ended the stream. Raises UpstreamError if it did not finish it."""
        self.feed(b"")
        if not self.complete:
            raise UpstreamError("truncated", "the stream ended before its last event")

    def resume(self, elapsed_s: float) -> bytes:
        """What the next engine is told, as JSON. `elapsed_s`: since the request came."""
        said = {
            "id": self.answer_id,
            "created": self.created,
            "choices": self.choices(),
            "elapsed_s": round(elapsed_s, 3),
        }
        return msgspec.json.encode(said)

    def choices(self) -> dict[int, dict[str, Any]]:
        """By index: the tokens that were delivered, how many of the prompt's were cached, and whether that was all."""
        found: dict[int, dict[str, Any]] = {}
        for note in b" ".join(self._notes).split():
            index, _, tokens = note.partition(b"=")
            choice = found.setdefault(int(index), {"token_ids": [], "num_cached_tokens": 0, "finished": False})
            if tokens.endswith(b"."):
                tokens = tokens[:-1]
                choice["finished"] = True
            for token in tokens.split(b","):
                token_id, _, cached = token.partition(b"@")
                if cached and not choice["token_ids"]:
                    choice["num_cached_tokens"] = int(cached)
                if token_id:
                    choice["token_ids"].append(int(token_id))
        return found


def _line(line: bytes) -> tuple[bytes, bytes]:
    """The piece's length and its tokens."""
    if line.startswith(_IDS):
        length, _, notes = line[len(_IDS) :].partition(b" ")
        return length, notes
    if line.startswith(_HANDOVER):
        raise UpstreamError("handover", line[len(_HANDOVER) :].decode("latin-1")[:100])
    raise UpstreamError("garbage", f"a stream's piece begins with {line[:40]!r}")


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 8:
        raise UpstreamError("garbage", f"{digits[:40]!r} is not the length of a stream's piece")
    return int(digits)
