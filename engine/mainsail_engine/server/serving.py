"""One generation, from token ids to text: admission, the core's outputs, detokenizing, stop strings, metrics.

What all endpoints that generate have in common.

    Job ──▶ Generation ──submit──▶ core ──outputs──▶ Generation ──deltas──▶ Answering ──batches──▶ handler

`Answering` is one HTTP request: one or more jobs. Outputs are turned into deltas right where they arrive, without a
task for each token; the handler is woken once a step, with all that the step brought. Leaving an `Answering` early (the
client is gone) aborts what still runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from mainsail_engine.client import EngineClient
from mainsail_engine.errors import RequestError
from mainsail_engine.metrics import Metrics, RequestTimes
from mainsail_engine.protocol import Add, FirstScheduled, Ready, RequestOutput, TokenLogprobs
from mainsail_engine.request import FinishReason, SamplingParams
from mainsail_engine.server.admission import Admission
from mainsail_engine.server.answer_format import AnswerFormat, choose_format
from mainsail_engine.server.board import Board
from mainsail_engine.server.parameters import sampling_params
from mainsail_engine.server.reasoning import effort_variables
from mainsail_engine.server.schemas import GenerationRequest
from mainsail_engine.server.tools.harmony import STOPS, as_harmony
from mainsail_engine.server.tools.prompt import with_tools_written_out
from mainsail_engine.server.tracing import end_generation, generation_span
from mainsail_engine.structured.grammar import TRY_AGAIN, Grammar
from mainsail_engine.text.detokenizer import Detokenizer, NoText
from mainsail_engine.text.embedding import EmbeddingForm
from mainsail_engine.text.stop_strings import StopStrings
from mainsail_engine.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
INLINE_CHARS = 4096
"""A text up to this long is tokenized at once (under a millisecond); a longer one in a thread."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What a client has of an answer that another engine began (see handover.py)."""

    token_ids: list[int]
    num_cached_tokens: int
    finished: bool


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
    session_id: str = ""
    adapter: str = ""
    """The LoRA adapter to go through; empty: none."""
    timeout_s: float | None = None
    delivered: Delivered | None = None
    """The answer goes on after this."""
    grammar: Grammar | None = None
    """What the answer must conform to; compiled already."""
    keep_markers: bool = False
    """Show the special tokens that tool calls and reasoning are told by."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What came since the last one. `finish_reason` is set on the last."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    embedding: bytes | None = None


class TextStream:
    """Token ids in, text that may be shown out; sees where a stop string ends the answer."""

    def __init__(self, job: Job, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(job.stop, include=job.include_stop)
        self._params = job.params
        self._min_tokens = job.params.min_tokens
        self._num_tokens = 0

    def feed(self, output: RequestOutput) -> Delta:
        """What the output's tokens show, up to the one that completes a stop string: what came with it in the same step
        (guesses that were right, forced tokens) is no part of the answer."""
        text, count = self._show_until_stop(output.token_ids)
        reason, stop_reason = output.finish_reason, output.stop_reason
        if self._stops.matched is None and reason is not None:
            text += self._stops.feed(self._detokenizer.flush())
            text += "" if self._stops.matched is not None else self._stops.flush()
        if self._stops.matched is not None:
            reason, stop_reason = FinishReason.STOP, self._stops.matched
        return Delta(
            text, output.token_ids[:count], reason, stop_reason, output.num_cached_tokens,
            output.logprobs and output.logprobs[:count], output.prompt_logprobs, output.embedding,
        )  # fmt: skip

    def _show_until_stop(self, token_ids: list[int]) -> tuple[str, int]:
        """(their text, how many of them there are before the answer ends)."""
        if not self._stops.stops or len(token_ids) < 2:
            return self._show(token_ids), len(token_ids)
        text = ""
        for count, token in enumerate(token_ids, 1):
            text += self._show([token])
            if self._stops.matched is not None:
                return text, count
        return text, len(token_ids)

    def replay(self, delivered: Delivered, eos_token_ids: Sequence[int]) -> list[Delta]:
        """Feed what was delivered. Raises RequestError where a stop string would have ended it before."""
        cached = delivered.num_cached_tokens
        outputs = [RequestOutput("", [token], num_cached_tokens=cached) for token in delivered.token_ids]
        if delivered.finished and outputs:
            reason = self._ended(delivered.token_ids, eos_token_ids)
            outputs[-1] = msgspec.structs.replace(outputs[-1], finish_reason=reason)
        deltas = [self.feed(output) for output in outputs]
        if self._stops.matched is not None and not delivered.finished:
            raise RequestError("the delivered tokens hold a stop string", code="invalid_resume")
        return deltas

    def _ended(self, token_ids: list[int], eos_token_ids: Sequence[int]) -> FinishReason:
        """Why an answer with these tokens had ended, unless by a stop string, which `feed` sees."""
        params, last = self._params, token_ids[-1]
        by_token = last in params.stop_token_ids or (last in eos_token_ids and not params.ignore_eos)
        return FinishReason.STOP if by_token or len(token_ids) < params.max_tokens else FinishReason.LENGTH

    def _show(self, token_ids: list[int]) -> str:
        """Before min_tokens a stop string is plain text."""
        if not self._min_tokens:
            return self._stops.feed(self._detokenizer.feed(token_ids))
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
    embedding_form: EmbeddingForm = field(default_factory=EmbeddingForm)
    answer_format: AnswerFormat = field(default_factory=lambda: choose_format(None))
    board: Board = field(default_factory=Board)
    log_requests: bool = False
    """One line for each finished request: counts and times, never what was said."""
    created_s: int = field(default_factory=lambda: int(time.time()))
    drain_retry_after_s: float = 5.0
    _times: dict[str, RequestTimes] = field(default_factory=dict[str, RequestTimes])
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "tokenizer"))

    @property
    def max_model_len(self) -> int:
        """Tokens that one request can ever have: the model's limit, or the pool's where that is smaller."""
        return min(self.ready.max_model_len, self.ready.num_blocks * self.ready.block_size)

    @property
    def draining(self) -> bool:
        return self.board.raised("draining")

    @property
    def is_asleep(self) -> bool:
        return self.board.is_asleep

    async def sleep(self) -> None:
        """Weights to the host, KV dropped, once what runs has finished; new requests are refused from now on."""
        if self.draining:
            raise RequestError("the server is shutting down", status=503, code="shutting_down")
        if self.is_asleep:
            return
        self.board.add("slept")
        try:
            await self.client.control("sleep")
        except BaseException:
            self.board.add("woken")
            raise

    async def wake_up(self) -> None:
        """Weights and an empty pool back on the device; the prefix cache is gone."""
        await self.client.control("wake_up")
        if self.is_asleep:
            self.board.add("woken")

    async def load_adapter(self, name: str, path: str) -> None:
        """Serve the adapter at that path under that name, beside what runs. Raises RequestError."""
        self.check_open()
        if name in self.model_names:
            raise RequestError(f"{name!r} is the base model's name", param="lora_name", code="invalid_adapter")
        await self.client.load_adapter(name, path)

    def text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer: send token ids as the prompt", param="prompt")
        return self.tokenizer

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.model_names and name not in self.client.adapters:
            known = ", ".join((*self.model_names, *self.client.adapters))
            message = f"the model {name!r} does not exist here; served: {known}"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    def check_generates(self) -> None:
        """Raises RequestError where the model has no head."""
        if self.ready.embeds_only:
            message = "this is an embedding model, which makes no text: ask /v1/embeddings"
            raise RequestError(message, param="model", code="embedding_model")

    def adapter_of(self, name: str | None) -> str:
        """The LoRA adapter that a model's name stands for; empty: it is the base model."""
        return name if name is not None and name in self.client.adapters else ""

    async def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids; long texts in a thread, so that no stream stalls."""
        tokenizer = self.text()
        if len(text) <= INLINE_CHARS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens, param=param)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens, param=param)
        )

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: dict[str, Any] | None,
        tools: list[dict[str, Any]] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The conversation as the model's template writes it; at its end the next answer's beginning, or the last
        message left open. Raises RequestError."""
        template = self.text().template
        if template is None:
            raise RequestError("this model has no chat template: use /v1/completions", param="messages")
        try:
            if self.answer_format.harmony:
                messages = as_harmony(messages)
            if not self.answer_format.template_has_tools:
                messages, tools = with_tools_written_out(messages, tools), None
            return template.render(
                messages, add_generation_prompt=add_generation_prompt, tools=tools or None, variables=variables,
                continue_final_message=continue_final_message,
            )  # fmt: skip
        except RecursionError as error:
            message = "messages: arguments of a call, or a tool's parameters, are nested too deeply to be written out"
            raise RequestError(message, param="messages") from error

    def effort(self, effort: str | None) -> dict[str, Any]:
        """The template's variables for a reasoning effort. Raises RequestError."""
        template, form = self.text().template, self.answer_format
        source = template.source if template is not None else ""
        return effort_variables(effort, source, reasons=form.reasoning is not None, harmony=form.harmony)

    def with_ends(self, params: SamplingParams) -> SamplingParams:
        """Stops at what ends an answer in the model's format, too, where its configuration names only some of that."""
        if not self.answer_format.harmony or params.ignore_eos:
            return params
        each = [self.text().encode(stop, add_special_tokens=False) for stop in STOPS]
        known = {*self.ready.eos_token_ids, *params.stop_token_ids}
        more = [ids[0] for ids in each if len(ids) == 1 and ids[0] not in known]
        return msgspec.structs.replace(params, stop_token_ids=(*params.stop_token_ids, *more)) if more else params

    async def encode_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, variables: dict[str, Any] | None
    ) -> list[int]:
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, variables=variables)
        return await self.encode(text, add_special_tokens=False, param="messages")

    async def compile(self, grammar: Grammar, *, param: str, timeout_s: float | None) -> None:
        """Have the grammar compiled, before the answer begins. Raises RequestError: 400 where it is none."""
        try:
            error = await asyncio.wait_for(self.client.compile(grammar), timeout_s)
        except TimeoutError as error:
            message = f"deadline exceeded: the grammar was not compiled within {timeout_s:.1f} s"
            raise RequestError(message, status=504, param="timeout", code="deadline_exceeded") from error
        if error is not None and error.endswith(TRY_AGAIN):
            raise RequestError(error, status=503, param=param, code="compiler_busy", retry_after_s=1.0)
        if error is not None:
            raise RequestError(f"{param}: {error}", param=param, code="invalid_grammar")

    @property
    def _limit(self) -> str:
        """In OpenAI's words: agents know by them that their conversation is to be shortened."""
        return f"This model's maximum context length is {self.max_model_len} tokens."

    def check_prompt(self, prompt: list[int], *, param: str) -> int:
        """The room for an answer. Raises RequestError when there is none, or the prompt is no prompt."""
        room = self.max_model_len - len(prompt)
        if not prompt:
            raise RequestError("the prompt has no tokens", param=param)
        if room < 1:
            message = f"{self._limit} However, the prompt has {len(prompt)}: leave room for an answer"
            raise RequestError(message, param=param, code="context_length_exceeded")
        highest = max(prompt)
        if highest >= self.ready.vocab_size:
            message = f"token id {highest} is not in the vocabulary ({self.ready.vocab_size} ids)"
            raise RequestError(message, param=param)
        return room

    def check_length(self, prompt: list[int], max_tokens: int | None, *, param: str, max_tokens_param: str) -> int:
        """The number of tokens to generate at most. Raises RequestError when prompt and answer cannot fit."""
        room = self.check_prompt(prompt, param=param)
        if max_tokens is not None and max_tokens > room:
            wish = f"{max_tokens_param} is {max_tokens}, and after {len(prompt)} prompt tokens only {room} fit"
            message = f"{self._limit} However, {wish}"
            raise RequestError(message, param=max_tokens_param, code="context_length_exceeded")
        return room if max_tokens is None else max_tokens

    def make_jobs(
        self,
        body: GenerationRequest,
        prompt: list[int],
        max_tokens: int,
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> list[Job]:
        """One job for each of the n answers. With a seed, each gets its own, derived from it; the prompt's
        log-probabilities are the same for all and come with the first. Raises RequestError."""
        params = sampling_params(
            body, max_tokens, vocab_size=self.ready.vocab_size, eos_token_ids=self.ready.eos_token_ids,
            encode=self._encode_word, logprobs=logprobs,
        )  # fmt: skip
        return [
            Job(
                prompt_token_ids=prompt,
                params=params(answer, None if answer else prompt_logprobs),
                stop=tuple(body.stop or ()),
                include_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False,
                priority=body.priority or 0,
                cache_salt=body.cache_salt or "",
                adapter=self.adapter_of(body.model),
                session_id="" if answer else body.session_id or "",
                user=body.user or "",
                timeout_s=body.timeout,
            )
            for answer in range(body.n or 1)
        ]

    def _encode_word(self, text: str) -> list[int]:
        return self.text().encode(text, add_special_tokens=False, param="bad_words")

    def admit(self, jobs: list[Job], n: int) -> None:
        """Raises RequestError: 503 while draining or asleep, 429 when the queue is full."""
        self.check_open()
        if any(job.delivered is not None for job in jobs):
            return  # it was admitted where it began, and is not turned away half-way
        self.check_room(len(jobs), sum(len(job.prompt_token_ids) for job in jobs))
        self.admission.reserve((len(job.prompt_token_ids) for job in jobs), time.monotonic())
        self.metrics.admitted(len(jobs), n)

    def check_open(self) -> None:
        """Raises RequestError (503) while draining or asleep."""
        if self.draining:
            message = "the server is shutting down; try again"
            raise RequestError(message, status=503, code="shutting_down", retry_after_s=self.drain_retry_after_s)
        if self.is_asleep:
            raise RequestError("the engine is asleep: POST /wake_up first", status=503, code="asleep")

    def check_room(self, requests: int = 1, tokens: int = 0) -> None:
        """Raises RequestError (429) when the queue is full; cheap enough to ask before anything is tokenized."""
        rejection = self.admission.check(requests, tokens, time.monotonic())
        if rejection is not None:
            self.metrics.rejected(rejection.reason)
            message = rejection.message
            raise RequestError(message, status=429, code="overloaded", retry_after_s=rejection.retry_after_s)

    def first_scheduled(self, first: FirstScheduled) -> None:
        times = self._times.get(first.request_id)
        if times is not None:
            times.queue_time_s = first.queue_time_s

    def answer(self, jobs: list[Job], arrival_s: float, *, whole: bool = False) -> Answering:
        """Use it as a context: entering starts the jobs, leaving ends those that still run."""
        return Answering(self, jobs, arrival_s, whole=whole)

    def detokenizer(self, job: Job) -> Detokenizer:
        if self.tokenizer is None:
            return NoText()
        return self.tokenizer.detokenizer(skip_special_tokens=job.skip_special_tokens, keep_markers=job.keep_markers)

    def enter(self, request_id: str, job: Job, arrival_s: float) -> RequestTimes:
        num_prompt = len(job.prompt_token_ids)
        if not self._times:
            self.board.set("working_since", time.monotonic())
        times = self._times[request_id] = RequestTimes(arrival_s, num_prompt, job.params.max_tokens)
        times.span = generation_span()
        self.board.set("running", len(self._times))
        self.admission.enter(num_prompt, time.monotonic())
        self._show_queue()
        return times

    def first_token(self, times: RequestTimes, now: float) -> None:
        """The request is out of the queue."""
        self.admission.leave(times.num_prompt_tokens, now, served=True)
        self._show_queue()

    def leave(self, request_id: str, times: RequestTimes) -> None:
        """The core is done with it."""
        if not times.num_tokens:
            self.admission.leave(times.num_prompt_tokens, time.monotonic(), served=False)
            self._show_queue()
        self.admission.ended(time.monotonic())
        del self._times[request_id]
        self.board.set("running", len(self._times))

    def account(self, request_id: str, times: RequestTimes, reason: FinishReason) -> None:
        """Its client has all that it will get."""
        self.metrics.finished(times, reason)
        if times.span is not None:
            end_generation(times.span, times, reason)
        if self.log_requests:
            log.info("finished %s: %s", request_id, times.in_words(reason))

    def _show_queue(self) -> None:
        admission = self.admission
        self.metrics.queued(admission.num_requests, admission.num_tokens, admission.own_tokens_per_s)


class Answering:
    """The answers to one HTTP request: deltas in batches, each with its answer's index.

    whole: nobody looks before the end, so the handler is woken only then.

    Whoever asks for the next batch has handed the last one to the socket: that is when its tokens count as delivered.
    """

    def __init__(self, serving: Serving, jobs: list[Job], arrival_s: float, *, whole: bool) -> None:
        self._serving = serving
        self._whole = whole
        self.replayed: list[tuple[int, Delta]] = []
        """What the client has already: it brings whatever reads the deltas to where it was."""
        self._generations = [
            Generation(serving, self, index, job, arrival_s, whole=whole) for index, job in enumerate(jobs)
        ]
        self._num_running = len(jobs)
        self._arrived: list[tuple[int, Delta]] = []
        self._taken: list[Generation] = []
        """Those whose tokens the batch held that was taken last."""
        self._error: RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Answering:
        try:
            for generation in self._generations:
                generation.start()
        except RequestError:
            self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what still runs."""
        for generation in self._generations:
            generation.end(FinishReason.ABORT)
            generation.account()

    async def next(self) -> list[tuple[int, Delta]]:
        """What has come since the last call, waiting for something; empty at the end. Raises RequestError."""
        self._delivered()
        while not self._is_due():
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        arrived, self._arrived = self._arrived, []
        if not self._whole:
            self._taken = [self._generations[index] for index, delta in arrived if delta.token_ids]
        return arrived

    def _delivered(self) -> None:
        """The batch that was taken last is on its way to the client."""
        taken, self._taken = self._taken, []
        now = time.monotonic()
        for generation in taken:
            generation.delivered(now)

    def _is_due(self) -> bool:
        if self._error is not None or not self._num_running:
            return True
        return bool(self._arrived) and not self._whole

    def replay(self, index: int, deltas: list[Delta], *, finished: bool) -> None:
        self.replayed.extend((index, delta) for delta in deltas)
        self._num_running -= finished

    def put(self, index: int, delta: Delta) -> None:
        self._arrived.append((index, delta))
        if delta.finish_reason is not None:
            self._num_running -= 1
            if not self._num_running:
                self._serving.metrics.answered(max(generation.num_tokens for generation in self._generations))
        self._wake()

    def fail(self, error: RequestError) -> None:
        """One error ends the whole."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and self._is_due():
            self._waiter.set_result(None)


class Generation:
    """One job on its way: a sink for the core's outputs that makes deltas of them."""

    __slots__ = (
        "_answering", "_arrival_s", "_ended", "_id", "_index", "_job", "_running", "_serving", "_text", "_times",
        "_whole",
    )  # fmt: skip

    def __init__(
        self, serving: Serving, answering: Answering, index: int, job: Job, arrival_s: float, *, whole: bool
    ) -> None:
        self._serving, self._answering, self._index, self._job = serving, answering, index, job
        self._arrival_s, self._whole = arrival_s, whole
        self._id = serving.client.new_request_id()
        self._running = False
        self._ended: FinishReason | None = None
        """Why, while that is not accounted for."""
        self._text = TextStream(job, serving.detokenizer(job))
        self._times: RequestTimes | None = None

    def start(self) -> None:
        """Raises RequestError."""
        job, delivered = self._job, self._job.delivered
        if delivered is not None:
            self._answering.replay(
                self._index,
                self._text.replay(delivered, self._serving.ready.eos_token_ids),
                finished=delivered.finished,
            )
            if delivered.finished:
                return
        self._times = self._serving.enter(self._id, job, self._arrival_s)
        self._running = True
        add = Add(
            self._id, job.prompt_token_ids, job.params, job.priority, job.cache_salt, job.user, job.timeout_s,
            grammar=job.grammar,
            session_id=job.session_id,
            adapter=job.adapter,
            output_token_ids=[] if delivered is None else delivered.token_ids,
        )  # fmt: skip
        self._serving.client.submit(add, self)

    @property
    def num_tokens(self) -> int:
        return 0 if self._times is None else self._times.num_tokens

    def end(self, reason: FinishReason) -> None:
        """The last thing that happens to it: ends it in the core too, where it may still run."""
        if not self._running or self._times is None:
            return
        self._running = False
        self._serving.client.abort([self._id], FinishReason.STOP if reason is FinishReason.STOP else FinishReason.ABORT)
        self._serving.leave(self._id, self._times)
        self._ended = reason
        if self._whole:
            self.account()

    def account(self) -> None:
        """Its client has got what it will get: once, after the end."""
        if self._ended is not None and self._times is not None:
            self._serving.account(self._id, self._times, self._ended)
            self._ended = None

    def delivered(self, now: float) -> None:
        """Tokens of it were handed to the socket."""
        if self._times is not None:
            self._serving.metrics.delivered(self._times, now)
        self.account()

    def on_output(self, output: RequestOutput, now: float) -> None:
        times = self._times
        if times is None:
            return
        times.num_preemptions = output.num_preemptions
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            if output.stop_reason is None:
                self._serving.metrics.corrupted()
            self.on_error(generation_error(output))
            return
        delta = self._text.feed(output)
        if delta.token_ids:
            if not times.num_tokens:
                self._serving.first_token(times, now)
            metrics = self._serving.metrics
            metrics.generated(times, len(delta.token_ids), output.num_cached_tokens, output.num_host_tokens)
            if self._whole:
                metrics.delivered(times, now)
        if self._job.delivered is not None:  # usage tells of the engine that read the prompt first
            delta = replace(delta, num_cached_tokens=self._job.delivered.num_cached_tokens)
        if delta.finish_reason is not None:
            self.end(delta.finish_reason)
        self._answering.put(self._index, delta)

    def on_error(self, error: RequestError) -> None:
        self.end(FinishReason.ERROR)
        self._answering.fail(error)


def generation_error(output: RequestOutput) -> RequestError:
    message = output.error or "the request was aborted"
    if output.stop_reason == "deadline":
        return RequestError(message, status=504, param="timeout", code="deadline_exceeded")
    if output.stop_reason == "grammar":
        return RequestError(message, code="grammar_failed")
    if output.stop_reason == "asleep":
        return RequestError(message, status=503, code="asleep")
    if output.stop_reason == "model_not_found":
        return RequestError(message, status=404, param="model", code="model_not_found")
    if output.stop_reason == "forbidden":
        return RequestError(message, code="no_token_allowed")
    return RequestError(message, status=500, code="generation_failed")
