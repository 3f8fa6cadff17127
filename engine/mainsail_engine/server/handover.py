"""Answers that another replica can finish: token ids beside the text for the gateway, and the way back in.

**Out.** A gateway asks with `x-mainsail-stream: ids`. Each piece of the stream is then framed by an SSE comment, which
says how many bytes belong together and which tokens those bytes show:

    :ids 214 0=504@96,9106\\n        214 bytes follow; choice 0 got tokens 504 and 9106; 96 prompt tokens were cached
    data: {"id": …}\\n\\n
    :ids 251 0=30.\\n                 its last token: choice 0 is finished (`.`)
    data: {…, "finish_reason": "stop"}\\n\\n
    :ids 14\\n
    data: [DONE]\\n\\n
    :end\\n                          a stream without [DONE] (/v1/responses) is at its end
    :handover engine_failed\\n\\n      instead of an end: this engine cannot go on, another may

The gateway strips these lines without looking into the events, and keeps the ids.

**In.** When the engine breaks, the gateway sends the request again, to another: `x-mainsail-resume: N`, and in front of
the client's body N bytes of JSON (`Resume`): who the answer is, and what was delivered of it. The tokens become output
that the request has already generated, so that seeds, penalties, minima and limits count from the right place;
text, stop strings and parsers are brought to where they were by feeding them those tokens, whose events are dropped.
What follows is what the first engine would have sent. Usage counts the whole answer, since no one else will.

The resume is validated like a prompt, and can say nothing that a prompt of token ids could not; gateways strip the
headers from what clients send.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mainsail_engine.errors import RequestError
from mainsail_engine.server.errors import error_body, error_response
from mainsail_engine.server.serving import Delivered, Delta, Job, Serving
from mainsail_engine.server.streaming import DONE, event

STREAM_HEADER = "x-mainsail-stream"
RESUME_HEADER = "x-mainsail-resume"
ELSEWHERE = frozenset({"engine_failed", "shutting_down"})
"""Codes of errors that end an answer here and not at another engine."""
_SCOPE_KEY = "mainsail.resume"


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = False


class Resume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client has of an answer. Choices that are not named have not begun."""

    id: str
    created: int
    choices: dict[int, Choice]
    elapsed_s: float = 0.0
    """Since the request's arrival at the gateway; counts against its `timeout`."""

    def apply(self, jobs: list[Job], vocab_size: int) -> list[Job]:
        """The jobs as they stand after what was delivered. Raises RequestError for what cannot have been."""
        if not self.choices.keys() <= set(range(len(jobs))):
            raise _invalid(f"this request has {len(jobs)} choices")
        for index, choice in self.choices.items():
            _check(choice, jobs[index].params.max_tokens, vocab_size)
        return [self._apply(job, self.choices.get(index)) for index, job in enumerate(jobs)]

    def _apply(self, job: Job, choice: Choice | None) -> Job:
        timeout_s = None if job.timeout_s is None else max(job.timeout_s - self.elapsed_s, 0.001)
        if choice is None:
            return replace(job, timeout_s=timeout_s)
        delivered = Delivered(choice.token_ids, choice.num_cached_tokens, choice.finished)
        return replace(job, timeout_s=timeout_s, delivered=delivered)


def _check(choice: Choice, max_tokens: int, vocab_size: int) -> None:
    length = len(choice.token_ids)
    if length > max_tokens or (length == max_tokens and not choice.finished):
        raise _invalid(f"{length} tokens were delivered of at most {max_tokens}")
    if not all(0 <= token < vocab_size for token in choice.token_ids):
        raise _invalid("a token id is not in the vocabulary")


def _invalid(message: str) -> RequestError:
    return RequestError(f"{RESUME_HEADER}: {message}", param=RESUME_HEADER, code="invalid_resume")


