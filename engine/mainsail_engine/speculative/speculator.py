"""When to guess, and how much: between the scheduler, which plans, and a source, which guesses.

A step with guesses runs alone: its requests' next positions depend on how many guesses are right, and the next guesses
on the tokens themselves, so nothing is launched until both are on the CPU. That costs the host's part of a step (some
tenths of a millisecond), once for all tokens that the step brings, and only where the policy finds that guessing pays
for it: the measured times have it in them. Where guessing does not pay, steps overlap as ever.

While it does, a few steps without guesses are run now and then, so that what guessing is compared with stays true;
where a measured time alone speaks against it, it is tried again once in a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from mainsail_engine.config import SpeculativeConfig
from mainsail_engine.request import Request
from mainsail_engine.speculative.ngram import NgramSource
from mainsail_engine.speculative.policy import FREE_ROWS, StepTimes, choose_lengths

COMPARE_EVERY = 400
"""After so many steps with guesses, some without."""
COMPARE_STEPS = 6
RETRY_AFTER, RETRY_AT_MOST = 100, 1600
"""After so many steps that guessing might have paid in, but for a measured time, one with a guess each; twice as many
after each that changes nothing."""
WORTH_TRYING = 0.25
"""Right guesses to be expected, for each decode, of a step that guessing might pay in."""


class Source(Protocol):
    """Where guesses come from."""

    level_s: float
    """Seconds that one more guess takes, for any number of requests."""
    last_s: float
    """Seconds that the last `guess` took."""

    def saw(self, request: Request, tokens: Sequence[int]) -> None:
        """The request's next output tokens, after they were appended."""
        ...

    def settle(self) -> None:
        """The device is busy: what was put off may be done now."""
        ...

    def chances(self, request: Request, most: int) -> list[float]:
        """For each of the request's next guesses that it is right, with all before it. Empty: there are none."""
        ...

    def has_guesses(self, request: Request, count: int) -> bool:
        """Whether there are any for the request, where so many are wanted."""
        ...

    def guess(self, wanted: list[tuple[Request, int]]) -> list[list[int]]:
        """At most so many guesses for each; every token of these requests is known."""
        ...

    def verified(self, request: Request, num_guesses: int, num_right: int) -> None: ...

    def forget(self, request: Request) -> None:
        """It is finished."""
        ...


@dataclass(slots=True)
class SpeculationCounts:
    """Since the start."""

    num_drafts: int = 0
    """Times that a request's guesses were verified."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    drafts_by_right: list[int] = field(default_factory=list[int])
    """Of the drafts those of which so many guesses were right, 0, 1, …"""

    @property
    def accepted_per_position(self) -> list[int]:
        """Drafts of which the first guess was right, the first two, …"""
        return list(accumulate(reversed(self.drafts_by_right[1:])))[::-1]


class Speculator:
    def __init__(
        self, config: SpeculativeConfig, source: Source | None = None, *, cuda: bool = False, overlap: bool = False
    ) -> None:
        """source: None for the request's own text. overlap: steps without guesses are planned ahead."""
        self.source: Source = source or NgramSource(*config.ngram_sizes)
        self._adaptive = config.adaptive
        self._most, self._max_rows = config.max_guesses, config.max_step_rows
        self._overlap = overlap
        self.times = StepTimes(FREE_ROWS["cuda" if cuda else "cpu"])
        self.counts = SpeculationCounts(drafts_by_right=[0] * (self._most + 1))
        self._since_compared = self._comparing = self._spoken_against = 0
        self._retry_after = RETRY_AFTER

    # -- what happens ------------------------------------------------------------------------------------------------

    def measured(self, batch: int, rows: int, seconds: float, *, overlapped: bool) -> None:
        """A step of `batch` decodes and nothing else, with rows - batch guesses, took so long."""
        if rows > batch:
            self._since_compared += 1
        elif overlapped != self._overlap:
            return  # the first after some that waited for their guesses: not how such steps run
        self.times.observe(batch, rows, seconds - (self.source.last_s if rows > batch else 0.0))

    def verified(self, request: Request, num_guesses: int, num_right: int) -> None:
        counts = self.counts
        counts.num_drafts += 1
        counts.num_draft_tokens += num_guesses
        counts.num_accepted_tokens += num_right
        counts.drafts_by_right[num_right] += 1
        self.source.verified(request, num_guesses, num_right)

    # -- what to do --------------------------------------------------------------------------------------------------

    def would_guess(self, requests: list[Request], batch: int) -> bool:
        """Whether the next step is to have guesses, as far as can be known before the step in flight is read."""
        max_guesses = self._max_rows - batch
        return max_guesses > 0 and any(self._lengths(requests, [self._most] * len(requests), batch, max_guesses))

    def guess(self, requests: list[Request], room: list[int], batch: int, max_guesses: int) -> list[list[int]]:
        """Guesses for the next step, none or some for each; at most room[i] for requests[i], max_guesses in all.

        Every token of these requests must be known.
        """
        lengths = self._lengths(requests, room, batch, min(max_guesses, self._max_rows - batch))
        wanted = [(request, count) for request, count in zip(requests, lengths, strict=True) if count]
        if not wanted:
            return [[] for _ in requests]
        if self._spoken_against >= self._retry_after:
            self._retry_after = min(2 * self._retry_after, RETRY_AT_MOST)
        else:
            self._retry_after = RETRY_AFTER
        self._spoken_against = 0
        if self._since_compared >= COMPARE_EVERY:
            self._since_compared, self._comparing = 0, COMPARE_STEPS
        if len(wanted) == len(requests):
            return self.source.guess(wanted)
        made = iter(self.source.guess(wanted))
        return [next(made) if count else [] for count in lengths]

    def _lengths(self, requests: list[Request], room: list[int], batch: int, max_guesses: int) -> list[int]:
        if not self._adaptive:
            return self._as_they_come(requests, room, max_guesses)
        chances = self.source.chances
        rows = [
            chances(request, min(most, self._most)) if most > 0 else []
            for request, most in zip(requests, room, strict=True)
        ]
        if self._comparing:
            self._comparing -= 1
            return [0] * len(rows)
        if not any(rows):
            return [0] * len(rows)
        if self._spoken_against >= self._retry_after:
            return [min(1, len(row)) for row in rows] if batch <= max_guesses else [0] * len(rows)
        most = min(max_guesses, self.times.trusted(batch))
        lengths = choose_lengths(rows, batch, self.times, max_guesses=most, level_s=self.source.level_s)
        if not any(lengths) and sum(map(sum, rows)) > WORTH_TRYING * batch:
            self._spoken_against += 1
        return lengths

    def _as_they_come(self, requests: list[Request], room: list[int], max_guesses: int) -> list[int]:
        """Without a policy: as many as there is room for, wherever there are guesses at all."""
        has_guesses, most, lengths = self.source.has_guesses, self._most, list[int]()
        for request, count in zip(requests, room, strict=True):
            count = min(count, most, max_guesses)
            lengths.append(count if count > 0 and has_guesses(request, count) else 0)
            max_guesses -= lengths[-1]
        return lengths
