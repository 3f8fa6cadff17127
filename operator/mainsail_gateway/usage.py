"""What an answer has used, from its last bytes.

Engines say it in `usage`, in the last event of a stream (if asked for) or at the end of a whole answer. So only the
tail of what passes is kept, and searched once, at the end; nothing is parsed on the way. Where an answer says
nothing, its events are counted instead: an engine sends one for each token or few, and the prompt is what it was
estimated to be.
"""

import re

import msgspec

from mainsail_gateway.asgi import Message, Send

_TAIL_BYTES = 16384
"""A response says its metadata after its usage."""
_USAGE = re.compile(rb'"usage"\s*:\s*(\{(?:[^{}]|\{[^{}]*\})*\})')

_FAILED = b'data: {"error"'
"""The event of a stream that nobody could finish."""


class _Said(msgspec.Struct):
    """Chat and completions say prompt and completion, responses say input and output."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class Usage:
    """Watches one answer go by."""

    def __init__(self, prompt_estimate: int) -> None:
        self._prompt = prompt_estimate
        self._tail = b""
        self._last = b""
        self._events = 0
        self._said: _Said | None = None

    def meter(self, send: Send) -> Send:
        """`send`, watched."""

        async def watched(message: Message) -> None:
            body: bytes = message.get("body", b"")
            if body:
                self.feed(body)
            await send(message)

        return watched

    def feed(self, data: bytes) -> None:
        self._events += data.count(b"data: ") - data.count(_FAILED)
        self._tail, self._last = self._last, data

    @property
    def streamed(self) -> bool:
        """Something of a stream's answer has passed."""
        return self._events > 0

    def _found(self) -> _Said | None:
        if self._said is None:
            for text in reversed(_USAGE.findall((self._tail + self._last)[-_TAIL_BYTES:])):
                try:
                    self._said = msgspec.json.decode(text, type=_Said)
                    break
                except msgspec.DecodeError:
                    continue
        return self._said

    @property
    def prompt(self) -> int:
        found = self._found()
        return max(found.prompt_tokens, found.input_tokens) if found else self._prompt

    @property
    def completion(self) -> int:
        found = self._found()
        return max(found.completion_tokens, found.output_tokens) if found else self._events

    @property
    def total(self) -> int:
        return self.prompt + self.completion
