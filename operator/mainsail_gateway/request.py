"""What the gateway reads of a request's body: which model, and what the balancer wants to know. No more.

One pass of msgspec over the body checks that it is JSON and picks a few top-level fields; everything else is skipped,
and the body goes on to the engine unchanged, byte for byte. The engine validates the rest: one place owns the schema.
"""

import hashlib
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    cache_salt: Any = None
    timeout: Any = None
    response_format: msgspec.Raw = _RAW_EMPTY
    user: Any = None


class Chain(NamedTuple):
    """A request as a link of its conversation."""

    keys: tuple[bytes, ...]
    """Hashes of all messages up to the first that is not the system's, and to each after it; or of its name alone."""
    tokens: int
    """Its prompt's."""
    shared: bytes = b""
    """Hash of what conversations have in common: tools and system prompt."""
    shared_tokens: int = 0


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
    system: bytes = b""
    """The beginning of the prompt that is not one conversation's own: tools and the system's messages."""
    messages: tuple[bytes, ...] = ()
    """Those after it, one by one."""
    cache_salt: str = ""
    """What keeps the client's KV apart from that of others with the same prompts."""
    continued: bool = False
    """Somebody has answered in this conversation before."""

    def chain(self, name: str | None) -> Chain | None:
        """Its conversation, by the name that its client gives it, or by its messages; None: it has none."""
        digest = hashlib.blake2b(self.system, digest_size=8, person=b"chain")
        shared, system_tokens = digest.digest(), len(self.system) // BYTES_PER_TOKEN
        keys: list[bytes] = []
        if name is not None:
            keys.append(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, person=b"name").digest())
        else:
            for message in self.messages:
                digest.update(message)
                keys.append(digest.digest())
        return Chain(tuple(keys), self.prompt_tokens, shared, system_tokens) if keys else None


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
    system, messages, continued = _conversation(fields.messages if bytes(fields.messages) else fields.input)
    system = bytes(fields.tools) + system
    prompt = b"".join(bytes(part) for part in (fields.tools, fields.messages, fields.prompt, fields.input))
    return Parsed(
        model=fields.model,
        stream=fields.stream is True,
        weight=len(prompt) // BYTES_PER_TOKEN + _answer_tokens(fields),
        prompt_tokens=len(prompt) // BYTES_PER_TOKEN,
        prompt=prompt,
        anchor=b"".join((system, *messages[:1])),
        system=system,
        messages=tuple(messages),
        continued=continued,
        cache_salt=fields.cache_salt if isinstance(fields.cache_salt, str) else "",
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


def _conversation(turns: msgspec.Raw) -> tuple[bytes, list[bytes], bool]:
    """The system's messages, those after them, and whether one is an answer. Odd ones are none: the engine judges."""
    parts: list[bytes] = []
    system = -1
    continued = False
    try:
        for raw in _messages.decode(turns):
            role = _message.decode(raw).role
            if system < 0 and role not in ("system", "developer"):
                system = len(parts)
            continued = continued or role == "assistant"
            parts.append(bytes(raw))
    except (msgspec.DecodeError, RecursionError):
        return b"", [], False
    return (b"".join(parts[:system]), parts[system:], continued) if system >= 0 else (b"", [], False)


def _positive(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        return None
    return float(min(value, sys.maxsize))  # JSON's whole numbers have no end


def _answer_tokens(fields: _Body) -> int:
    for limit in (fields.max_completion_tokens, fields.max_tokens):
        if isinstance(limit, int) and limit > 0:
            return min(limit, MAX_ANSWER_TOKENS)
    return DEFAULT_ANSWER_TOKENS
