"""/v1/responses: OpenAI's newer form of a chat, on the same road: it becomes a chat request, and events become items.

    request ──▶ ChatCompletionRequest ──▶ Plan ──▶ deltas ──▶ events ──▶ OutputItems ──▶ response, or its stream

Nothing is stored: a conversation travels as `input`, so any replica may serve its next turn, and
`previous_response_id` is refused by name.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import msgspec
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from mainsail_engine.errors import RequestError
from mainsail_engine.request import FinishReason
from mainsail_engine.server.answers import Answer, usage
from mainsail_engine.server.chat import Plan, plan_chat
from mainsail_engine.server.errors import from_validation
from mainsail_engine.server.handover import Identity, Ledger, take_over
from mainsail_engine.server.middleware import arrival_s
from mainsail_engine.server.output_items import OutputItems
from mainsail_engine.server.response_schemas import (
    AllowedTools,
    FunctionCallItem,
    FunctionCallOutput,
    InputItem,
    InputText,
    NamedTool,
    ReasoningItem,
    ResponsesRequest,
    ResponseToolChoice,
    SchemaFormat,
)
from mainsail_engine.server.schemas import ChatCompletionRequest
from mainsail_engine.server.serving import Delta, Serving
from mainsail_engine.server.streaming import EventStream, unless_disconnected, while_connected
from mainsail_engine.server.tools.events import Content, Event, tell_of_call

_FIELDS = {
    "messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}  # fmt: skip
"""Fields of the chat that it becomes, by the names that this API has for them."""


async def create_response(serving: Serving, body: ResponsesRequest, request: Request) -> Response:
    """Everything that can be refused is refused here, before the first byte of the answer."""
    arrived_s = arrival_s(request.scope)
    serving.check_model(body.model)
    serving.check_generates()
    serving.check_open()
    try:
        chat = ChatCompletionRequest.model_validate(as_chat(body))
        plan, grammar = await plan_chat(serving, chat)
        if grammar is not None:
            compiling = serving.compile(grammar[0], param=grammar[1], timeout_s=body.timeout)
            if not await while_connected(request, compiling):
                return Response(status_code=499)
    except ValidationError as error:
        raise _renamed(from_validation(error.errors())) from error
    except RequestError as error:
        raise _renamed(error) from error
    jobs, resumed = take_over(request, plan.jobs, serving.ready.vocab_size, stream=bool(body.stream))
    plan = replace(plan, jobs=jobs)
    serving.admit(jobs, 1)
    answer = resumed or Identity(f"resp_{uuid.uuid4().hex}", int(time.time()))
    running = _Running(serving, body, chat, plan, arrived_s, answer)
    if body.stream:
        ledger = Ledger.of(request, jobs)
        events = running.events(ledger, begun=resumed is not None)
        return EventStream(ledger.frames(events), ledger.headers(answer))
    return await unless_disconnected(request, running.whole())


def _renamed(error: RequestError) -> RequestError:
    """The same, told by this API's names."""
    if error.param is not None:
        first, dot, rest = error.param.partition(".")
        error.param = _FIELDS.get(first, first) + dot + rest
    return error


# -- the request as a chat ---------------------------------------------------------------------------------------------


def as_chat(body: ResponsesRequest) -> dict[str, Any]:
    """The chat request that asks for the same."""
    plain = {
        "model": body.model,
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": body.seed,
        "user": body.user,
        "priority": body.priority,
        "cache_salt": body.cache_salt,
        "timeout": body.timeout,
        "chat_template_kwargs": body.chat_template_kwargs,
        "parallel_tool_calls": body.parallel_tool_calls,
        "tools": [_tool(tool.model_dump(exclude_none=True)) for tool in body.tools or ()] or None,
        "tool_choice": _tool_choice(body.tool_choice),
        "reasoning_effort": body.reasoning.effort if body.reasoning is not None else None,
        "response_format": _response_format(body),
    }  # fmt: skip
    return {key: value for key, value in plain.items() if value is not None}


