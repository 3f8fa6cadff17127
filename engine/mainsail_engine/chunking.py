"""How much prefill a step may carry while others decode: as much as keeps the time between tokens under a target.

    step time  =  w · (1, decodes, their context, prefill tokens, their attention)        learned while it runs
    chunk      =  the most prefill tokens for which that stays under the target

Every finished step is a measurement: what it computed, and how long it took. The five weights are the non-negative
least squares of relative errors over the last few hundred steps; the device, the model and the length of contexts need
not be known. Steps with and without prefill are remembered apart, so that an hour of decoding does not wash out what
prefill costs. Nothing is trusted far from what was measured: beside decodes a chunk is at most twice as large as the
largest of the last few. Prefill never starves: MIN_CHUNK tokens go with every step, whatever the target.

A step that was over before the host asked for it, because the host launched or collected something meanwhile, seems
longer than it was, and the next one shorter; the short one would weigh most. Such steps are measured together with
those after them, up to one whose end was waited for: features and times add up.

Pure: times come in as arguments. The idea of a token budget from a latency objective is Sarathi-Serve's (Agrawal et
al., 2024), which profiles it beforehand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

MIN_CHUNK = 32
"""Prefill tokens that a step carries at least."""
FIRST_CHUNK = 256
"""… and at most, beside decodes, before anything was measured."""
AIM = 0.8
"""Share of the target that a step is planned for: the rest is for what the fit misses."""
MEMORY = 300
"""Steps of either kind that the fit remembers, fading."""
RECENT = 16
"""Steps with prefill whose largest chunk bounds the next one."""
SPREAD_ROWS = 512
"""Rows of a step with prompts, if there is work for so many: with fewer each costs more (an 8B model on an H200: 44 µs
at 256 rows, 31 at 512), with more little less (26 at 1,024)."""
SPREAD_STEPS = 32
"""A backlog of prompts is spread over at most so many steps while requests decode."""
STEP_ROWS = (64, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536)
"""What small mixed steps are padded to on CUDA (runner/cuda_graphs.py). Not to 448 rows, which took longer than 512 on
an H200 (19.0 against 15.7 ms with 60 decodes of an 8B model: cuBLAS)."""
SWEEPS = 8
"""Rounds of coordinate descent before a prediction: it starts where it ended the last time."""
MERGED = 16
"""So many steps at most are measured together; where the host is always late, its pace is what a step takes."""
SCALES = (1.0, 1e2, 1e5, 1e3, 1e7)
"""Typical sizes of the five features: the fit sees them as numbers around one."""
RIDGE = 1e-4
"""Pulls weights of which nothing is known to zero."""


@dataclass(slots=True, frozen=True)
class StepWork:
    """What a step computes, or several together."""

    decodes: int = 0
    decode_context: int = 0
    """Tokens in the contexts of those decodes, together."""
    prefill_tokens: int = 0
    prefill_attention: int = 0
    """Pairs of a prefill token and a token that it attends to."""
    steps: int = 1
    """How many."""

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(
            self.decodes + other.decodes,
            self.decode_context + other.decode_context,
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_attention + other.prefill_attention,
            self.steps + other.steps,
        )

    def features(self) -> list[float]:
        raw = (self.steps, self.decodes, self.decode_context, self.prefill_tokens, self.prefill_attention)
        return [value / scale for value, scale in zip(raw, SCALES, strict=True)]


def attention_pairs(start: int, num_tokens: int) -> int:
    """Pairs for the positions [start, start + num_tokens): each attends to all before it and itself."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