class ResumedBody:
    """Pure ASGI middleware: takes the resume from the front of the body; the application reads the client's own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sizes = [value for name, value in scope.get("headers", ()) if name == RESUME_HEADER.encode()]
        if scope["type"] != "http" or not sizes:
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        try:
            scope[_SCOPE_KEY] = _decode(sizes[0], body)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        rest: list[Message] = [{"type": "http.request", "body": body[int(sizes[0]) :], "more_body": False}]

        async def own_body() -> Message:
            return rest.pop() if rest else await receive()

        await self._app(scope, own_body, send)


async def _read(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _decode(size: bytes, body: bytes) -> Resume:
    if not size.isdigit() or not 0 < int(size) <= len(body):
        raise _invalid("must be the length in bytes of what precedes the body")
    try:
        return msgspec.json.decode(body[: int(size)], type=Resume)
    except msgspec.DecodeError as error:
        raise _invalid(str(error)) from None


@dataclass(frozen=True, slots=True)
class Identity:
    """What all chunks of an answer have in common."""

    id: str
    created: int
    """Seconds since the epoch."""


def is_resumed(request: Request) -> bool:
    """Whether the request brings what was delivered of its answer elsewhere."""
    return _SCOPE_KEY in request.scope


def take_over(request: Request, jobs: list[Job], vocab_size: int, *, stream: bool) -> tuple[list[Job], Identity | None]:
    """The jobs after what the gateway says was delivered, and the answer's identity; as they are without a resume.

    Raises RequestError for a resume that does not fit the request."""
    resume: Resume | None = request.scope.get(_SCOPE_KEY)
    if resume is None:
        return jobs, None
    if not stream:
        raise _invalid("only a stream can be resumed")
    if any(job.params.prompt_logprobs is not None for job in jobs):
        raise _invalid("what was told of the prompt would be told again")
    return resume.apply(jobs, vocab_size), Identity(resume.id, resume.created)


class Ledger:
    """Which tokens the events show: sees the deltas go in (`note`) and the events come out (`frames`).

    It relies on one thing: what noted deltas make visible comes out as one piece, before the next are noted.
    """

    def __init__(self, *, framed: bool) -> None:
        self.framed = framed
        self._notes: list[str] = []
        self._known: set[int] = set()
        """Choices whose cached tokens were told."""

    @classmethod
    def of(cls, request: Request, jobs: list[Job]) -> Ledger:
        """Log-probabilities of the prompt come once, and would come again from the next engine: no side form then."""
        whole = any(job.params.prompt_logprobs is not None for job in jobs)
        return cls(framed=request.headers.get(STREAM_HEADER) == "ids" and not whole)

    def headers(self, answer: Identity) -> dict[str, str]:
        """For the answer's head: that it is framed, and who it is."""
        return {STREAM_HEADER: f"ids id={answer.id} created={answer.created}"} if self.framed else {}

    def note(self, deltas: list[tuple[int, Delta]]) -> list[tuple[int, Delta]]:
        if self.framed:
            for index, delta in deltas:
                self._note(index, delta)
        return deltas

    async def frames(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The events, framed if the gateway wants them so; errors among them."""
        data = b""
        try:
            async with aclosing(events):
                async for data in events:
                    yield self._frame(data)
            if self.framed and not data.endswith(DONE):
                yield b":end\n"
        except RequestError as error:
            if not self.framed:
                raise
            if self.hands_over(error):
                yield f":handover {error.code}\n\n".encode()
            else:
                yield self._frame(event(error_body(error)) + DONE)

    def hands_over(self, error: RequestError) -> bool:
        """Whether the answer ends here and goes on at another engine."""
        return self.framed and error.code in ELSEWHERE

    def _note(self, index: int, delta: Delta) -> None:
        ids = [str(token) for token in delta.token_ids]
        if ids and index not in self._known:
            self._known.add(index)
            ids[0] += f"@{delta.num_cached_tokens}"
        self._notes.append(f" {index}={','.join(ids)}{'.' if delta.finish_reason is not None else ''}")

    def _frame(self, data: bytes) -> bytes:
        if not self.framed:
            return data
        notes, self._notes = "".join(self._notes), []
        return f":ids {len(data)}{notes}\n".encode() + data


class Chunks(Protocol):
    """How an API writes its answers as events."""

    def of(self, index: int, delta: Delta) -> bytes:
        """What a delta of that choice shows; nothing, if it shows nothing yet."""
        ...

    def last(self) -> bytes:
        """The end of the stream."""
        ...


async def pieces(
    serving: Serving, jobs: list[Job], chunks: Chunks, arrival_s: float, ledger: Ledger
) -> AsyncGenerator[bytes, None]:
    """A stream's events. What a step brought all answers leaves as one piece; what was delivered is not repeated."""
    async with serving.answer(jobs, arrival_s) as answering:
        for index, delta in answering.replayed:
            chunks.of(index, delta)
        while deltas := ledger.note(await answering.next()):
            data = b"".join([chunks.of(index, delta) for index, delta in deltas])
            if data:
                yield data
    yield chunks.last()
