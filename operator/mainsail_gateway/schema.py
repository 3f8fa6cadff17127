"""Whether an answer is what its request asked for: JSON, of the schema, with arguments that its tools take. Pure.

Validation is jsonschema-rs: schemas come from clients, and its patterns run in linear time; what a schema refers to
outside of itself is never fetched.
"""

from collections.abc import Callable
from typing import Any

import jsonschema_rs
import msgspec

Check = Callable[[bytes], bool]


class _Function(msgspec.Struct):
    name: str = ""
    arguments: str = ""


class _ToolCall(msgspec.Struct):
    function: _Function = msgspec.field(default_factory=_Function)


class _Message(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    message: _Message = msgspec.field(default_factory=_Message)


class _Answer(msgspec.Struct):
    choices: list[_Choice]


class _Named(msgspec.Struct):
    name: str = ""
    parameters: Any = None
    schema: Any = None


class _Tool(msgspec.Struct):
    function: _Named = msgspec.field(default_factory=_Named)


class _Format(msgspec.Struct):
    type: str = "text"
    json_schema: _Named | None = None


class _Asked(msgspec.Struct):
    response_format: _Format | None = None
    tools: list[_Tool] | None = None


def check(body: bytes) -> Check | None:
    """What an answer to this request has to pass; None: anything will do, or the request is for the engine to judge."""
    try:
        asked = msgspec.json.decode(body, type=_Asked)
        wanted = _content(asked.response_format)
        tools = {tool.function.name: _validator(tool.function.parameters) for tool in asked.tools or []}
    except (msgspec.DecodeError, ValueError):
        return None
    if wanted is None and not tools:
        return None
    return lambda answer: _passes(answer, wanted, tools)


def _content(wanted: _Format | None) -> Callable[[Any], bool] | None:
    if wanted is None or wanted.type == "text":
        return None
    return _validator(wanted.json_schema.schema if wanted.json_schema else {"type": "object"})


def _validator(schema: Any) -> Callable[[Any], bool]:
    """Raises ValueError for what is no schema."""
    if schema is None:
        return lambda value: True
    options = jsonschema_rs.RegexOptions()
    return jsonschema_rs.validator_for(schema, offline=True, pattern_options=options).is_valid


def _passes(answer: bytes, wanted: Callable[[Any], bool] | None, tools: dict[str, Callable[[Any], bool]]) -> bool:
    try:
        choices = msgspec.json.decode(answer, type=_Answer).choices
        for message in (choice.message for choice in choices):
            calls = message.tool_calls or []
            for call in (call.function for call in calls):
                if call.name not in tools or not tools[call.name](msgspec.json.decode(call.arguments)):
                    return False
            if wanted is not None and not calls and not wanted(msgspec.json.decode(message.content or "")):
                return False
    except (msgspec.DecodeError, ValueError):
        return False
    return True
