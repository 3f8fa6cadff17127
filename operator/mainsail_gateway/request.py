"""What the gateway reads of a request's body: which model, and what the balancer wants to know. No more.

One pass of msgspec over the body checks that it is JSON and picks a few top-level fields; everything else is skipped,
and the body goes on to the engine unchanged, byte for byte. The engine validates the rest: one place owns the schema.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from mainsail_gateway.errors import bad_request

BYTES_PER_TOKEN = 4
"""Rough, for English and JSON; the weights of balance.py only need to be comparable with one another."""
DEFAULT_ANSWER_TOKENS = 256
"""What an answer is taken to cost when the client sets no limit."""
MAX_ANSWER_TOKENS = 4096
"""Clients set generous limits and seldom reach them; a limit must not make one request look like fifty."""

_RAW_EMPTY = msgspec.Raw()


class _Body(msgspec.Struct):
    model: Any = msgspec.UNSET
    stream: Any = False
    max_tokens: Any = None
    max_completion_tokens: Any = None
    tools: msgspec.Raw = _RAW_EMPTY
    messages: msgspec.Raw = _RAW_EMPTY
    prompt: msgspec.Raw = _RAW_EMPTY
    input: msgspec.Raw = _RAW_EMPTY
    prompt_cache_key: Any = None
    timeout: Any = None
    response_format: msgspec.Raw = _RAW_EMPTY
    user: Any = None


@dataclass(frozen=True, slots=True)
class Parsed:
    model: str
    stream: bool
    weight: int
    """What the request is expected to cost, in tokens: its prompt's and its answer's."""
    prompt: bytes
    """The JSON text of the prompt, tools first, as chat templates render them. Equal prefixes here are (nearly
    always) equal prefixes of tokens in the engine."""
    anchor: bytes
    """Its beginning that all turns of a conversation share: up to the first message that is not the system's."""
    prompt_tokens: int
    """The prompt's part of that."""
    session: str | None
    """What the client calls the conversation (`prompt_cache_key`, `user`), if it says."""
    tools: bool = False
    """Whether it offers tools."""
    structured: bool = False
    """Whether it asks for JSON."""
    timeout_s: float | None = None
    """How long the client wants to wait for the whole answer (`timeout`). The engine judges odd values."""


_decoder = msgspec.json.Decoder(_Body)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def parse(body: bytes) -> Parsed:
    """Read a body. Raises a 400 that names the field."""
    if not body:
        raise bad_request("The request has no body; a JSON object with a `model` is needed.", param=None)
    try:
        fields = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise bad_request(f"The request's body is not a valid JSON object: {error}", param=None) from None
    if fields.model is msgspec.UNSET or fields.model is None:
        raise bad_request("`model` is missing.", param="model", code="missing_required_parameter")
    if not isinstance(fields.model, str) or not fields.model:
        raise bad_request("`model` must be a non-empty string.", param="model", code="invalid_type")
    prompt = b"".join(bytes(part) for part in (fields.tools, fields.messages, fields.prompt, fields.input))
    return Parsed(
        model=fields.model,
        stream=fields.stream is True,
        weight=len(prompt) // BYTES_PER_TOKEN + _answer_tokens(fields),
        prompt_tokens=len(prompt) // BYTES_PER_TOKEN,
        prompt=prompt,
        anchor=bytes(fields.tools) + _anchor(fields.messages),
        session=next((name for name in (fields.prompt_cache_key, fields.user) if isinstance(name, str) and name), None),
        tools=b"{" in bytes(fields.tools),
        structured=b"json" in bytes(fields.response_format),
        timeout_s=_positive(fields.timeout),
    )


def renamed(body: bytes, model: str) -> bytes:
    """The same body for another model. The other fields stay as they are, byte for byte."""
    fields = _fields.decode(body)
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


class _Message(msgspec.Struct):
    role: Any = None


_messages = msgspec.json.Decoder(list[msgspec.Raw])
_message = msgspec.json.Decoder(_Message)


def _anchor(messages: msgspec.Raw) -> bytes:
    """The system's messages and the first after them. Odd ones have none: the engine judges them."""
    parts: list[bytes] = []
    try:
        for raw in _messages.decode(messages):
            parts.append(bytes(raw))
            if _message.decode(raw).role not in ("system", "developer"):
                return b"".join(parts)
    except (msgspec.DecodeError, RecursionError):
        return b""
    return b""


def _positive(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def _answer_tokens(fields: _Body) -> int:
    for limit in (fields.max_completion_tokens, fields.max_tokens):
        if isinstance(limit, int) and limit > 0:
            return min(limit, MAX_ANSWER_TOKENS)
    return DEFAULT_ANSWER_TOKENS
