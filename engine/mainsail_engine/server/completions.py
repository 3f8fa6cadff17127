"""/v1/completions: a text, token ids, or lists of them, continued."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mainsail_engine.errors import RequestError
from mainsail_engine.protocol import TokenLogprobs
from mainsail_engine.server.answers import Answer, PromptFirst, collect, usage
from mainsail_engine.server.constraints import content_grammar
from mainsail_engine.server.handover import Identity, Ledger, is_resumed, pieces, take_over
from mainsail_engine.server.logprobs import TokenTexts, completion_logprobs, prompt_logprobs
from mainsail_engine.server.middleware import arrival_s
from mainsail_engine.server.schemas import MAX_PROMPTS, CompletionRequest
from mainsail_engine.server.serving import Delta, Job, Serving
from mainsail_engine.server.streaming import DONE, ChunkWriter, EventStream, unless_disconnected, while_connected
from mainsail_engine.server.told_blocks import blocks_header
from mainsail_engine.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this endpoint only."""


def split_prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of one request, each a text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [cast("list[int]", prompt)]
    return list(cast("list[str | list[int]]", prompt))


async def completion(serving: Serving, body: CompletionRequest, request: Request) -> Response:
    """Everything that can be refused is refused here, before the first byte of the answer."""
    arrived_s = arrival_s(request.scope)
    serving.check_model(body.model)
    serving.check_generates()
    serving.check_open()
    if not is_resumed(request):
        serving.check_room()
    jobs = await _jobs(serving, body)
    grammar = content_grammar(body)
    if grammar is not None:
        compiling = serving.compile(grammar[0], param=grammar[1], timeout_s=body.timeout)
        if not await while_connected(request, compiling):
            return Response(status_code=499)
        jobs = [replace(job, grammar=grammar[0]) for job in jobs]
    jobs, resumed = take_over(request, jobs, serving.ready.vocab_size, stream=body.stream)
    serving.admit(jobs, body.n or 1)
    answer = resumed or Identity(f"cmpl-{uuid.uuid4().hex}", int(time.time()))
    head = {"id": answer.id, "object": "text_completion", "created": answer.created, "model": body.model}
    if body.stream:
        ledger = Ledger.of(request, jobs)
        events = pieces(serving, jobs, _Chunks(_shape(serving, body, jobs), head), arrived_s, ledger)
        return EventStream(ledger.frames(events), ledger.headers(answer) | blocks_header(request, jobs))
    whole = await unless_disconnected(request, _whole(serving, body, jobs, head, arrived_s))
    whole.headers.update(blocks_header(request, jobs))
    return whole


async def _jobs(serving: Serving, body: CompletionRequest) -> list[Job]:
    """All answers to the first prompt, then all to the second, …: the order of `index`."""
    prompts = split_prompts(body.prompt)
    if len(prompts) * (body.n or 1) > MAX_PROMPTS:
        raise RequestError(f"n times the number of prompts must not be above {MAX_PROMPTS}", param="n")
    jobs: list[Job] = []
    for prompt in prompts:
        ids = await _token_ids(serving, prompt, body)
        asked = None if body.max_tokens is None else max(body.max_tokens, 1)
        room = serving.check_length(ids, asked, param="prompt", max_tokens_param="max_tokens")
        max_tokens = room if body.max_tokens is not None else min(room, DEFAULT_MAX_TOKENS)
        if (body.min_tokens or 0) > max_tokens:
            raise RequestError(f"min_tokens must not be above max_tokens ({max_tokens})", param="min_tokens")
        wanted = body.prompt_logprobs
        if body.echo and body.logprobs is not None:
            wanted = max(wanted or 0, body.logprobs)
        jobs.extend(serving.make_jobs(body, ids, max_tokens, logprobs=body.logprobs, prompt_logprobs=wanted))
    return jobs


async def _token_ids(serving: Serving, prompt: str | list[int], body: CompletionRequest) -> list[int]:
    if isinstance(prompt, str):
        special = body.add_special_tokens is not False
        prompt = await serving.encode(prompt, add_special_tokens=special, param="prompt")
    return prompt[-body.truncate_prompt_tokens :] if body.truncate_prompt_tokens is not None else prompt


