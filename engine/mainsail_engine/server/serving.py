"""One generation, from token ids to text: admission, the core's stream, detokenizing, stop strings, metrics.

What chat and plain completions share. A `Job` becomes a stream of `Delta`s; leaving the stream early (the client is
gone) aborts the request in the core, by way of the generators' `finally`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from mainsail_engine.client import EngineClient
from mainsail_engine.errors import RequestError
from mainsail_engine.metrics import Metrics, RequestTimes
from mainsail_engine.protocol import Add, FirstScheduled, Ready, RequestOutput
from mainsail_engine.request import FinishReason, SamplingParams
from mainsail_engine.server.admission import Admission
from mainsail_engine.server.schemas import GenerationRequest
from mainsail_engine.text.detokenizer import Detokenizer, NoText
from mainsail_engine.text.stop_strings import StopStrings
from mainsail_engine.text.tokenizer import Tokenizer

INLINE_CHARS = 4096
"""A text up to this long is tokenized at once (under a millisecond); a longer one in a thread."""


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt to be continued once."""

    prompt_token_ids: list[int]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    cache_salt: str = ""
    user: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What came since the last one. `finish_reason` is set on the last."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0


class TextStream:
    """Token ids in, text that may be shown out; sees where a stop string ends the answer."""

    def __init__(self, job: Job, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(job.stop, include=job.include_stop)
        self._min_tokens = job.params.min_tokens
        self._num_tokens = 0

    def feed(self, output: RequestOutput) -> Delta:
        text = self._show(output.token_ids)
        reason, stop_reason = output.finish_reason, output.stop_reason
        if self._stops.matched is None and reason is not None:
            text += self._stops.feed(self._detokenizer.flush())
            text += "" if self._stops.matched is not None else self._stops.flush()
        if self._stops.matched is not None:
            reason, stop_reason = FinishReason.STOP, self._stops.matched
        return Delta(text, output.token_ids, reason, stop_reason, output.num_cached_tokens)

    def _show(self, token_ids: list[int]) -> str:
        """Before min_tokens a stop string is plain text."""
        free = max(0, min(self._min_tokens - self._num_tokens, len(token_ids)))
        self._num_tokens += len(token_ids)
        early = self._detokenizer.feed(token_ids[:free]) if free else ""
        return early + self._stops.feed(self._detokenizer.feed(token_ids[free:]))


@dataclass
class Serving:
    """What every handler needs. One per process."""

    client: EngineClient
    tokenizer: Tokenizer | None
    metrics: Metrics
    admission: Admission
    ready: Ready
    model_names: tuple[str, ...]
    model_path: str
    created_s: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    drain_retry_after_s: float = 5.0
    _times: dict[str, RequestTimes] = field(default_factory=dict[str, RequestTimes])
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "tokenizer"))

    @property
    def max_model_len(self) -> int:
        """Tokens that one request can ever have: the model's limit, or the pool's where that is smaller."""
        return min(self.ready.max_model_len, self.ready.num_blocks * self.ready.block_size)

    def text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer: send token ids as the prompt", param="prompt")
        return self.tokenizer

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.model_names:
            known = ", ".join(self.model_names)
            message = f"the model {name!r} does not exist here; served: {known}"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    async def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids; long texts in a thread, so that no stream stalls."""
        tokenizer = self.text()
        if len(text) <= INLINE_CHARS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens, param=param)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens, param=param)
        )

    async def encode_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, variables: dict[str, Any] | None
    ) -> list[int]:
        template = self.text().template
        if template is None:
            raise RequestError("this model has no chat template: use /v1/completions", param="messages")
        text = template.render(messages, add_generation_prompt=add_generation_prompt, variables=variables)
        return await self.encode(text, add_special_tokens=False, param="messages")

    def check_length(self, prompt: list[int], max_tokens: int | None, *, param: str, max_tokens_param: str) -> int:
        """The number of tokens to generate at most. Raises RequestError when prompt and answer cannot fit."""
        room = self.max_model_len - len(prompt)
        if not prompt:
            raise RequestError("the prompt has no tokens", param=param)
        if room < 1:
            message = f"the prompt has {len(prompt)} tokens, the context {self.max_model_len}: leave room for an answer"
            raise RequestError(message, param=param, code="context_length_exceeded")
        if max_tokens is not None and max_tokens > room:
            message = f"{max_tokens_param} is {max_tokens}, but after {len(prompt)} prompt tokens only {room} fit"
            raise RequestError(message, param=max_tokens_param, code="context_length_exceeded")
        highest = max(prompt)
        if highest >= self.ready.vocab_size:
            message = f"token id {highest} is not in the vocabulary ({self.ready.vocab_size} ids)"
            raise RequestError(message, param=param)
        return room if max_tokens is None else max_tokens

    def make_jobs(self, body: GenerationRequest, prompt: list[int], max_tokens: int) -> list[Job]:
        """One job for each of the n answers; with a seed, each gets its own, derived from it."""
        return [
            Job(
                prompt_token_ids=prompt,
                params=sampling_params(body, max_tokens, answer),
                stop=tuple(body.stop or ()),
                include_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False,
                priority=body.priority or 0,
                cache_salt=body.cache_salt or "",
                user=body.user or "",
                timeout_s=body.timeout,
            )
            for answer in range(body.n or 1)
        ]

    def admit(self, jobs: list[Job], n: int) -> None:
        """Raises RequestError: 503 while draining, 429 when the queue is full."""
        if self.draining:
            message = "the server is shutting down; try again"
            raise RequestError(message, status=503, code="shutting_down", retry_after_s=self.drain_retry_after_s)
        rejection = self.admission.check(len(jobs), sum(len(job.prompt_token_ids) for job in jobs))
        if rejection is not None:
            self.metrics.rejected(rejection.reason)
            message = rejection.message
            raise RequestError(message, status=429, code="overloaded", retry_after_s=rejection.retry_after_s)
        self.metrics.admitted(len(jobs), n)

    def first_scheduled(self, first: FirstScheduled) -> None:
        times = self._times.get(first.request_id)
        if times is not None:
            times.queue_time_s = first.queue_time_s

    async def generate(self, job: Job, arrival_s: float) -> AsyncGenerator[Delta, None]:
        """The answer as it comes. Raises RequestError when the request fails on the way."""
        request_id = uuid.uuid4().hex
        num_prompt = len(job.prompt_token_ids)
        times = self._times[request_id] = RequestTimes(arrival_s, num_prompt, job.params.max_tokens)
        reason = FinishReason.ABORT
        self.admission.enter(num_prompt)
        try:
            add = Add(
                request_id, job.prompt_token_ids, job.params, job.priority, job.cache_salt, job.user, job.timeout_s
            )
            async with (
                aclosing(self.client.generate(add)) as outputs,
                aclosing(self._deltas(job, outputs, times)) as deltas,
            ):
                async for delta in deltas:
                    reason = delta.finish_reason or reason
                    yield delta
        except RequestError:
            reason = FinishReason.ERROR
            raise
        finally:
            if times.first_token_s is None:
                self.admission.leave(num_prompt, time.monotonic(), served=False)
            del self._times[request_id]
            self.metrics.finished(times, reason)

    async def _deltas(
        self, job: Job, outputs: AsyncGenerator[RequestOutput, None], times: RequestTimes
    ) -> AsyncGenerator[Delta, None]:
        stream = TextStream(job, self._detokenizer(job))
        async for output in outputs:
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise generation_error(output)
            now = time.monotonic()
            if times.first_token_s is None:
                self.admission.leave(len(job.prompt_token_ids), now, served=True)
            self.metrics.tokens(times, len(output.token_ids), output.num_cached_tokens, now)
            delta = stream.feed(output)
            yield delta
            if delta.finish_reason is not None:
                return

    def _detokenizer(self, job: Job) -> Detokenizer:
        if self.tokenizer is None:
            return NoText()
        return self.tokenizer.detokenizer(skip_special_tokens=job.skip_special_tokens)


def generation_error(output: RequestOutput) -> RequestError:
    message = output.error or "the request was aborted"
    if output.stop_reason == "deadline":
        return RequestError(message, status=504, param="timeout", code="deadline_exceeded")
    return RequestError(message, status=500, code="generation_failed")


def sampling_params(body: GenerationRequest, max_tokens: int, answer: int) -> SamplingParams:
    """The request's values, or the API's defaults; each of n answers with a seed of its own."""
    seed = None if body.seed is None else (body.seed + answer + 2**63) % 2**64 - 2**63
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
    )


async def merge(streams: list[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Several answers as they come, each with its index. Leaving early ends them all; one error ends the whole."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for delta in stream:
                yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta | RequestError | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    arrived.put_nowait((index, delta))
            arrived.put_nowait((index, None))
        except RequestError as error:
            arrived.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            index, item = await arrived.get()
            if isinstance(item, RequestError):
                raise item
            if item is None:
                running -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