def _tool_choice(choice: ResponseToolChoice | None) -> Any:
    if isinstance(choice, NamedTool):
        return _tool(choice.model_dump())
    if isinstance(choice, AllowedTools):
        tools = [_tool(tool.model_dump()) for tool in choice.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return choice


def _tool(flat: dict[str, Any]) -> dict[str, Any]:
    """Chat has the function in an object of its own."""
    return {"type": "function", "function": {key: value for key, value in flat.items() if key != "type"}}


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    form = body.text.format if body.text is not None else None
    if not isinstance(form, SchemaFormat):
        return None if form is None else {"type": form.type}
    described = {"name": form.name, "description": form.description, "schema": form.definition, "strict": form.strict}
    return {"type": "json_schema", "json_schema": described}


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        _add(messages, item)
    return messages


def _add(messages: list[dict[str, Any]], item: InputItem) -> None:
    """An assistant's reasoning, text and calls are one message of a chat."""
    if isinstance(item, FunctionCallOutput):
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
    elif isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        calls = _assistant(messages).setdefault("tool_calls", [])
        calls.append({"id": item.call_id, "type": "function", "function": function})
    elif isinstance(item, ReasoningItem):
        parts = item.content or item.summary or []
        messages.append(
            {"role": "assistant", "reasoning_content": "\n".join(part.text for part in parts), "content": ""}
        )
    elif item.role == "assistant":
        message = _assistant(messages)
        message["content"] = message["content"] + _text(item.content)
    else:
        messages.append({"role": item.role, "content": _text(item.content)})


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message that the conversation ends with, maybe a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


# -- the answer --------------------------------------------------------------------------------------------------------


class _Running:
    """One response in the making."""

    def __init__(
        self,
        serving: Serving,
        body: ResponsesRequest,
        chat: ChatCompletionRequest,
        plan: Plan,
        arrived_s: float,
        answer: Identity,
    ) -> None:
        self._serving, self._body, self._plan, self._arrived_s = serving, body, plan, arrived_s
        self._id, self._created_s = answer.id, answer.created
        self._answer = Answer(reader=plan.readers(serving, chat)[0])
        self._items = OutputItems(self._id)
        self._count = 0

    async def whole(self) -> Response:
        async with self._serving.answer(self._plan.jobs, self._arrived_s, whole=True) as answering:
            for _, delta in await answering.next():
                self._take(delta)
        return Response(msgspec.json.encode(self._shown(self._status())), media_type="application/json")

    async def events(self, ledger: Ledger, *, begun: bool) -> AsyncGenerator[bytes, None]:
        """begun: another engine has told of the beginning. Events are numbered on from what it must have told; where it
        had told of several tokens at once, some numbers are left out."""
        shown = self._shown("in_progress")
        first = self._event("response.created", response=shown) + self._event("response.in_progress", response=shown)
        if not begun:
            yield first
        try:
            async with self._serving.answer(self._plan.jobs, self._arrived_s) as answering:
                for _, delta in answering.replayed:
                    self._told(delta)
                while deltas := ledger.note(await answering.next()):
                    data = b"".join([self._told(delta) for _, delta in deltas])
                    if data:
                        yield data
        except RequestError as error:
            if ledger.hands_over(error):
                raise
            told = {"code": error.code or "server_error", "message": error.message}
            yield self._event("error", **told, param=error.param)
            yield self._event("response.failed", response=self._shown("failed") | {"error": told})
            return
        status = self._status()
        yield self._event(f"response.{status}", response=self._shown(status))

    def _told(self, delta: Delta) -> bytes:
        return b"".join([self._event(kind, **fields) for kind, fields in self._take(delta)])

    def _take(self, delta: Delta) -> list[tuple[str, dict[str, Any]]]:
        """The events that a piece of the answer makes."""
        read: list[Event] = self._answer.add(delta, keep_text=False)
        self._count_parsed(read, last=delta.finish_reason is not None)
        if self._answer.reader is None and delta.text:
            read = [Content(delta.text)]
        shown = self._items.feed(read)
        return (
            shown if delta.finish_reason is None else shown + self._items.close(complete=self._status() == "completed")
        )

    def _count_parsed(self, read: list[Event], *, last: bool) -> None:
        """A whole answer counts once, at its end."""
        if self._plan.tool_names is None or not (self._body.stream or last):
            return
        calls = self._answer.reader.num_calls if self._answer.reader is not None else 0
        called, mode = (tell_of_call(read), "streaming") if self._body.stream else (calls > 0, "non_streaming")
        self._serving.metrics.tools_parsed(mode=mode, called=called, request_type="responses")

    def _status(self) -> str:
        return "incomplete" if self._answer.finish_reason is FinishReason.LENGTH else "completed"

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, **fields, "sequence_number": self._count}
        self._count += 1
        return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"

    def _shown(self, status: str) -> dict[str, Any]:
        body, text = self._body, self._body.text
        form = {"type": "text"} if text is None or text.format is None else text.format.model_dump(by_alias=True)
        choice = "auto" if body.tool_choice is None else body.tool_choice
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": self._items.items if status != "in_progress" else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": form},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if status in ("completed", "incomplete") else None,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def _usage(self) -> dict[str, Any]:
        counted = usage(self._plan.jobs, [self._answer])
        return {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": counted["prompt_tokens_details"],
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._answer.num_reasoning_tokens},
            "total_tokens": counted["total_tokens"],
        }
