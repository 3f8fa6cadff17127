"""From logits to tokens, for a whole batch, with each request's own parameters.

    logits ─▶ grammars' masks ─▶ edits (bias, allowed and forbidden tokens) ─▶ penalties
       │                                                                          └─▶ draw ─▶ tokens ─▶ counted
       └────▶ log-probabilities, of the model's own distribution

Everything that a token needs lives on the device, one row for each slot: nothing here waits for the device, and a step
may be launched before the last one's tokens are on the CPU. What a step's requests do not ask for is not computed: one
look at the slots' flags decides. The random number of a token depends on its request's seed and its position only, so
a seeded request gives the same tokens in any batch.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner.token_masks import TokenMasks
from mainsail_engine.sampling.edits import LogitEdits
from mainsail_engine.sampling.logprobs import LogprobRows, logprob_rows
from mainsail_engine.sampling.penalties import TokenCounts
from mainsail_engine.step import FAILED_TOKEN, FORBIDDEN_TOKEN, StepPlan
from mainsail_kernels import sample as kernels
from mainsail_kernels.blocks import apply_token_bitmask

Send = Callable[[Sequence[np.ndarray]], list[torch.Tensor]]
"""Arrays to the device, in one copy."""
DRAWS, EDITS, PENALTIES, LOGPROBS, PROMPT = 1, 2, 4, 8, 16
"""What a slot's request asks for beyond the best token. PROMPT: something of every prompt position."""


NO_GUESSES: Mapping[int, Sequence[int]] = {}


@dataclass(slots=True)
class SamplingRows:
    """Sampling parameters of the rows to sample in this step; each array is [num_rows]."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    steps: torch.Tensor


class SlotParameters:
    """Every slot's sampling parameters as arrays; a slot is filled when a request first runs in it."""

    def __init__(self, num_slots: int) -> None:
        self.flags = np.zeros(num_slots, np.uint8)
        self.temperature = np.zeros(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int64)
        self.top_p = np.ones(num_slots, np.float32)
        self.min_p = np.zeros(num_slots, np.float32)
        self.seeds = np.zeros(num_slots, np.int64)
        self.logprobs = np.zeros(num_slots, np.int64)

    def fill(self, slot: int, request: Request) -> None:
        params = request.params
        self.flags[slot] = flags_of(params)
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seeds[slot] = self._seed(request)
        self.logprobs[slot] = params.logprobs or 0

    def asks(self, slots: np.ndarray) -> int:
        """The flags of these slots together; 0: the best token will do for all."""
        return int(np.bitwise_or.reduce(self.flags[slots])) if len(slots) else 0

    def _seed(self, request: Request) -> int:
        if request.params.seed is not None:
            return request.params.seed & 0x7FFFFFFFFFFFFFFF
        return secrets.randbits(63)

    def rows(self, slots: np.ndarray, positions: np.ndarray, send: Send) -> SamplingRows:
        """The parameters of these slots; positions [num_rows] are those of the tokens to be sampled."""
        temperature, top_k, top_p, min_p, seeds, steps = send(
            [
                self.temperature[slots], self.top_k[slots], self.top_p[slots], self.min_p[slots], self.seeds[slots],
                positions.astype(np.int64),
            ]
        )  # fmt: skip
        return SamplingRows(temperature, top_k, top_p, min_p, seeds, steps)


def flags_of(params: SamplingParams) -> int:
    """What a request asks for beyond the best token."""
    no_early_end = params.min_tokens and (params.stop_token_ids or not params.ignore_eos)
    edits = params.logit_bias or params.allowed_token_ids or params.bad_words or no_early_end
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    whole = params.prompt_logprobs is not None or params.pooling is not None
    return (
        (DRAWS if params.temperature > 0 else 0)
        | (EDITS if edits else 0)
        | (PENALTIES if penalties else 0)
        | (LOGPROBS if params.logprobs is not None else 0)
        | (PROMPT if whole else 0)
    )


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The best token of each row, [n] int64; FAILED_TOKEN (-1) for a broken row. Waits for nothing: graphs hold it."""
    return kernels.argmax(logits)


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """One token per row, [n] int64; FAILED_TOKEN (-1) for a row that holds NaN or +inf or nothing but -inf."""
    return kernels.sample(
        logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.steps
    )  # fmt: skip


@dataclass(slots=True)
class Sampled:
    """A step's tokens [n] int64, and the log-probabilities of the rows that asked for them; all on the device."""

    tokens: torch.Tensor
    logprobs: LogprobRows | None = None
    logprob_rows: np.ndarray | None = None
    """[m] int64: which of the n rows `logprobs` has."""
    num_logprobs: np.ndarray | None = None
    """[m] int64: how many of the best tokens each of them asked for."""


