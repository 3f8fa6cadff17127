"""How many tokens to guess: as many as make the step's tokens per second highest, and none where none do.

    tokens of a step    =  batch + the sum of each guess's chance to be right (with all before it)
    seconds of a step   =  measured: of steps without guesses by batch, of steps with guesses by rows
    worth               =  tokens / seconds, for the best n guesses of the batch; against the same without any

A guess's chance falls the further it looks ahead, so the best n of a batch are a beginning of each request's guesses:
long ones where they have been right, none where they have not. Nothing about the device or the model is known
beforehand but roughly where rows begin to cost (`FREE_ROWS`); what is wrong about that is measured away.

Pure: times come in as arguments.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import chain

import numpy as np

RUNS = (2, 8)
"""Guesses are told apart by how many were right just before: fewer than 2, fewer than 8, more."""
FADE = 0.92
"""What a guess of the past counts for, with each that follows it."""
PRIOR_WEIGHT = 2.0
"""Guesses that the first estimate is worth."""
LEAST_CHANCE = 0.02
"""Guesses below this are not considered."""
MARGIN = 1.03
"""Guessing must promise so much more than not guessing: estimates err."""
WAIT = 1.05
"""How much longer than a step without guesses one with a few is taken to be, until it is measured: nothing overlaps."""
FREE_ROWS = {"cuda": 192, "cpu": 1}
"""Rows up to which a step costs little more than reading the weights."""
FIRST_GUESSES = 4
"""… and of the first, or one for each decode."""
SMOOTHING = 0.2
FORGOTTEN_AFTER = 1000
"""Steps without one of its size after which a measured time is forgotten."""
REST = 0.99
"""What a request's past guesses count for, with each token that came without one being compared or verified."""
OUTLIER = 3.0
"""A step so many times as long as expected says something about the machine, not about steps; so many times as short,
that the ones before it did."""


class HitRates:
    """How often a request's guesses are right, by how many before them were; recent ones count more."""

    __slots__ = ("_fade", "_hits", "_prior", "_tries", "_weight")

    def __init__(self, prior: Sequence[float], *, weight: float = PRIOR_WEIGHT, fade: float = FADE) -> None:
        """prior: the chances to begin with, one for each class of RUNS and one more; weight: in guesses."""
        self._fade, self._prior, self._weight = fade, tuple(prior), weight
        self._hits = [chance * weight for chance in prior]
        self._tries = [weight] * len(prior)

    def note(self, run: int, hit: bool) -> None:
        """A guess after `run` right ones was right, or not."""
        at = bisect_right(RUNS, run)
        self._hits[at] = self._hits[at] * self._fade + hit
        self._tries[at] = self._tries[at] * self._fade + 1

    def rest(self) -> None:
        """A token came, and told nothing of guesses: what is known fades towards where it began."""
        for at, chance in enumerate(self._prior):
            began = chance * self._weight
            self._hits[at] = began + REST * (self._hits[at] - began)
            self._tries[at] = self._weight + REST * (self._tries[at] - self._weight)

    def chance(self, run: int) -> float:
        """That the next guess is right, after so many right ones: 0 .. 1."""
        at = bisect_right(RUNS, run)
        return self._hits[at] / self._tries[at]

    def means(self) -> list[float]:
        """The chance of each class."""
        return [hits / tries for hits, tries in zip(self._hits, self._tries, strict=True)]

    def chances(self, run: int, most: int) -> list[float]:
        """For each of the next guesses that it is right, with all before it: falling; `most` at most, one at least."""
        chances: list[float] = []
        together, at, means = 1.0, bisect_right(RUNS, run), self.means()
        for ahead in range(run, run + most):
            if at < len(RUNS) and ahead >= RUNS[at]:
                at += 1
            together *= means[at]
            if together < LEAST_CHANCE and chances:
                break
            chances.append(together)
        return chances


