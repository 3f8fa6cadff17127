"""Guesses from a smaller model with the same vocabulary (speculative sampling's draft model).

The draft runs as the model itself does, through a runner of its own: paged KV, CUDA graphs, tokens that stay on the
device between steps. Of each request it keeps a copy, which is what the draft has computed of it:

    request     [ prompt and output, all known ............ ]
    copy        [ written .......... ][ caught up with     ][ g1 g2 … guesses ]
                                        one ragged step       one step each, launched without waiting

Copies are a cache: they live in a pool of their own, are forgotten when its room or slots are needed (the one used
longest ago first) or the request ends, and made again when it guesses next. Nothing else depends on them: preemption,
swapping and the prefix cache know nothing of the draft.

A guess is drawn with the random number that the model's own token at that position will be drawn with, under the same
temperature and filters: where the two distributions are alike, so mostly are the tokens. Guesses are fixed before they
are verified, so what is generated is exact whatever the draft says.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mainsail_engine.kv.cache import blocks_for
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.speculative.policy import HitRates
from mainsail_engine.step import Chunk, PendingStep, Runner, StepPlan

PRIOR = (0.7, 0.7, 0.7)
OVERALL_WEIGHT, OVERALL_FADE = 20.0, 0.998
UNREAD = 2
"""Steps that may be launched before the oldest is read: the runner keeps buffers for so many and one more."""
SMOOTHING = 0.2
DRAFT_CONTEXT = 4096
DRAFT_SHARE = 0.1
"""Of the device's memory (of what is free on a CPU), for the draft's KV."""
CAUGHT_UP = 32
"""Tokens behind for which the time of a guess is like any other's."""


@dataclass(slots=True, eq=False)
class _Copy:
    request: Request
    """The draft's own, over the same lists of tokens: its slot, its blocks."""
    rates: HitRates
    num_written: int = 0
    """Leading positions whose KV is that of the request's tokens."""
    num_guessed: int = 0


