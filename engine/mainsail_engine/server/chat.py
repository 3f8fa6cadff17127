"""/v1/chat/completions: messages through the model's template, and the answer as OpenAI's objects or events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mainsail_engine.server.answers import Answer, collect, usage
from mainsail_engine.server.handover import Identity, Ledger, take_over
from mainsail_engine.server.logprobs import TokenTexts, chat_logprobs, prompt_logprobs
from mainsail_engine.server.schemas import ChatCompletionRequest, Message
from mainsail_engine.server.serving import Delta, Job, Serving
from mainsail_engine.server.streaming import DONE, ChunkWriter, EventStream, unless_disconnected


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
    jobs = await _jobs(serving, body)
    jobs, resumed = take_over(request, jobs, serving.ready.vocab_size, stream=body.stream)
    serving.admit(jobs, len(jobs))
    answer = resumed or Identity(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()))
    head = {"id": answer.id, "created": answer.created, "model": body.model}
    if body.stream:
        ledger = Ledger.of(request, jobs)
        events = _events(serving, body, jobs, head, arrival_s, ledger)
        return EventStream(ledger.frames(events), ledger.headers(answer))
    return await unless_disconnected(request, _whole(serving, body, jobs, head, arrival_s))


async def _jobs(serving: Serving, body: ChatCompletionRequest) -> list[Job]:
    prompt = await serving.encode_chat(
        as_template_messages(body.messages),
        add_generation_prompt=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs,
    )
    if body.truncate_prompt_tokens is not None:
        prompt = prompt[-body.truncate_prompt_tokens :]
    newer = body.max_completion_tokens is not None
    asked = body.max_completion_tokens if newer else body.max_tokens
    max_tokens_param = "max_completion_tokens" if newer else "max_tokens"
    max_tokens = serving.check_length(prompt, asked, param="messages", max_tokens_param=max_tokens_param)
    logprobs = body.top_logprobs or 0 if body.logprobs else None
    return serving.make_jobs(body, prompt, max_tokens, logprobs=logprobs, prompt_logprobs=body.prompt_logprobs)


async def _whole(
    serving: Serving, body: ChatCompletionRequest, jobs: list[Job], head: dict[str, Any], arrival_s: float
) -> Response:
    answers = await collect(serving, jobs, arrival_s)
    texts = TokenTexts(serving.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
    choices = [_choice(index, answer, body, texts) for index, answer in enumerate(answers)]
    shown = {**head, "object": "chat.completion", "choices": choices, "usage": usage([jobs[0]], answers)}
    if body.return_token_ids:
        shown["prompt_token_ids"] = jobs[0].prompt_token_ids
    if body.prompt_logprobs is not None:
        shown["prompt_logprobs"] = prompt_logprobs(answers[0].prompt_logprobs, texts)
    return Response(msgspec.json.encode(shown), media_type="application/json")


def _choice(index: int, answer: Answer, body: ChatCompletionRequest, texts: TokenTexts) -> dict[str, Any]:
    choice = {
        "index": index,
        "message": {"role": "assistant", "content": answer.text},
        "logprobs": chat_logprobs(answer.logprobs, texts) if body.logprobs else None,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    return {**choice, "token_ids": answer.token_ids} if body.return_token_ids else choice


class _Chunks:
    """The events of one streamed chat: one for each delta that has something to show, the role before the first."""

    def __init__(self, serving: Serving, body: ChatCompletionRequest, jobs: list[Job], head: dict[str, Any]) -> None:
        self._body, self._jobs = body, jobs
        self._texts = TokenTexts(serving.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._writer = ChunkWriter(
            {**head, "object": "chat.completion.chunk"},
            opening=b'"delta":{"content":', closing=b'},"logprobs":null,"finish_reason":null',
        )  # fmt: skip
        self._answers = [Answer() for _ in jobs]
        self._started = [False] * len(jobs)
        options = body.stream_options
        self._continuous = options is not None and options.continuous_usage_stats
        self._plain = not (body.return_token_ids or body.logprobs or self._continuous)

    def of(self, index: int, delta: Delta) -> bytes:
        self._answers[index].add(delta, keep_text=False)
        started, self._started[index] = self._started[index], True
        first = b"" if started else self._writer.choice(_first_choice(index))
        if self._plain and delta.finish_reason is None:
            return first + self._writer.text(index, delta.text) if delta.text else first
        if delta.text or delta.finish_reason or delta.token_ids:
            return first + self._writer.choice(self._choice(index, delta), **self._usage())
        return first

    def _usage(self) -> dict[str, Any]:
        return {"usage": usage([self._jobs[0]], self._answers)} if self._continuous else {}

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": chat_logprobs(delta.logprobs, self._texts) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def last(self) -> bytes:
        options = self._body.stream_options
        if options is None or not options.include_usage:
            return DONE
        return self._writer.no_choice(usage=usage([self._jobs[0]], self._answers)) + DONE


async def _events(
    serving: Serving, body: ChatCompletionRequest, jobs: list[Job], head: dict[str, Any], arrival_s: float,
    ledger: Ledger,
) -> AsyncGenerator[bytes, None]:  # fmt: skip
    """What a step brought all answers leaves as one piece."""
    chunks = _Chunks(serving, body, jobs, head)
    async with serving.answer(jobs, arrival_s) as answering:
        for index, delta in answering.replayed:
            chunks.of(index, delta)
        while deltas := ledger.note(await answering.next()):
            data = b"".join([chunks.of(index, delta) for index, delta in deltas])
            if data:
                yield data
    yield chunks.last()


def _first_choice(index: int) -> dict[str, Any]:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