class _Curve:
    """Seconds by a count, each measured point smoothed over time; counts are told apart by about a tenth.

    What was not measured for long is forgotten: contexts grow, and what slowed a step down may be over.
    """

    def __init__(self) -> None:
        self._points: dict[int, tuple[float, float, int]] = {}
        """(count, seconds, number of the observation that touched it last)."""
        self._num_observed = 0
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None

    def observe(self, count: int, seconds: float) -> None:
        self._num_observed += 1
        key, now = round(8 * math.log2(count)), self._num_observed
        known = self._points.get(key)
        if known is None or seconds * OUTLIER < known[1]:
            self._points[key] = (count, seconds, now)
        else:
            seconds = min(seconds, OUTLIER * known[1])
            self._points[key] = (_towards(known[0], count), _towards(known[1], seconds), now)
        if now % (FORGOTTEN_AFTER // 4) == 0:
            self._points = {key: each for key, each in self._points.items() if each[2] > now - FORGOTTEN_AFTER}
        self._sorted = None

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """(counts, seconds), by count."""
        if self._sorted is None:
            known = sorted(self._points.values())
            self._sorted = np.array([c for c, _, _ in known], float), np.array([s for _, s, _ in known], float)
        return self._sorted


def _towards(old: float, new: float) -> float:
    return old + SMOOTHING * (new - old)


class StepTimes:
    """What steps take, with and without guesses, from those that were measured."""

    def __init__(self, free_rows: int) -> None:
        self._free_rows = free_rows
        self._plain, self._guessing = _Curve(), _Curve()

    def observe(self, batch: int, rows: int, seconds: float) -> None:
        """A step of `batch` decodes took so long, with rows - batch guesses."""
        (self._plain if rows == batch else self._guessing).observe(rows, max(seconds, 1e-6))

    def plain(self, batch: int) -> float | None:
        """Seconds of a step without guesses; None: no step was measured."""
        counts, seconds = self._plain.points()
        if not len(counts):
            return None
        nearest = bisect_left(counts.tolist(), batch)
        if nearest == len(counts):
            return float(seconds[-1] * self._growth(np.array([batch]))[0] / self._growth(counts[-1:])[0])
        return float(np.interp(batch, counts, seconds))

    def guessing(self, batch: int, rows: np.ndarray) -> np.ndarray:
        """Seconds of steps of `batch` decodes with so many rows (more than batch), [n] as rows is.

        Between two measured points a line; beyond the last, and where nothing was measured, as rows cost by FREE_ROWS.
        Never less than the step without guesses.
        """
        floor = self.plain(batch) or 0.0
        counts, seconds = self._guessing.points()
        above = counts > batch
        counts = np.concatenate(([float(batch)], counts[above]))
        seconds = np.maximum.accumulate(np.concatenate(([WAIT * floor], seconds[above])))
        inside = np.interp(rows, counts, seconds)
        beyond = seconds[-1] * self._growth(rows) / self._growth(counts[-1:])
        return np.maximum(np.where(rows > counts[-1], beyond, inside), floor)

    def trusted(self, batch: int) -> int:
        """How many guesses a step of `batch` decodes may have: not many more than the times of were measured."""
        counts, _ = self._guessing.points()
        return max(FIRST_GUESSES, batch, 2 * (int(counts[-1]) - batch) if len(counts) else 0)

    def _growth(self, rows: np.ndarray) -> np.ndarray:
        """What so many rows cost before anything was measured, relative to none: an optimistic guess."""
        if self._free_rows <= 1:
            return 1.0 + rows / 8
        return 1.0 + 0.25 * np.maximum(rows - self._free_rows, 0) / self._free_rows


def choose_lengths(
    chances: Sequence[Sequence[float]],
    batch: int,
    times: StepTimes,
    *,
    max_guesses: int,
    level_s: float = 0.0,
    margin: float = MARGIN,
) -> list[int]:
    """How many guesses of each request to verify in the next step of `batch` decodes.

    chances: for each request that may guess, those of its guesses (see HitRates.chances). max_guesses: of all together.
    level_s: what it takes to make one more guess for any number of requests (a draft model's step). All are 0 where
    guessing does not promise `margin` times the tokens per second, and before a step without guesses was measured.
    """
    none = [0] * len(chances)
    plain_s = times.plain(batch)
    longest = max(map(len, chances), default=0)
    if plain_s is None or not longest or max_guesses < 1:
        return none
    best, best_rate = none, margin * batch / plain_s
    for depth in range(1, longest + 1) if level_s > 0 else (longest,):
        cut = chances if depth == longest else [row[:depth] for row in chances]
        flat = np.sort(np.fromiter(chain.from_iterable(cut), np.float64))[::-1][:max_guesses]
        rows = batch + np.arange(1, len(flat) + 1)
        rates = (batch + np.cumsum(flat)) / (times.guessing(batch, rows) + level_s * depth)
        at = int(np.argmax(rates))
        if rates[at] > best_rate:
            best, best_rate = _cut_at(cut, float(flat[at]), at + 1), float(rates[at])
    return best


def _cut_at(chances: Sequence[Sequence[float]], least: float, count: int) -> list[int]:
    """The `count` guesses with the best chances, `least` the smallest of them. Of equal ones the first."""
    lengths = [sum(1 for chance in row if chance > least) for row in chances]
    left = count - sum(lengths)
    for index, row in enumerate(chances):
        equal = min(left, sum(1 for chance in row if chance == least))
        lengths[index] += equal
        left -= equal
    return lengths