def spread(backlog: int, num_decodes: int) -> int:
    """Prefill tokens for the next step, when `backlog` of them wait and so many requests decode.

    A lone prompt goes along with some steps of the decodes rather than holding them all up in one; a long backlog is
    worked off at full chunks. Between the two a steady flow of prompts finds steps that are all alike, instead of some
    that compute prompts and many that wait for the weights.
    """
    return max(SPREAD_ROWS - num_decodes, SPREAD_ROWS // 2, -(-backlog // SPREAD_STEPS))


def filled(budget: int, num_decodes: int, sizes: Sequence[int] = STEP_ROWS) -> int:
    """The budget, cut so that decodes and prompts together fill one of sizes: padding is work for nothing.

    A step beyond the largest of them is not padded.
    """
    rows = num_decodes + budget
    full = max((size for size in sizes if num_decodes + MIN_CHUNK <= size <= rows), default=rows)
    return budget if rows > sizes[-1] else full - num_decodes


class _Moments:
    """Fading sums over steps: of products of features, and of features, each divided by the step's time."""

    def __init__(self) -> None:
        size = len(SCALES)
        self.products = [[0.0] * size for _ in range(size)]
        self.sums = [0.0] * size

    def add(self, features: list[float], seconds: float) -> None:
        x, fade = [value / seconds for value in features], 1 - 1 / MEMORY
        self.products = [[fade * p + xi * xj for p, xj in zip(row, x, strict=True)]
                         for row, xi in zip(self.products, x, strict=True)]  # fmt: skip
        self.sums = [fade * s + xi for s, xi in zip(self.sums, x, strict=True)]


class StepCost:
    """The fit. Weights are in seconds per scaled feature, none negative."""

    def __init__(self) -> None:
        self._decoding, self._mixed = _Moments(), _Moments()
        self._weights = [0.0] * len(SCALES)

    def observe(self, work: StepWork, seconds: float) -> None:
        moments = self._mixed if work.prefill_tokens else self._decoding
        moments.add(work.features(), max(seconds, 1e-6))

    def fit(self) -> None:
        """Descend one weight after another, on the sums of both kinds of steps."""
        w = self._weights
        both = zip(self._decoding.products, self._mixed.products, strict=True)
        products = [[d + m for d, m in zip(*rows, strict=True)] for rows in both]
        sums = [d + m for d, m in zip(self._decoding.sums, self._mixed.sums, strict=True)]
        for _ in range(SWEEPS):
            for i, row in enumerate(products):
                others = sum(p * v for p, v in zip(row, w, strict=True)) - row[i] * w[i]
                w[i] = max(0.0, (sums[i] - others) / (row[i] + RIDGE * (1 + row[i])))

    def predict(self, work: StepWork) -> float:
        return sum(w * v for w, v in zip(self._weights, work.features(), strict=True))

    @property
    def per_prefill_token_s(self) -> float:
        return self._weights[3] / SCALES[3]

    @property
    def per_attention_pair_s(self) -> float:
        return self._weights[4] / SCALES[4]


class ChunkController:
    """The prefill budget of the next step, for a target of seconds between two tokens of a decoding request."""

    def __init__(self, target_s: float) -> None:
        self.target_s = target_s
        self.cost = StepCost()
        self._recent: deque[int] = deque(maxlen=RECENT)
        """Prefill tokens of the last steps that had some."""
        self._unseen: list[tuple[StepWork, float]] = []
        """Steps that ended unseen since the last whose end was waited for, and their times."""

    def observe(self, work: StepWork, seconds: float, *, ended_unseen: bool = False) -> None:
        """A step took so long, from the end of the one before it."""
        self._unseen.append((work, seconds))
        if ended_unseen and len(self._unseen) < MERGED:
            return
        steps, self._unseen = self._unseen, []
        self._recent.extend(work.prefill_tokens for work, _ in steps if work.prefill_tokens)
        self.cost.observe(reduce(add, (work for work, _ in steps)), sum(seconds for _, seconds in steps))

    def budget(self, decodes: StepWork, start: int) -> int:
        """Prefill tokens that may go with these decodes, if they begin at position `start` of their prompt.

        Solves base + a n + b (n start + n²/2) = aim for n.
        """
        self.cost.fit()
        room_s = self.target_s * AIM - self.cost.predict(decodes)
        linear = self.cost.per_prefill_token_s + self.cost.per_attention_pair_s * start
        square = self.cost.per_attention_pair_s / 2
        trusted = max(FIRST_CHUNK, 2 * max(self._recent, default=0))
        if room_s <= 0:
            return MIN_CHUNK
        if linear + square <= 0:
            return trusted
        tokens = 2 * room_s / (linear + (linear * linear + 4 * square * room_s) ** 0.5)
        return max(MIN_CHUNK, min(int(tokens), trusted))
