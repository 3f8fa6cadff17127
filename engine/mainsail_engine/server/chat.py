"""/v1/chat/completions: messages through the model's template, and the answer as OpenAI's objects or events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mainsail_engine.server.answers import Answer, collect, usage
from mainsail_engine.server.schemas import ChatCompletionRequest, Message
from mainsail_engine.server.serving import Delta, Job, Serving, merge
from mainsail_engine.server.streaming import DONE, EventStream, event, unless_disconnected


def as_template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """What templates read: text parts joined, developer as system, absent fields absent."""
    return [_as_template_message(message) for message in messages]


def _as_template_message(message: Message) -> dict[str, Any]:
    content = message.content
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": "\n".join(part.text for part in content) if isinstance(content, list) else content or "",
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [_as_template_call(call.model_dump()) for call in message.tool_calls]
    return plain


def _as_template_call(call: dict[str, Any]) -> dict[str, Any]:
    """Templates write arguments with tojson: give them the object, not its text (text that is no JSON stays text)."""
    function = call["function"]
    try:
        arguments = msgspec.json.decode(function["arguments"])
    except msgspec.DecodeError:
        arguments = function["arguments"]
    return {**call, "function": {**function, "arguments": arguments}}


async def chat_completion(serving: Serving, body: ChatCompletionRequest, request: Request) -> Response:
    """Everything that can be refused is refused here, before the first byte of the answer."""
    arrival_s = time.monotonic()
    serving.check_model(body.model)
    prompt = await serving.encode_chat(
        as_template_messages(body.messages),
        add_generation_prompt=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs,
    )
    newer = body.max_completion_tokens is not None
    asked = body.max_completion_tokens if newer else body.max_tokens
    max_tokens_param = "max_completion_tokens" if newer else "max_tokens"
    max_tokens = serving.check_length(prompt, asked, param="messages", max_tokens_param=max_tokens_param)
    jobs = serving.make_jobs(body, prompt, max_tokens)
    serving.admit(jobs, len(jobs))
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    if body.stream:
        return EventStream(_events(serving, body, jobs, head, arrival_s))
    return await unless_disconnected(request, _whole(serving, body, jobs, head, arrival_s))


async def _whole(
    serving: Serving, body: ChatCompletionRequest, jobs: list[Job], head: dict[str, Any], arrival_s: float
) -> Response:
    answers = await collect(merge([serving.generate(job, arrival_s) for job in jobs]), jobs)
    choices = [_choice(index, answer, body) for index, answer in enumerate(answers)]
    shown = {**head, "object": "chat.completion", "choices": choices, "usage": usage([jobs[0]], answers)}
    if body.return_token_ids:
        shown["prompt_token_ids"] = jobs[0].prompt_token_ids
    return Response(msgspec.json.encode(shown), media_type="application/json")


def _choice(index: int, answer: Answer, body: ChatCompletionRequest) -> dict[str, Any]:
    choice = {
        "index": index,
        "message": {"role": "assistant", "content": answer.text},
        "logprobs": None,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    return {**choice, "token_ids": answer.token_ids} if body.return_token_ids else choice


async def _events(
    serving: Serving, body: ChatCompletionRequest, jobs: list[Job], head: dict[str, Any], arrival_s: float
) -> AsyncGenerator[bytes, None]:
    """One event per step that has something to show; the first of each answer names the role."""
    head = {**head, "object": "chat.completion.chunk"}
    answers = [Answer() for _ in jobs]
    started: set[int] = set()
    async with aclosing(merge([serving.generate(job, arrival_s) for job in jobs])) as deltas:
        async for index, delta in deltas:
            answers[index].add(delta, keep_text=False)
            if index not in started:
                started.add(index)
                yield event({**head, "choices": [_first_choice(index)]})
            if delta.text or delta.finish_reason or body.return_token_ids:
                yield event({**head, "choices": [_delta_choice(index, delta, body)]})
    if body.stream_options is not None and body.stream_options.include_usage:
        yield event({**head, "choices": [], "usage": usage([jobs[0]], answers)})
    yield DONE


def _first_choice(index: int) -> dict[str, Any]:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _delta_choice(index: int, delta: Delta, body: ChatCompletionRequest) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "delta": {"content": delta.text} if delta.text else {},
        "logprobs": None,
        "finish_reason": delta.finish_reason,
    }
    if delta.finish_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    if body.return_token_ids:
        choice["token_ids"] = delta.token_ids
    return choice
