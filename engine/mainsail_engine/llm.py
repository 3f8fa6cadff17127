"""The engine from Python, as the field is used to:

    llm = LLM(model="…")
    for output in llm.generate(["Hello", {"prompt_token_ids": [1, 2]}], SamplingParams(max_tokens=8)):
        print(output.outputs[0].text)

The same core process and the same checks as behind HTTP: only the transport is missing. An event loop of its own runs
on a thread; `close` (or leaving the `with` block, or the end of the program) ends both.
"""

from __future__ import annotations

import asyncio
import atexit
import sys
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import msgspec
from pydantic import ValidationError

from mainsail_engine.cli import check_model_path
from mainsail_engine.client import EngineClient
from mainsail_engine.config import (
    CacheConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from mainsail_engine.core_process import start_core
from mainsail_engine.metrics import Metrics
from mainsail_engine.protocol import FirstScheduled, StepOutputs, TokenLogprobs
from mainsail_engine.request import Pooling
from mainsail_engine.request import SamplingParams as CoreParams
from mainsail_engine.server.admission import Admission
from mainsail_engine.server.answers import Answer, collect
from mainsail_engine.server.chat import as_template_messages
from mainsail_engine.server.constraints import content_grammar
from mainsail_engine.server.embeddings import vector_of
from mainsail_engine.server.errors import from_validation
from mainsail_engine.server.logprobs import TokenTexts
from mainsail_engine.server.schemas import ChatCompletionRequest, CompletionRequest
from mainsail_engine.server.serving import Job, Serving
from mainsail_engine.text.embedding import read_embedding_form
from mainsail_engine.text.tokenizer import load_tokenizer

T = TypeVar("T")
UNBOUNDED = 2**62


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


Prompt = str | TokensPrompt
Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the text must conform to: exactly one of the first six."""

    json: dict[str, Any] | str | None = None
    """A JSON Schema, or its text."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    """EBNF; the first rule is `root`."""
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to pick tokens and when to stop. What is left out has the API's default; max_tokens None: all that fits."""

    max_tokens: int | None = 16
    min_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logprobs: int | None = None
    """With each token its log-probability and those of so many best ones."""
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | None = None


@dataclass(frozen=True, slots=True)
class Logprob:
    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token: its own log-probability and those of the best, by token id."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt's answers."""

    prompt: str | None
    """None where token ids were given."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each prompt position; the first has none."""


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """One prompt's embedding; of length 1 unless the model's files or the caller say otherwise."""

    prompt_token_ids: list[int]
    embedding: list[float]


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """A LoRA adapter to go through: loaded from its path when its name is first used."""

    lora_name: str
    lora_int_id: int
    """For the field's spelling; the name is what counts here."""
    lora_path: str


class LLM:
    """One model, loaded. Raises StartupError when it cannot be, and ValueError for parameters that make no sense."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        load_format: str = "auto",
        quantization: str = "auto",
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = SchedulerConfig().max_num_seqs,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = CacheConfig().memory_utilization,
        kv_cache_blocks: int | None = None,
        enable_prefix_caching: bool = True,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        speculative_config: dict[str, Any] | None = None,
        device: str = "auto",
        enable_lora: bool = False,
        max_loras: int = LoraConfig().max_loras,
        max_cpu_loras: int | None = None,
        max_lora_rank: int = LoraConfig().max_lora_rank,
    ) -> None:
        self._config = EngineConfig(
            model=ModelConfig(
                path=model, dtype=dtype, load_format=load_format, quantization=quantization, max_model_len=max_model_len
            ),
            cache=CacheConfig(
                dtype=kv_cache_dtype,
                num_blocks=kv_cache_blocks,
                memory_utilization=gpu_memory_utilization,
                enable_prefix_caching=enable_prefix_caching,
            ),
            scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
            speculative=None if speculative_config is None else msgspec.convert(speculative_config, SpeculativeConfig),
            lora=(
                LoraConfig(max_loras=max_loras, max_cpu_loras=max_cpu_loras, max_lora_rank=max_lora_rank)
                if enable_lora
                else None
            ),
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            device=device,
        )
        check_model_path(self._config.model)
        self._serving: Serving | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-client", daemon=True)
        self._thread.start()
        self._client = EngineClient(
            start_core(self._config), on_step=self._on_step, on_first_scheduled=self._on_first_scheduled
        )
        atexit.register(self.close)
        try:
            self._serving = self._call(self._start())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the core process. Safe to call twice."""
        if not self._thread.is_alive():
            return
        self._call(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        atexit.unregister(self.close)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; the outputs are in the prompts' order."""
        many: list[Prompt] = [prompts] if isinstance(prompts, str | dict) else list(prompts)
        each = _spread(sampling_params, len(many))
        return self._call(self._generate(many, each, _Progress(len(many), shown=use_tqdm), lora_request))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several; or go on with their last messages (continue_final_message)."""
        single = bool(messages) and isinstance(messages[0], dict)
        many = cast("list[Messages]", [messages] if single else list(messages))
        each = _spread(sampling_params, len(many))
        fields: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": chat_template_kwargs,
        }
        prompts: list[Prompt] = [{"prompt_token_ids": ids} for ids in self._call(self._render(many, fields))]
        return self._call(self._generate(prompts, each, _Progress(len(many), shown=use_tqdm), lora_request))

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: str | None = None, normalize: bool | None = None
    ) -> list[EmbeddingOutput]:
        """One vector for each prompt: the mean of its last hidden states, the last ("last") or the first one ("cls").

        None: as the model's files say, else the mean, of length 1.
        """
        many: list[Prompt] = [prompts] if isinstance(prompts, str | dict) else list(prompts)
        form = self._started.embedding_form
        chosen = Pooling(pooling) if pooling else form.pooling
        return self._call(self._embed(many, chosen, form.normalize if normalize is None else normalize))

    def sleep(self) -> None:
        """Weights to the host, KV dropped: the device's memory is free until `wake_up`."""
        self._call(self._started.sleep())

    def wake_up(self) -> None:
        self._call(self._started.wake_up())

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self) -> Serving:
        ready = await self._client.start()
        path = Path(self._config.model.path)
        return Serving(
            client=self._client,
            tokenizer=load_tokenizer(path),
            metrics=Metrics(path.name, ready.max_model_len),
            admission=Admission(max_requests=UNBOUNDED, max_tokens=UNBOUNDED),
            ready=ready,
            model_names=(path.name,),
            model_path=str(path),
            embedding_form=read_embedding_form(path),
        )

    @property
    def _started(self) -> Serving:
        if self._serving is None:
            raise RuntimeError("the engine is closed")
        return self._serving

    async def _render(self, conversations: list[Messages], fields: dict[str, Any]) -> list[list[int]]:
        rendered: list[list[int]] = []
        for messages in conversations:
            request = _validated(ChatCompletionRequest, {"model": "", "messages": messages, **fields})
            text = self._started.render_chat(
                as_template_messages(request.messages),
                add_generation_prompt=request.add_generation_prompt is not False,
                continue_final_message=bool(request.continue_final_message),
                variables=request.chat_template_kwargs,
            )
            rendered.append(await self._started.encode(text, add_special_tokens=False, param="messages"))
        return rendered

    async def _generate(
        self, prompts: list[Prompt], params: list[SamplingParams], progress: _Progress, lora: LoRARequest | None
    ) -> list[RequestOutput]:
        """All are checked before the first one starts."""
        self._started.check_generates()
        jobs = [await self._jobs(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        if lora is not None:
            if lora.lora_name not in self._client.adapters:
                await self._started.load_adapter(lora.lora_name, lora.lora_path)
            jobs = [[replace(job, adapter=lora.lora_name) for job in own] for own in jobs]
        arrival_s = time.monotonic()

        async def one(prompt: Prompt, own: list[Job]) -> RequestOutput:
            answers = await collect(self._started, own, arrival_s)
            progress.add(sum(len(answer.token_ids) for answer in answers))
            return _output(prompt, own[0], answers, TokenTexts(self._started.tokenizer))

        tasks = [asyncio.create_task(one(prompt, own)) for prompt, own in zip(prompts, jobs, strict=True)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            progress.end()

    async def _embed(self, prompts: list[Prompt], pooling: Pooling, normalize: bool) -> list[EmbeddingOutput]:
        params = CoreParams(max_tokens=1, temperature=0.0, pooling=pooling)
        jobs = [Job(await self._token_ids(prompt), params) for prompt in prompts]
        for job in jobs:
            self._started.check_prompt(job.prompt_token_ids, param="prompt")
        answers = await collect(self._started, jobs, time.monotonic())
        return [
            EmbeddingOutput(job.prompt_token_ids, [float(value) for value in vector_of(answer, normalize=normalize)])
            for job, answer in zip(jobs, answers, strict=True)
        ]

    async def _token_ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return prompt["prompt_token_ids"]
        return await self._started.encode(prompt, add_special_tokens=True, param="prompt")

    async def _jobs(self, prompt: Prompt, params: SamplingParams) -> list[Job]:
        given = prompt if isinstance(prompt, str) else prompt["prompt_token_ids"]
        fields = asdict(params)
        if params.structured_outputs is not None:
            fields["structured_outputs"] = {k: v for k, v in fields["structured_outputs"].items() if v is not None}
        if params.logit_bias is not None:
            fields["logit_bias"] = {str(token): value for token, value in params.logit_bias.items()}
        body = _validated(CompletionRequest, {"model": "", "prompt": given, **fields})
        ids, serving = await self._token_ids(prompt), self._started
        if body.truncate_prompt_tokens is not None:
            ids = ids[-body.truncate_prompt_tokens :]
        max_tokens = serving.check_length(ids, body.max_tokens, param="prompt", max_tokens_param="max_tokens")
        jobs = serving.make_jobs(body, ids, max_tokens, logprobs=body.logprobs, prompt_logprobs=body.prompt_logprobs)
        grammar = content_grammar(body)
        if grammar is None:
            return jobs
        await serving.compile(grammar[0], param=grammar[1], timeout_s=None)
        return [replace(job, grammar=grammar[0]) for job in jobs]

    def _on_step(self, step: StepOutputs) -> None:
        if self._serving is not None:
            self._serving.metrics.step(step)

    def _on_first_scheduled(self, first: FirstScheduled) -> None:
        if self._serving is not None:
            self._serving.first_scheduled(first)


M = TypeVar("M", CompletionRequest, ChatCompletionRequest)


def _validated(kind: type[M], fields: dict[str, Any]) -> M:
    """The server's own checks; a problem names its field."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise ValueError(from_validation(error.errors()).message) from None


def _spread(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One for each prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts: give one, or one for each")
    return list(params)


def _output(prompt: Prompt, job: Job, answers: list[Answer], texts: TokenTexts) -> RequestOutput:
    outputs = [
        CompletionOutput(
            index, answer.text, answer.token_ids, answer.finish_reason, answer.stop_reason,
            [_logprobs(entry, texts) for entry in answer.logprobs] if job.params.logprobs is not None else None,
        )
        for index, answer in enumerate(answers)
    ]  # fmt: skip
    text = prompt if isinstance(prompt, str) else None
    of_prompt: list[dict[int, Logprob] | None] | None = None
    if job.params.prompt_logprobs is not None:
        of_prompt = [None, *(_logprobs(entry, texts) for entry in answers[0].prompt_logprobs)]
    return RequestOutput(text, job.prompt_token_ids, outputs, answers[0].num_cached_tokens, of_prompt)


def _logprobs(entry: TokenLogprobs, texts: TokenTexts) -> dict[int, Logprob]:
    own, *best = zip(entry.token_ids, entry.logprobs, strict=True)
    table = {token: Logprob(value, rank, texts.text(token)) for rank, (token, value) in enumerate(best, 1)}
    return table | {own[0]: Logprob(own[1], entry.rank, texts.text(own[0]))}


class _Progress:
    """One line on stderr that is written over and over; nothing where stderr is no terminal."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._total, self._done, self._tokens = total, 0, 0
        self._shown = shown and sys.stderr.isatty()
        self._began_s = time.monotonic()

    def add(self, tokens: int) -> None:
        self._done += 1
        self._tokens += tokens
        if self._shown:
            rate = self._tokens / max(time.monotonic() - self._began_s, 1e-9)
            bar = ("#" * (30 * self._done // self._total)).ljust(30)
            print(f"\r[{bar}] {self._done}/{self._total}, {rate:.0f} tokens/s", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._shown:
            print(file=sys.stderr)