@dataclass(frozen=True, slots=True)
class _Shape:
    """How the answers to one request are shown."""

    body: CompletionRequest
    jobs: list[Job]
    texts: TokenTexts
    tokenizer: Tokenizer | None

    def prompts(self) -> list[Job]:
        """One job for each prompt."""
        return self.jobs[:: self.body.n or 1]

    def first_of(self, index: int) -> int:
        """The answer that brings the log-probabilities of this one's prompt."""
        return index - index % (self.body.n or 1)

    def prompt_text(self, index: int) -> str:
        """What echo puts before the answer."""
        if self.tokenizer is None:
            return ""
        job = self.jobs[index]
        return self.tokenizer.decode(job.prompt_token_ids, skip_special_tokens=job.skip_special_tokens)

    def logprobs(
        self, entries: Sequence[TokenLogprobs | None], token_ids: Sequence[int], offset: int
    ) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        wanted = self.body.logprobs + 1
        cut = [e and TokenLogprobs(e.token_ids[:wanted], e.logprobs[:wanted], e.rank) for e in entries]
        return completion_logprobs(cut, token_ids, self.texts, offset)

    def echoed(self, index: int, prompt: list[TokenLogprobs], answer: Answer) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities of prompt and answer; without tokens of the answer where none were wanted."""
        nothing_more = self.body.max_tokens == 0
        tokens = [] if nothing_more else answer.token_ids
        entries = [None, *prompt, *([] if nothing_more else answer.logprobs)]
        shown = self.logprobs(entries, [*self.jobs[index].prompt_token_ids, *tokens], 0)
        return self.prompt_text(index) + ("" if nothing_more else answer.text), shown


def _shape(serving: Serving, body: CompletionRequest, jobs: list[Job]) -> _Shape:
    texts = TokenTexts(serving.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
    return _Shape(body, jobs, texts, serving.tokenizer)


async def _whole(
    serving: Serving, body: CompletionRequest, jobs: list[Job], head: dict[str, Any], arrived_s: float
) -> Response:
    answers = await collect(serving, jobs, arrived_s)
    shape = _shape(serving, body, jobs)
    choices = [_choice(index, answers, shape) for index in range(len(answers))]
    shown = {**head, "choices": choices, "usage": _usage(shape, answers)}
    return Response(msgspec.json.encode(shown), media_type="application/json")


def _usage(shape: _Shape, answers: list[Answer]) -> dict[str, Any]:
    counts = usage(shape.prompts(), answers)
    if shape.body.max_tokens == 0:  # the core cannot help making one: nobody asked for it
        counts |= {"completion_tokens": 0, "total_tokens": counts["prompt_tokens"]}
    return counts


def _choice(index: int, answers: list[Answer], shape: _Shape) -> dict[str, Any]:
    body, answer, prompt = shape.body, answers[index], answers[shape.first_of(index)].prompt_logprobs
    text, logprobs = answer.text, shape.logprobs(answer.logprobs, answer.token_ids, 0)
    if body.echo:
        text, logprobs = shape.echoed(index, prompt, answer)
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if body.max_tokens == 0:
        choice |= {"finish_reason": "length", "stop_reason": None}
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(prompt, shape.texts)
    if body.return_token_ids:
        choice["token_ids"] = [] if body.max_tokens == 0 else answer.token_ids
        choice["prompt_token_ids"] = shape.jobs[index].prompt_token_ids
    return choice


class _Chunks:
    """The events of one streamed request."""

    def __init__(self, shape: _Shape, head: dict[str, Any]) -> None:
        self._shape = shape
        body = shape.body
        self._writer = ChunkWriter(head, opening=b'"text":', closing=b',"logprobs":null,"finish_reason":null')
        self._answers = [Answer() for _ in shape.jobs]
        self._offsets = [0] * len(shape.jobs)
        self._opens = bool(body.echo or body.prompt_logprobs is not None or body.return_token_ids)
        """Whether an answer's first event tells of its prompt."""
        self._opened = [not self._opens] * len(shape.jobs)
        scored = body.prompt_logprobs is not None or bool(body.echo and body.logprobs is not None)
        self._prompts = PromptFirst(shape.jobs, body.n or 1, needed=scored)
        options = body.stream_options
        self._continuous = options is not None and options.continuous_usage_stats
        self._plain = body.logprobs is None and not (body.return_token_ids or self._continuous)

    def of(self, index: int, delta: Delta) -> bytes:
        self._answers[index].add(delta, keep_text=False)
        if not self._opens:
            return self._shown(index, delta)
        return b"".join([self._after_opening(*each) for each in self._prompts.release(index, delta)])

    def _after_opening(self, index: int, delta: Delta) -> bytes:
        if self._opened[index]:
            return self._shown(index, delta)
        self._opened[index] = True
        return self._opening(index) + self._shown(index, delta)

    def _opening(self, index: int) -> bytes:
        """What is told of the prompt: its text, its log-probabilities, its tokens."""
        body, shape, prompt = self._shape.body, self._shape, self._prompts.tell(index)
        text, logprobs = shape.echoed(index, prompt, Answer()) if body.echo else ("", None)
        self._offsets[index] = len(text)
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(prompt, shape.texts)
        if body.return_token_ids:
            choice |= {"token_ids": [], "prompt_token_ids": shape.jobs[index].prompt_token_ids}
        return self._writer.choice(choice, **self._counts())

    def _counts(self) -> dict[str, Any]:
        return {"usage": _usage(self._shape, self._answers)} if self._continuous else {}

    def _shown(self, index: int, delta: Delta) -> bytes:
        if self._plain and delta.finish_reason is None:
            return self._writer.text(index, delta.text) if delta.text else b""
        if not (delta.text or delta.finish_reason or delta.token_ids):
            return b""
        return self._writer.choice(self._choice(index, delta), **self._counts())

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        body, nothing_more = self._shape.body, self._shape.body.max_tokens == 0
        entries = None if nothing_more else delta.logprobs
        choice: dict[str, Any] = {
            "index": index,
            "text": "" if nothing_more else delta.text,
            "logprobs": self._shape.logprobs(entries, delta.token_ids, self._offsets[index]) if entries else None,
            "finish_reason": "length" if nothing_more else delta.finish_reason,
        }
        self._offsets[index] += sum(len(self._shape.texts.spelled(t).decode(errors="replace")) for t in delta.token_ids)
        if delta.finish_reason is not None:
            choice["stop_reason"] = None if nothing_more else delta.stop_reason
        if body.return_token_ids:
            choice["token_ids"] = [] if nothing_more else delta.token_ids
        return choice

    def last(self) -> bytes:
        options = self._shape.body.stream_options
        if options is None or not options.include_usage:
            return DONE
        return self._writer.no_choice(usage=_usage(self._shape, self._answers)) + DONE
