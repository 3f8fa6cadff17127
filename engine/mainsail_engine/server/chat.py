"""/v1/chat/completions: messages through the model's template, and the answer as OpenAI's objects or events."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mainsail_engine.request import FinishReason
from mainsail_engine.server.answer_format import AnswerReader
from mainsail_engine.server.answers import Answer, PromptFirst, collect, usage
from mainsail_engine.server.constraints import callable_names, chat_grammar, content_grammar
from mainsail_engine.server.handover import Identity, Ledger, is_resumed, pieces, take_over
from mainsail_engine.server.logprobs import TokenTexts, chat_logprobs, prompt_logprobs
from mainsail_engine.server.message import MessageDeltas, message_of
from mainsail_engine.server.middleware import arrival_s
from mainsail_engine.server.schemas import ChatCompletionRequest, Message, NamedChoice, ToolChoice
from mainsail_engine.server.serving import Delta, Job, Serving
from mainsail_engine.server.streaming import DONE, ChunkWriter, EventStream, unless_disconnected, while_connected
from mainsail_engine.server.told_blocks import blocks_header
from mainsail_engine.server.tools.events import tell_of_call
from mainsail_engine.structured.grammar import Grammar

PROMPT_END_CHARS = 64
"""Enough to see whether the template has opened the model's reasoning."""


def as_template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """What templates read: text parts joined, developer as system, absent fields absent."""
    return [_as_template_message(message) for message in messages]


