"""Deltas gathered into whole answers, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mainsail_engine.protocol import TokenLogprobs
from mainsail_engine.request import FinishReason
from mainsail_engine.server.serving import Delta, Job, Serving


@dataclass(slots=True)
class Answer:
    parts: list[str] = field(default_factory=list[str])
    token_ids: list[int] = field(default_factory=list[int])
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    """One for each token, if they were asked for."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    """Of the prompt's tokens from the second on, if they were asked for."""
    embedding: bytes | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def add(self, delta: Delta, *, keep_text: bool = True) -> None:
        if keep_text:
            self.parts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.logprobs and keep_text:
            self.logprobs.extend(delta.logprobs)
        if delta.prompt_logprobs:
            self.prompt_logprobs.extend(delta.prompt_logprobs)
        if delta.embedding is not None:
            self.embedding = delta.embedding


async def collect(serving: Serving, jobs: list[Job], arrival_s: float) -> list[Answer]:
    """All answers, in the jobs' order. Raises RequestError."""
    answers = [Answer() for _ in jobs]
    async with serving.answer(jobs, arrival_s, whole=True) as answering:
        for index, delta in await answering.next():
            answers[index].add(delta)
    return answers


def usage(prompts: list[Job], answers: list[Answer]) -> dict[str, Any]:
    """Each prompt counts once, however many answers it got. Cached tokens: those of the first answer to each."""
    prompt_tokens = sum(len(job.prompt_token_ids) for job in prompts)
    completion_tokens = sum(len(answer.token_ids) for answer in answers)
    per_prompt = len(answers) // len(prompts)
    cached_tokens = sum(answers[index * per_prompt].num_cached_tokens for index in range(len(prompts)))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