class Sampler:
    """The sampling state of all slots, and the step from logits to tokens."""

    def __init__(
        self, num_slots: int, vocab_size: int, eos_token_ids: frozenset[int], device: torch.device, send: Send
    ) -> None:
        self._device, self._send = device, send
        self.slots = SlotParameters(num_slots)
        self._edits = LogitEdits(num_slots, vocab_size, eos_token_ids, device)
        self._counts = TokenCounts(num_slots, vocab_size, device)
        self._behind: dict[int, tuple[Request, int]] = {}
        """Slots whose last step verified guesses, and how many output tokens were known before it."""

    def move_in(self, slot: int, request: Request) -> None:
        """This request runs in the slot from now on (again, perhaps: then with output that counts)."""
        self._behind.pop(slot, None)
        self.slots.fill(slot, request)
        flags = int(self.slots.flags[slot])
        self._edits.move_in(slot, request if flags & EDITS else None)
        if flags & PENALTIES:
            self._counts.move_in(slot, request)

    def wants_best(self, slots: np.ndarray) -> bool:
        """Whether the best token of the untouched logits is all that these slots ask for."""
        return not self.slots.asks(slots) & ~PROMPT

    def verify(self, plan: StepPlan) -> Mapping[int, Sequence[int]]:
        """Call before a plan is sampled. Returns which guesses come before each of its sampled rows, where some do.

        The tokens of a step that verifies guesses are not taken note of by the step itself: which of them stand is
        known when the next one is launched, on the CPU.
        """
        for slot, (request, known) in self._behind.items():
            tokens = request.output_token_ids[known:]
            if tokens and int(self.slots.flags[slot]) & PENALTIES:
                self._counts.catch_up(slot, tokens)
            self._edits.catch_up(slot, request)
        self._behind.clear()
        guessed: dict[int, Sequence[int]] = {}
        edited = self.slots.asks(np.array([chunk.slot for chunk in plan.chunks], np.int64)) & (EDITS | PENALTIES)
        if not plan.num_verifying or not edited:
            return guessed  # nobody would look
        row = 0
        for chunk in plan.chunks:
            guessed |= {row + ahead: chunk.guesses[:ahead] for ahead in range(1, 1 + len(chunk.guesses))}
            row += chunk.samples + len(chunk.guesses)
            if chunk.samples and int(self.slots.flags[chunk.slot]) & (EDITS | PENALTIES):
                self._behind[chunk.slot] = chunk.request, len(chunk.request.output_token_ids)
        return guessed

    def sample(
        self,
        logits: torch.Tensor,
        slots: np.ndarray,
        positions: np.ndarray,
        masks: TokenMasks | None = None,
        guessed: Mapping[int, Sequence[int]] = NO_GUESSES,
        best: torch.Tensor | None = None,
    ) -> Sampled:
        """The next token of each row. logits [n, vocab], maybe changed in place; slots and positions [n] int64.

        positions are those of the tokens to be sampled. masks: what grammars allow, for the rows that have one.
        guessed: the guesses that come before a row's token (`verify`). best [n] int64: `greedy(logits)`, of steps that
        have it already. A code below 0 instead of a token: see step.py.
        """
        asks, raw = self.slots.asks(slots), logits
        if asks & (EDITS | PENALTIES) or (masks is not None and asks & LOGPROBS):
            logits = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if masks is not None:
            apply_token_bitmask(logits, masks.bits, masks.rows)
        if not asks & (EDITS | PENALTIES):
            known = best if masks is None and not asks & DRAWS else None
            sampled = Sampled(self._draw(logits, slots, positions, asks) if known is None else known)
            return self._with_logprobs(sampled, raw, slots) if asks & LOGPROBS else sampled
        if asks & EDITS:
            self._edits.apply(logits, slots, positions, guessed)
        if asks & PENALTIES:
            self._counts.penalize(logits, slots, self._rows_with(slots, PENALTIES), guessed)
        tokens = self._draw(logits, slots, positions, asks)
        sampled = Sampled(_told_apart(tokens, greedy(raw) if best is None else best))
        if asks & EDITS and not guessed:
            self._edits.note(slots, tokens)
        if asks & PENALTIES and not guessed:
            self._counts.count(slots, tokens, self._rows_with(slots, PENALTIES))
        return self._with_logprobs(sampled, raw, slots) if asks & LOGPROBS else sampled

    def _draw(self, logits: torch.Tensor, slots: np.ndarray, positions: np.ndarray, asks: int) -> torch.Tensor:
        if not asks & DRAWS:
            return greedy(logits)
        return sample(logits, self.slots.rows(slots, positions, self._send))

    def _rows_with(self, slots: np.ndarray, flag: int) -> np.ndarray:
        return np.flatnonzero(self.slots.flags[slots] & flag)

    def _with_logprobs(self, sampled: Sampled, raw: torch.Tensor, slots: np.ndarray) -> Sampled:
        rows = self._rows_with(slots, LOGPROBS)
        wanted = self.slots.logprobs[slots[rows]]
        chosen, logits = sampled.tokens, raw
        if len(rows) < len(slots):
            index = torch.from_numpy(rows).to(self._device, non_blocking=True)  # pyright: ignore[reportUnknownMemberType]
            chosen, logits = chosen[index], raw[index]
        sampled.logprobs = logprob_rows(logits, chosen.clamp(min=0), int(wanted.max()))
        sampled.logprob_rows, sampled.num_logprobs = rows, wanted
        return sampled


def _told_apart(tokens: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """A row without a token failed in the model, or its own parameters forbid all: the best token of the untouched
    logits tells, which a failed row has not."""
    forbidden = torch.where(tokens < 0, FORBIDDEN_TOKEN, tokens)
    return torch.where(best < 0, FAILED_TOKEN, forbidden)