def _as_template_message(message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text(),
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    reasoning = message.reasoning_content or message.reasoning
    if reasoning is not None:
        plain["reasoning_content"] = reasoning
    if message.tool_calls:
        plain["tool_calls"] = [_as_template_call(call.model_dump()) for call in message.tool_calls]
    return plain


def _as_template_call(call: dict[str, Any]) -> dict[str, Any]:
    """Templates write arguments with tojson: give them the object, not its text (what is no JSON, or none that anybody
    could write out again, stays text)."""
    function = call["function"]
    try:
        arguments = msgspec.json.decode(function["arguments"])
    except (msgspec.DecodeError, RecursionError):
        arguments = function["arguments"]
    return {**call, "function": {**function, "arguments": arguments}}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be generated for one chat request, and how it is read."""

    jobs: list[Job]
    prompt_end: str
    """The last characters of the prompt."""
    tool_names: frozenset[str] | None
    """Tools that may be called; None: none may."""

    def readers(self, serving: Serving, body: ChatCompletionRequest) -> list[AnswerReader | None]:
        """One for each answer."""
        one_call = body.parallel_tool_calls is False
        form = serving.answer_format
        return [form.reader(self.tool_names, self.prompt_end, one_call=one_call) for _ in self.jobs]


async def chat_completion(serving: Serving, body: ChatCompletionRequest, request: Request) -> Response:
    """Everything that can be refused is refused here, before the first byte of the answer."""
    arrived_s = arrival_s(request.scope)
    serving.check_model(body.model)
    serving.check_generates()
    serving.check_open()
    if not is_resumed(request):
        serving.check_room()
    plan, grammar = await plan_chat(serving, body)
    if grammar is not None:
        compiling = serving.compile(grammar[0], param=grammar[1], timeout_s=body.timeout)
        if not await while_connected(request, compiling):
            return Response(status_code=499)
    jobs, resumed = take_over(request, plan.jobs, serving.ready.vocab_size, stream=body.stream)
    plan = replace(plan, jobs=jobs)
    serving.admit(jobs, len(jobs))
    answer = resumed or Identity(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()))
    head = {"id": answer.id, "created": answer.created, "model": body.model}
    if body.stream:
        ledger = Ledger.of(request, jobs)
        events = pieces(serving, plan.jobs, _Chunks(serving, body, plan, head), arrived_s, ledger)
        return EventStream(ledger.frames(events), ledger.headers(answer) | blocks_header(request, jobs))
    whole = await unless_disconnected(request, _whole(serving, body, plan, head, arrived_s))
    whole.headers.update(blocks_header(request, jobs))
    return whole


async def plan_chat(serving: Serving, body: ChatCompletionRequest) -> tuple[Plan, tuple[Grammar, str] | None]:
    """The jobs, and the grammar that they need compiled (with the field that asks for it). Raises RequestError."""
    choice = body.tool_choice or ("auto" if body.tools else "none")
    tools = (body.tools or []) if choice != "none" else []
    text = serving.render_chat(
        as_template_messages(body.messages),
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        variables={**serving.effort(body.reasoning_effort), **(body.chat_template_kwargs or {})},
        tools=[tool.model_dump(exclude_none=True) for tool in tools],
    )
    prompt = await serving.encode(text, add_special_tokens=False, param="messages")
    if body.truncate_prompt_tokens is not None:
        prompt = prompt[-body.truncate_prompt_tokens :]
    newer = body.max_completion_tokens is not None
    asked = body.max_completion_tokens if newer else body.max_tokens
    max_tokens_param = "max_completion_tokens" if newer else "max_tokens"
    max_tokens = serving.check_length(prompt, asked, param="messages", max_tokens_param=max_tokens_param)
    prompt_end = text[-PROMPT_END_CHARS:]
    grammar = chat_grammar(
        serving.answer_format, content_grammar(body), tools, choice,
        parallel=body.parallel_tool_calls is not False, prompt_end=prompt_end,
    )  # fmt: skip
    logprobs = body.top_logprobs or 0 if body.logprobs else None
    jobs = serving.make_jobs(body, prompt, max_tokens, logprobs=logprobs, prompt_logprobs=body.prompt_logprobs)
    reads = bool(tools) or serving.answer_format.reads
    jobs = [
        replace(job, params=serving.with_ends(job.params), grammar=grammar and grammar[0], keep_markers=reads)
        for job in jobs
    ]
    return Plan(jobs, prompt_end, callable_names(tools, choice) if tools else None), grammar


async def _whole(
    serving: Serving, body: ChatCompletionRequest, plan: Plan, head: dict[str, Any], arrived_s: float
) -> Response:
    jobs = plan.jobs
    answers = await collect(serving, jobs, arrived_s, plan.readers(serving, body))
    if plan.tool_names is not None:
        for answer in answers:
            called = tell_of_call(answer.events)
            serving.metrics.tools_parsed(mode="non_streaming", called=called, request_type="chat_completions")
    texts = TokenTexts(serving.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
    choices = [_choice(index, answer, body, texts, head["id"]) for index, answer in enumerate(answers)]
    shown = {**head, "object": "chat.completion", "choices": choices, "usage": usage([jobs[0]], answers)}
    if body.return_token_ids:
        shown["prompt_token_ids"] = jobs[0].prompt_token_ids
    if body.prompt_logprobs is not None:
        shown["prompt_logprobs"] = prompt_logprobs(answers[0].prompt_logprobs, texts)
    return Response(msgspec.json.encode(shown), media_type="application/json")


def _choice(
    index: int, answer: Answer, body: ChatCompletionRequest, texts: TokenTexts, answer_id: str
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.reader is not None:
        with_reasoning = body.include_reasoning is not False
        message = message_of(answer.events, answer_id, index, with_reasoning=with_reasoning)
    if body.echoed:
        message["content"] = body.echoed + (message["content"] or "")
    choice = {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(answer.logprobs, texts) if body.logprobs else None,
        "finish_reason": finish_reason(answer, body.tool_choice),
        "stop_reason": answer.stop_reason,
    }
    return {**choice, "token_ids": answer.token_ids} if body.return_token_ids else choice


def finish_reason(answer: Answer, choice: ToolChoice | None) -> str | None:
    """OpenAI's: tool_calls where the model chose to call; stop where it had to call a certain function."""
    called = answer.reader is not None and answer.reader.num_calls > 0
    if called and answer.finish_reason is FinishReason.STOP and not isinstance(choice, NamedChoice):
        return "tool_calls"
    return answer.finish_reason


class _Chunks:
    """The events of one streamed chat: one for each delta that has something to show, the role before the first."""

    def __init__(self, serving: Serving, body: ChatCompletionRequest, plan: Plan, head: dict[str, Any]) -> None:
        self._body, self._jobs = body, plan.jobs
        self._metrics = serving.metrics if plan.tool_names is not None else None
        """Where a tool parser is fed."""
        self._texts = TokenTexts(serving.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._writer = ChunkWriter(
            {**head, "object": "chat.completion.chunk"},
            opening=b'"delta":{"content":', closing=b'},"logprobs":null,"finish_reason":null',
        )  # fmt: skip
        self._answers = [Answer(reader=reader) for reader in plan.readers(serving, body)]
        with_reasoning = body.include_reasoning is not False
        self._messages = [
            MessageDeltas(head["id"], index, with_reasoning=with_reasoning) for index in range(len(plan.jobs))
        ]
        self._started = [False] * len(plan.jobs)
        self._prompt = PromptFirst(plan.jobs, len(plan.jobs), needed=body.prompt_logprobs is not None)
        self._opened = False
        """Something was told: what concerns the prompt comes with that."""
        options = body.stream_options
        self._continuous = options is not None and options.continuous_usage_stats
        self._plain = not (body.return_token_ids or body.logprobs or self._continuous)

    def of(self, index: int, delta: Delta) -> bytes:
        if self._body.prompt_logprobs is None:
            return self._shown(index, delta)
        return b"".join([self._shown(*each) for each in self._prompt.release(index, delta)])

    def _shown(self, index: int, delta: Delta) -> bytes:
        answer = self._answers[index]
        events = answer.add(delta, keep_text=False)
        if self._metrics is not None:
            called = tell_of_call(events)
            self._metrics.tools_parsed(mode="streaming", called=called, request_type="chat_completions")
        started, self._started[index] = self._started[index], True
        first = b"" if started else self._first(index)
        if answer.reader is not None:
            return first + self._read(index, delta, self._messages[index].of(events))
        if self._plain and delta.finish_reason is None:
            return first + self._writer.text(index, delta.text) if delta.text else first
        if delta.text or delta.finish_reason or delta.token_ids:
            shown = {"content": delta.text} if delta.text else {}
            return first + self._writer.choice(self._choice(index, delta, shown), **self._usage())
        return first

    def _first(self, index: int) -> bytes:
        """The role; of all answers' the first tells of the prompt, too."""
        of_prompt, entries = dict[str, Any](), self._prompt.tell(index)
        if not self._opened and self._body.return_token_ids:
            of_prompt["prompt_token_ids"] = self._jobs[0].prompt_token_ids
        if not self._opened and self._body.prompt_logprobs is not None:
            of_prompt["prompt_logprobs"] = prompt_logprobs(entries, self._texts)
        self._opened = True
        return self._writer.choice(_first_choice(index, self._body.echoed), **of_prompt, **self._usage())

    def _read(self, index: int, delta: Delta, shown: list[dict[str, Any]]) -> bytes:
        """Several deltas may come of one: the last tells of tokens and the end."""
        if not shown and (delta.finish_reason or (delta.token_ids and not self._plain)):
            shown = [{}]
        early = [{"index": index, "delta": each, "logprobs": None, "finish_reason": None} for each in shown[:-1]]
        last = [self._choice(index, delta, shown[-1])] if shown else []
        return b"".join(self._writer.choice(choice, **self._usage()) for choice in early + last)

    def _usage(self) -> dict[str, Any]:
        return {"usage": usage([self._jobs[0]], self._answers)} if self._continuous else {}

    def _choice(self, index: int, delta: Delta, shown: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": shown,
            "logprobs": chat_logprobs(delta.logprobs, self._texts) if delta.logprobs else None,
            "finish_reason": None,
        }
        if delta.finish_reason is not None:
            choice["finish_reason"] = finish_reason(self._answers[index], self._body.tool_choice)
            choice["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def last(self) -> bytes:
        options = self._body.stream_options
        if options is None or not options.include_usage:
            return DONE
        return self._writer.no_choice(usage=usage([self._jobs[0]], self._answers)) + DONE


def _first_choice(index: int, echoed: str) -> dict[str, Any]:
    delta = {"role": "assistant", "content": echoed}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
