"""/v1/completions: a text, token ids, or lists of them, continued."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mainsail_engine.errors import RequestError
from mainsail_engine.server.answers import Answer, collect, usage
from mainsail_engine.server.schemas import MAX_PROMPTS, CompletionRequest
from mainsail_engine.server.serving import Delta, Job, Serving, merge
from mainsail_engine.server.streaming import DONE, EventStream, event, unless_disconnected

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
    arrival_s = time.monotonic()
    serving.check_model(body.model)
    jobs = await _jobs(serving, body)
    serving.admit(jobs, body.n or 1)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    head["object"] = "text_completion"
    if body.stream:
        return EventStream(_events(serving, body, jobs, head, arrival_s))
    return await unless_disconnected(request, _whole(serving, body, jobs, head, arrival_s))


async def _jobs(serving: Serving, body: CompletionRequest) -> list[Job]:
    """All answers to the first prompt, then all to the second, …: the order of `index`."""
    prompts = split_prompts(body.prompt)
    if len(prompts) * (body.n or 1) > MAX_PROMPTS:
        raise RequestError(f"n times the number of prompts must not be above {MAX_PROMPTS}", param="n")
    jobs: list[Job] = []
    for prompt in prompts:
        ids = await _token_ids(serving, prompt, body)
        room = serving.check_length(ids, body.max_tokens, param="prompt", max_tokens_param="max_tokens")
        max_tokens = room if body.max_tokens is not None else min(room, DEFAULT_MAX_TOKENS)
        if (body.min_tokens or 0) > max_tokens:
            raise RequestError(f"min_tokens must not be above max_tokens ({max_tokens})", param="min_tokens")
        jobs.extend(serving.make_jobs(body, ids, max_tokens))
    return jobs


async def _token_ids(serving: Serving, prompt: str | list[int], body: CompletionRequest) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    return await serving.encode(prompt, add_special_tokens=body.add_special_tokens is not False, param="prompt")


async def _whole(
    serving: Serving, body: CompletionRequest, jobs: list[Job], head: dict[str, Any], arrival_s: float
) -> Response:
    answers = await collect(merge([serving.generate(job, arrival_s) for job in jobs]), jobs)
    choices = [_choice(index, answer, jobs[index], body) for index, answer in enumerate(answers)]
    shown = {**head, "choices": choices, "usage": usage(jobs[:: body.n or 1], answers)}
    return Response(msgspec.json.encode(shown), media_type="application/json")


def _choice(index: int, answer: Answer, job: Job, body: CompletionRequest) -> dict[str, Any]:
    choice = {
        "index": index,
        "text": answer.text,
        "logprobs": None,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if body.return_token_ids:
        return {**choice, "token_ids": answer.token_ids, "prompt_token_ids": job.prompt_token_ids}
    return choice


async def _events(
    serving: Serving, body: CompletionRequest, jobs: list[Job], head: dict[str, Any], arrival_s: float
) -> AsyncGenerator[bytes, None]:
    answers = [Answer() for _ in jobs]
    async with aclosing(merge([serving.generate(job, arrival_s) for job in jobs])) as deltas:
        async for index, delta in deltas:
            answers[index].add(delta, keep_text=False)
            if delta.text or delta.finish_reason or body.return_token_ids:
                yield event({**head, "choices": [_delta_choice(index, delta, body)]})
    if body.stream_options is not None and body.stream_options.include_usage:
        yield event({**head, "choices": [], "usage": usage(jobs[:: body.n or 1], answers)})
    yield DONE


def _delta_choice(index: int, delta: Delta, body: CompletionRequest) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "text": delta.text,
        "logprobs": None,
        "finish_reason": delta.finish_reason,
    }
    if delta.finish_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    if body.return_token_ids:
        choice["token_ids"] = delta.token_ids
    return choice
