"""Deltas gathered into whole answers, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mainsail_engine.protocol import TokenLogprobs
from mainsail_engine.request import FinishReason
from mainsail_engine.server.answer_format import AnswerReader
from mainsail_engine.server.serving import Delta, Job, Serving
from mainsail_engine.server.tools.events import Event


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
    reader: AnswerReader | None = None
    """Tells content, reasoning and calls apart. None: all of the text is content."""
    events: list[Event] = field(default_factory=list[Event])
    """What the reader found, if it is kept."""
    num_reasoning_tokens: int = 0

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def add(self, delta: Delta, *, keep_text: bool = True) -> list[Event]:
        """Take what came. Returns what the reader made of it."""
        events = self._read(delta, self.reader) if self.reader is not None else []
        if keep_text:
            self.parts.append(delta.text)
            self.events += events
        self.token_ids.extend(delta.token_ids)
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.logprobs and keep_text:
            self.logprobs.extend(delta.logprobs)
        if delta.prompt_logprobs and keep_text:
            self.prompt_logprobs.extend(delta.prompt_logprobs)
        if delta.embedding is not None:
            self.embedding = delta.embedding
        return events

    def _read(self, delta: Delta, reader: AnswerReader) -> list[Event]:
        self.num_reasoning_tokens += len(delta.token_ids) if reader.reasons else 0
        events = reader.feed(delta.text)
        return events if delta.finish_reason is None else events + reader.finish()


class PromptFirst:
    """Holds a stream's deltas back until the log-probabilities of their prompt are there, which its first event tells.

    They come with the first of the n answers to each prompt, chunk by chunk; the other answers may be ahead of it. What
    all n have told is forgotten.
    """

    def __init__(self, jobs: Sequence[Job], n: int, *, needed: bool) -> None:
        """jobs: all answers to the first prompt, then all to the second, …"""
        self._n = n
        self._missing = [len(job.prompt_token_ids) - 1 if needed else 0 for job in jobs[::n]]
        self._entries: list[list[TokenLogprobs]] = [[] for _ in self._missing]
        self._untold = [n] * len(self._missing)
        self._held: list[list[tuple[int, Delta]]] = [[] for _ in self._missing]

    def release(self, index: int, delta: Delta) -> list[tuple[int, Delta]]:
        """What may be shown now that this delta has come."""
        prompt, entries = index // self._n, delta.prompt_logprobs or []
        if self._missing[prompt] > 0:
            self._entries[prompt] += entries
            self._missing[prompt] -= len(entries)
            self._held[prompt].append((index, delta))
            if self._missing[prompt] > 0:
                return []
            held, self._held[prompt] = self._held[prompt], []
            return held
        return [(index, delta)]

    def tell(self, index: int) -> list[TokenLogprobs]:
        """Those of the answer's prompt, from its second token on. To be asked once for each answer."""
        prompt = index // self._n
        entries = self._entries[prompt]
        self._untold[prompt] -= 1
        if not self._untold[prompt]:
            self._entries[prompt] = []
        return entries


async def collect(
    serving: Serving, jobs: list[Job], arrival_s: float, readers: Sequence[AnswerReader | None] = ()
) -> list[Answer]:
    """All answers, in the jobs' order. Raises RequestError."""
    answers = [Answer(reader=reader) for reader in readers or [None] * len(jobs)]
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
    shown: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    if any(answer.reader is not None for answer in answers):
        reasoning_tokens = sum(answer.num_reasoning_tokens for answer in answers)
        shown["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return shown
