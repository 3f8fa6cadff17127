"""The policy against devices whose times and chances are known: nearly as good as the best fixed number of guesses."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from mainsail_engine.config import MAX_SPECULATIVE_ROWS, SpeculativeConfig
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.speculative.policy import HitRates
from mainsail_engine.speculative.speculator import Speculator

BASE_S = 0.005


class Coins:
    """See speculator.Source: each guess is right with the same chance."""

    level_s = last_s = 0.0

    def __init__(self, level_s: float = 0.0) -> None:
        self.level_s, self.rates = level_s, HitRates((0.7, 0.7, 0.7))

    def saw(self, request: Request, tokens: Sequence[int]) -> None: ...

    def settle(self) -> None: ...

    def chances(self, request: Request, most: int) -> list[float]:
        return self.rates.chances(0, most)

    def has_guesses(self, request: Request, count: int) -> bool:
        return True

    def guess(self, wanted: list[tuple[Request, int]]) -> list[list[int]]:
        self.last_s = self.level_s * max(count for _, count in wanted)
        return [[7] * count for _, count in wanted]

    def verified(self, request: Request, num_guesses: int, num_right: int) -> None:
        for position in range(min(num_right + 1, num_guesses)):
            self.rates.note(position, position < num_right)

    def forget(self, request: Request) -> None: ...


def step_s(rows: int, batch: int, free_rows: int, wait: float) -> float:
    """A step reads the weights, and from some rows on computes for longer; with guesses it waits for the host."""
    busy = BASE_S * max(1.0, rows / free_rows)
    return busy if rows == batch else busy + wait * BASE_S


def adaptive_rate(chance: float, batch: int, free_rows: int, wait: float, level_s: float, noise: float) -> float:
    """Tokens per second of a long run."""
    rng, source = random.Random(5), Coins(level_s)
    speculator = Speculator(SpeculativeConfig(method="ngram"), source, cuda=True, overlap=True)
    requests = [Request(str(i), [1], SamplingParams(max_tokens=9), 0.0) for i in range(batch)]
    tokens, seconds, overlapped = 0, 0.0, False
    for step in range(1500):
        waits = not overlapped or speculator.would_guess(requests, batch)
        guesses = speculator.guess(requests, [16] * batch, batch, 8192) if waits else [[] for _ in requests]
        rows = batch + sum(map(len, guesses))
        took = step_s(rows, batch, free_rows, wait) * (1 + noise * rng.random())
        for request, made in zip(requests, guesses, strict=True):
            right = 0
            while right < len(made) and rng.random() < chance:
                right += 1
            if made:
                speculator.verified(request, len(made), right)
            tokens += (1 + right) * (step >= 500)
        if rows == batch:
            source.rates.rest()
        seconds += (took + (source.last_s if rows > batch else 0.0)) * (step >= 500)
        speculator.measured(batch, rows, took + source.last_s * (rows > batch), overlapped=overlapped)
        overlapped = rows == batch
    return tokens / seconds


def fixed_rate(count: int, chance: float, batch: int, free_rows: int, wait: float, level_s: float) -> float:
    """Tokens per second with always so many guesses."""
    expected = batch * sum(chance**ahead for ahead in range(count + 1))
    return expected / (step_s(batch * (1 + count), batch, free_rows, wait) + count * level_s)


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.8, 1.0])
def test_nearly_as_good_as_the_best_fixed_number(batch: int, chance: float) -> None:
    for free_rows, wait, level_s in ((200, 0.1, 0.0), (1000, 0.3, 0.1 * BASE_S), (batch, 0.1, 0.0)):
        counts = range(min(16, (MAX_SPECULATIVE_ROWS - batch) // batch) + 1)
        best = max(fixed_rate(count, chance, batch, free_rows, wait, level_s) for count in counts)
        rate = adaptive_rate(chance, batch, free_rows, wait, level_s, noise=0.05)
        assert rate * 1.025 > 0.85 * best, (free_rows, wait, level_s)
        assert rate * 1.025 > 0.97 * fixed_rate(0, chance, batch, free_rows, wait, level_s)


def test_guessing_that_began_badly_is_tried_again() -> None:
    """A few slow steps at first (another process, say) are not the last word."""
    source = Coins()
    speculator = Speculator(SpeculativeConfig(method="ngram"), source, cuda=True)
    requests = [Request("r", [1], SamplingParams(max_tokens=9), 0.0)]
    verified = 0
    for step in range(1500):
        rows = 1 + len(speculator.guess(requests, [4], 1, 99)[0])
        if rows > 1:
            speculator.verified(requests[0], rows - 1, rows - 1)
        verified += rows > 1 and step >= 1000
        speculator.measured(1, rows, 1.0 if rows > 1 and step < 300 else BASE_S, overlapped=False)
    assert verified > 300