class DraftModel:
    """See speculator.Source."""

    def __init__(
        self, runner: Runner, *, num_slots: int, budget: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """budget: tokens of one step of the draft. Tokens from runner.vocab_size on are never guessed."""
        self._runner, self._budget, self._clock = runner, budget, clock
        self._free_blocks = list(range(runner.num_blocks))
        self._free_slots = list(range(num_slots))
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        """The one used longest ago first."""
        self._overall = HitRates(PRIOR, weight=OVERALL_WEIGHT, fade=OVERALL_FADE)
        self.level_s = self.last_s = 0.0

    # -- see speculator.Source ---------------------------------------------------------------------------------------

    def saw(self, request: Request, tokens: Sequence[int]) -> None:
        copy = self._copies.get(request.request_id)
        if copy is not None:
            for _ in tokens:
                copy.rates.rest()

    def settle(self) -> None:
        """Nothing was put off."""

    def has_guesses(self, request: Request, count: int) -> bool:
        return request.num_tokens + count <= self._runner.max_model_len

    def chances(self, request: Request, most: int) -> list[float]:
        if not self.has_guesses(request, most):
            return []
        copy = self._copies.get(request.request_id)
        return (copy.rates if copy is not None else self._fresh_rates()).chances(0, most)

    def verified(self, request: Request, num_guesses: int, num_right: int) -> None:
        copy = self._copies.get(request.request_id)
        if copy is None:
            return
        copy.num_written += min(num_right, copy.num_guessed - 1)  # the last guess was drawn, and never computed
        for position in range(min(num_right + 1, num_guesses)):
            copy.rates.note(position, position < num_right)
            self._overall.note(position, position < num_right)

    def forget(self, request: Request) -> None:
        self._drop(request.request_id)

    def guess(self, wanted: list[tuple[Request, int]]) -> list[list[int]]:
        started = self._clock()
        behind = 0
        drafting: list[tuple[int, _Copy, int]] = []
        catching_up = StepPlan()
        for place, (request, count) in enumerate(wanted):
            copy = self._copy(request, count, {request.request_id for request, _ in wanted})
            if copy is None:
                continue
            missing = request.num_tokens - copy.num_written
            tokens = min(missing, self._budget - catching_up.num_tokens)
            if tokens <= 0:
                continue
            behind = max(behind, missing)
            if tokens == missing:
                drafting.append((place, copy, count))
            self._add(catching_up, copy, copy.num_written, tokens, samples=tokens == missing)
            copy.num_written += tokens
            copy.num_guessed = count
        guesses = self._draft(catching_up, drafting, len(wanted))
        self.last_s = self._clock() - started
        if drafting and behind <= CAUGHT_UP:
            per_level = self.last_s / max(count for _, _, count in drafting)
            self.level_s += (SMOOTHING if self.level_s else 1.0) * (per_level - self.level_s)
        return guesses

    # -- the draft's own steps ---------------------------------------------------------------------------------------

    def _draft(self, catching_up: StepPlan, drafting: list[tuple[int, _Copy, int]], num: int) -> list[list[int]]:
        """Launch the steps one behind the other; each takes its tokens from the one before, on the device."""
        guesses: list[list[int]] = [[] for _ in range(num)]
        if not catching_up.chunks:
            return guesses
        order = {id(chunk.request): place for place, chunk in enumerate(catching_up.chunks)}
        drafting = sorted(drafting, key=lambda item: order[id(item[1].request)])
        pending: deque[tuple[PendingStep, list[int]]] = deque()
        pending.append((self._runner.launch(catching_up), [place for place, _, _ in drafting]))
        for level in range(1, max((count for _, _, count in drafting), default=0)):
            going_on = [item for item in drafting if item[2] > level]
            plan = StepPlan()
            for _, copy, _ in going_on:
                self._add(plan, copy, copy.num_written + level - 1, 1, samples=True)
            pending.append((self._runner.launch(plan), [place for place, _, _ in going_on]))
            if len(pending) > UNREAD:
                self._read(pending, guesses)
        while pending:
            self._read(pending, guesses)
        return [self._usable(made) for made in guesses]

    def _read(self, pending: deque[tuple[PendingStep, list[int]]], guesses: list[list[int]]) -> None:
        step, places = pending.popleft()
        for place, token in zip(places, step.result().token_ids, strict=True):
            guesses[place].append(token)

    def _usable(self, guesses: list[int]) -> list[int]:
        """Up to the first that is no token: a row that failed."""
        for count, token in enumerate(guesses):
            if not 0 <= token < self._runner.vocab_size:
                return guesses[:count]
        return guesses

    def _add(self, plan: StepPlan, copy: _Copy, start: int, num_tokens: int, *, samples: bool) -> None:
        request = copy.request
        chunk = Chunk(request, start, num_tokens, samples, request.slot, request.block_ids)
        if samples and num_tokens == 1:
            plan.chunks.insert(plan.num_decodes, chunk)
            plan.num_decodes += 1
        else:
            plan.chunks.append(chunk)

    # -- copies ------------------------------------------------------------------------------------------------------

    def _fresh_rates(self) -> HitRates:
        """Between what is hoped for and what all requests have seen."""
        return HitRates([(hoped + seen) / 2 for hoped, seen in zip(PRIOR, self._overall.means(), strict=True)])

    def _copy(self, request: Request, count: int, busy: set[str]) -> _Copy | None:
        """The request's copy, with blocks for its tokens and so many guesses. None: there is no room for it now."""
        copy = self._copies.get(request.request_id)
        needed = blocks_for(request.num_tokens + count) - (len(copy.request.block_ids) if copy else 0)
        while len(self._free_blocks) < needed or (copy is None and not self._free_slots):
            idle = next((name for name in self._copies if name not in busy), None)
            if idle is None:
                return None
            self._drop(idle)
        if copy is None:
            mirror = Request(
                request.request_id, request.prompt_token_ids, _draft_params(request.params), request.arrival_time_s,
                output_token_ids=request.output_token_ids, slot=self._free_slots.pop(),
            )  # fmt: skip
            copy = self._copies[request.request_id] = _Copy(mirror, self._fresh_rates())
        if needed > 0:
            copy.request.block_ids.extend(self._free_blocks.pop() for _ in range(needed))
        self._copies.move_to_end(request.request_id)
        return copy

    def _drop(self, request_id: str) -> None:
        copy = self._copies.pop(request_id, None)
        if copy is not None:
            self._free_blocks.extend(copy.request.block_ids)
            self._free_slots.append(copy.request.slot)

    def check_integrity(self) -> None:
        """Every block and slot is free or one copy's. Raises RuntimeError."""
        owned = [block for copy in self._copies.values() for block in copy.request.block_ids]
        if sorted(owned + self._free_blocks) != list(range(self._runner.num_blocks)):
            raise RuntimeError("blocks of the draft's pool are lost or owned twice")
        slots = [copy.request.slot for copy in self._copies.values()]
        if len({*slots, *self._free_slots}) != len(slots) + len(self._free_slots):
            raise RuntimeError("a slot of the draft is owned twice")


def _draft_params(params: SamplingParams) -> SamplingParams:
    """What shapes the distribution, and the seed."""
    return SamplingParams(
        max_tokens=params.max_tokens, temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
        min_p=params.min_p, seed=params.seed,
    )  # fmt: skip


def draft_blocks(per_block: int, *, max_num_seqs: int, max_model_len: int, room_bytes: int) -> int:
    """Blocks of the draft's pool: what all requests at 4,096 tokens take, within the room; one of full length at least.

    Pure. per_block: bytes.
    """
    at_once = max_num_seqs * blocks_for(min(max_model_len, DRAFT_CONTEXT))
    return max(min(at_once, room_bytes // per_block), blocks_for(max_model_len) + 1)
