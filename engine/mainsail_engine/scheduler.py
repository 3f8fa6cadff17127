"""One step's plan: decode → continue prefills → admit, under one token budget, without phases.

    add ──▶ waiting ──admit──▶ prefilling ──last chunk planned──▶ decoding ──commit──▶ finished
               ▲         (waits for its loads)                       │
               └─── preempt (KV stays cached, here or on the host) ──┘

Promises. Every decoding request gets its token in every step: the budget is never below the number of running
requests, and decodes come first. A prompt starts only when the whole of it fits above the watermark, so what was
admitted is not thrown out again at once; blocks themselves are allocated as chunks come. When running requests outgrow
the pool, the one with the lowest priority, then the one with the least work to lose, goes back to waiting; its KV
stays in the prefix tree and goes to the host as its room is needed, so that it resumes from there and computes nothing
again unless the host tier is full or off (counted). Who resumes from the host, or begins with a prefix that is there,
waits for its loads while others run. A prompt whose next block another request is computing right now waits for that
block rather than computing it twice. Who waits is served by priority and fairly between users
(`waiting.py`); a request past its deadline ends with an error. One failed row ends one request.

Steps may overlap: plan N+1 may be made before N is committed. What turns out to have stopped at N has its N+1 token
dropped. With micro-batches (the stages of a pipeline, all busy at once) as many plans are in flight, and a request's
token is needed by the first stage for its next: a request decodes in one of them at a time, and each takes its share of
those that decode. Blocks can be handed on at once, since the device runs steps in the order of their launch. A plan
that verifies guesses (speculative/) is made and committed with nothing else in flight; guesses take budget and blocks
that are to spare, and only tokens that turn out to be the request's own count as computed.

The runner computes, the core drives (`step.py`); the scheduler only decides. The clock is an argument.
Iteration-level scheduling as in Orca (Yu et al., 2022), chunked prefill as in Sarathi-Serve (Agrawal et al., 2024).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING, TypedDict

from mainsail_engine.chunking import STEP_ROWS, ChunkController, StepWork, attention_pairs, filled, spread
from mainsail_engine.config import BLOCK_SIZE, EngineConfig
from mainsail_engine.errors import RequestError
from mainsail_engine.kv.cache import KVCache, blocks_for
from mainsail_engine.kv.packed_tokens import pack_tokens
from mainsail_engine.kv.prefix_tree import Match, Node
from mainsail_engine.protocol import BlockLife, RequestOutput, SchedulerStats
from mainsail_engine.request import FinishReason, Request, RequestStatus
from mainsail_engine.residency import Residency
from mainsail_engine.speculative.verify import right_guesses, verified_tokens
from mainsail_engine.step import FORBIDDEN_TOKEN, Chunk, ChunkExtras, StepPlan, StepResult
from mainsail_engine.waiting import OUTPUT_WEIGHT, PROMPT_WEIGHT, Account, Order, WaitingQueue

if TYPE_CHECKING:
    from mainsail_engine.speculative.speculator import Speculator
    from mainsail_engine.structured.constraint import Constraint

log = logging.getLogger(__name__)

BlockKey = tuple[int, str, bytes]
"""Where a block hangs in the prefix tree (the parent's identity, 0 at the root; the salt), and its tokens."""
DEFAULT_BUDGET = {"cuda": 8192}
CPU_BUDGET = 512
RETRY_STEPS = 16
"""A request that did not fit is matched anew when room has grown enough, or after this many steps."""
WASTE_STEPS = 32
"""The gauge of unused room is taken anew every so many steps: it looks at every request."""
PIPELINED_PREFILL = 256
"""Prompt tokens in a micro-batch below which it does not pay to share prompts out among several, so that a later stage
begins with the first while an earlier one computes the next."""
MEASURED_PREFILL = 256
"""A step with so many prompt tokens tells how long computing KV takes."""
MANY_DEADLINES = 64
"""So many more of them than live requests need, and those of finished requests are looked for."""
LOADS_PER_STEP = 128
"""Blocks that one plan begins to load: enough to keep the bus busy, few enough that others' loads come in between."""


class SpeculationStats(TypedDict, total=False):
    """Fields of SchedulerStats."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: list[int]


def _always(request: Request) -> bool:
    del request
    return True


class Scheduler:
    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        *,
        max_num_batched_tokens: int | None = None,
        max_inter_token_latency_s: float = 0.0,
        num_host_blocks: int = 0,
        speculator: Speculator | None = None,
        whole_prompts: bool = False,
        micro_batches: int = 1,
        step_rows: Sequence[int] = STEP_ROWS,
    ) -> None:
        """max_num_batched_tokens, max_inter_token_latency_s (0: no bound): what the configuration leaves open.

        whole_prompts: a prompt is computed in one step, and its KV is of no use to others (encoders).
        micro_batches: plans that will be in flight where a token must be known before the next is planned; 1: it need
        not be. step_rows: what steps with prompts and decodes are padded to, the largest last.
        """
        self.max_model_len = min(max_model_len, num_blocks * BLOCK_SIZE)
        if self.max_model_len < max_model_len:
            log.warning(
                "the KV pool of %d blocks holds %d tokens, the context of %d does not fit: serving %d "
                "(set --max-model-len to that, or raise --kv-cache-blocks)",
                *(num_blocks, num_blocks * BLOCK_SIZE, max_model_len, self.max_model_len),
            )
        self.kv = KVCache(
            num_blocks,
            num_host_blocks=num_host_blocks,
            enable_prefix_caching=config.cache.enable_prefix_caching and not whole_prompts,
            sample=config.cache.metrics_sample,
        )
        default = max_num_batched_tokens or DEFAULT_BUDGET.get(config.device, CPU_BUDGET)
        self._budget = config.scheduler.max_num_batched_tokens or default
        self._max_running = min(config.scheduler.max_num_seqs, self._budget)
        self._sharing = config.cache.enable_prefix_caching and not whole_prompts
        self._whole_prompts = whole_prompts
        self._watermark = int(config.scheduler.watermark * num_blocks)
        self._eos = frozenset(eos_token_ids)
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingQueue()
        self._accounts: dict[str, Account] = {}
        """By request id: whom its tokens are charged to."""
        self._deadlines: list[tuple[float, int, Request]] = []
        """Heap; finished requests are dropped when they come up, or when they are the most of it."""
        self._outputs: list[RequestOutput] = []
        """What happened between two commits."""
        self._prefilling: list[Request] = []
        self._decoding: list[Request] = []
        self._slots = list(range(config.scheduler.max_num_seqs - 1, -1, -1))
        self._blocked: tuple[Order, int, int] | None = None
        """The first in the queue that did not fit: its place in the queue, the available blocks it needs, the step."""
        self._num_arrivals = self._num_steps = self._plans_in_flight = 0
        self._num_preemptions = self._prefix_queries = self._prefix_hits = 0
        self._host_queries = self._host_hits = self._num_recomputed = self._num_swapped = 0
        self._kv_waste = 0.0
        self._residency = Residency(self.kv) if self._sharing and config.scheduler.agent_sessions else None
        self._num_held = 0
        self._now = self._loading_since_s = 0.0
        self.chunking = ChunkController(max_inter_token_latency_s) if max_inter_token_latency_s > 0 else None
        """What steps cost, and how much prefill goes beside decodes; None: as much as fits."""
        self._last_commit_s = 0.0
        self._end_was_seen = True
        """When the last step ended is known (StepResult.ended_unseen)."""
        self.place_adapter: Callable[[Request], bool] = _always
        """Asked before a request starts: whether its adapter has a place on the device, and which."""
        self._speculator = speculator
        self._is_verifying = False
        """A plan with guesses is in flight."""
        self._unshared: list[Request] = []
        """Whose blocks have filled up, since `settle`, and are in no prefix tree yet."""
        self._micro_batches = micro_batches
        self._step_rows = step_rows

    # -- requests come and go ------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it can never be served."""
        prompt_len = len(request.prompt_token_ids)
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id!r} is in use: ids must be unique", param="request_id")
        if prompt_len == 0:
            raise RequestError("the prompt is empty: it needs at least one token", param="prompt")
        if request.params.max_tokens < 1:
            raise RequestError("max_tokens must be at least 1", param="max_tokens")
        if prompt_len >= self.max_model_len:
            raise RequestError(
                f"the prompt has {prompt_len} tokens; at most {self.max_model_len - 1} fit before an answer "
                f"(context of {self.max_model_len} tokens): shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        request.max_num_tokens = min(prompt_len + request.params.max_tokens, self.max_model_len)
        if request.num_tokens >= request.max_num_tokens:
            raise RequestError("the tokens generated already leave none to generate", code="invalid_resume")
        request.arrival_index = self._num_arrivals
        self._num_arrivals += 1
        if self._residency is not None:
            self._residency.arrive(request, request.arrival_time_s)
        self._requests[request.request_id] = request
        self._accounts[request.request_id] = self._waiting.join(request)
        self._look_again(request)
        if request.constraint is not None:
            self._force_beginning(request)
        if request.deadline_s is not None:
            heappush(self._deadlines, (request.deadline_s, request.arrival_index, request))

    def abort(self, request_ids: Iterable[str], reason: FinishReason = FinishReason.ABORT) -> None:
        """End these requests at once, without an output. Ids that are not known have finished already."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._finish(request, reason)

    def set_host_blocks(self, num_blocks: int) -> None:
        """So much host memory there is by now, in blocks. It only grows."""
        if num_blocks > self.kv.host.pool.num_blocks:
            self.kv.host.grow(num_blocks)

    def _look_again(self, request: Request) -> None:
        """The queue has changed at this request's place: what was first in line may not be any more."""
        if self._blocked is not None and self._waiting.order(request) <= self._blocked[0]:
            self._blocked = None

    def _expire(self, now: float) -> None:
        """End the requests whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heappop(self._deadlines)[2]
            if not request.is_finished:
                self._finish(request, FinishReason.ERROR)
                waited = now - request.arrival_time_s
                message = f"deadline exceeded: not finished within {waited:.1f} s"
                self._outputs.append(
                    RequestOutput(request.request_id, [], FinishReason.ERROR, stop_reason="deadline", error=message)
                )

    def take_outputs(self) -> list[RequestOutput]:
        """What happened outside of a step (deadlines). `commit` hands it out as well; this is for when nothing runs."""
        outputs, self._outputs = self._outputs, []
        return outputs

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._outputs) or self._plans_in_flight > 0 or self.kv.host.is_loading

    @property
    def wake_s(self) -> float | None:
        """When there is something to do without any command, on the clock of `schedule`. None: not foreseen."""
        return self._residency.next_fetch_s() if self._residency is not None else None

    @property
    def num_running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    # -- one step ------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """The next step's plan. None: nothing to do before another request or the step in flight comes in."""
        if self._plans_in_flight and self._waits_to_guess():
            return None
        self._num_steps += 1
        self._now = now
        if self.kv.times is not None:
            self.kv.times.now = now
        if self._residency is not None:
            self._residency.advance(now)
        plan, preempted_before = StepPlan(planned_s=now, is_overlapped=self._plans_in_flight > 0), self._num_preemptions
        self._expire(now)
        if self._waiting.advance(now):
            self._blocked = None
        self._plan_decodes(plan, self._make_room_for_decodes())
        budget = self._plan_prefills(plan, self._prefill_budget(plan))
        if self._num_preemptions == preempted_before:
            self._admit(plan, budget)
        if not plan.chunks and not self._plans_in_flight and not self.kv.host.is_loading:
            self._unblock(plan)
        if self._residency is not None and not self._waiting:
            self._fetch_ahead(self._residency)
        self.kv.unpin()  # not before: what is fetched would be loaded over the sources of this plan's copies
        plan.stores = self.kv.host.take_stores()
        if not self.kv.host.is_on_bus:
            self._loading_since_s = now
        plan.loads = self.kv.host.take_loads(LOADS_PER_STEP)
        waits_for_loads = self.kv.host.is_loading and not self._plans_in_flight
        if not (plan.chunks or plan.stores or plan.loads or waits_for_loads):
            return None
        self._plans_in_flight += 1
        return plan

    def _unblock(self, plan: StepPlan) -> None:
        """Nothing can move and nothing is in flight: take room from the prompts begun, or start the first in line."""
        while not plan.chunks and self._prefilling:
            self._preempt(self._victim())
            self._plan_prefills(plan, self._budget)
        if not plan.chunks:
            self._blocked = None
            self._admit(plan, self._budget)

    def _make_room_for_decodes(self) -> list[Request]:
        """Preempt until every decode that begins a block can have one. Returns those to plan."""
        while True:
            decoding = self._decoding if self._micro_batches == 1 else self._turn()
            needed = sum(1 for r in decoding if _lacks_block(r))
            if not needed or self.kv.make_free(needed):
                return decoding
            self._preempt(self._victim())

    def _turn(self) -> list[Request]:
        """Who decodes in this micro-batch: of those whose newest token is known, a fair share, the longest waiting."""
        known = [r for r in self._decoding if not r.num_in_flight]
        share = -(-len(self._decoding) // self._micro_batches)
        if len(known) > share:
            known = sorted(known, key=lambda r: r.last_decode_step)[:share]
        return known

    def _plan_decodes(self, plan: StepPlan, decoding: list[Request]) -> None:
        chunks, grow = plan.chunks, self.kv.grow
        for request in decoding:
            in_flight = request.num_in_flight
            if in_flight and request.num_tokens + in_flight >= request.max_num_tokens:
                continue  # the step in flight samples its last token
            start = request.num_computed_tokens
            if start == len(request.block_ids) * BLOCK_SIZE:
                grow(request, start + 1)
            chunks.append(Chunk(request, start, 1, True, request.slot, request.block_ids))
            request.num_computed_tokens = start + 1
            request.num_in_flight = in_flight + 1
            request.num_launched_chunks += 1
            request.last_decode_step = self._num_steps
        plan.num_decodes = len(chunks)
        if self._speculator is not None and chunks and not self._plans_in_flight:
            self._add_guesses(plan, self._speculator)

    def _waits_to_guess(self) -> bool:
        """Whether the step in flight is to come in first, for its tokens or those to be guessed after them."""
        if self._is_verifying or self._speculator is None or not self._decoding:
            return self._is_verifying
        return self._speculator.would_guess(self._decoding, len(self._decoding))

    def _add_guesses(self, plan: StepPlan, speculator: Speculator) -> None:
        """Let decodes verify guesses, as many as pays and as there is room for."""
        chunks = plan.chunks
        requests = [chunk.request for chunk in chunks]
        room = [request.max_num_tokens - request.num_tokens - 1 for request in requests]
        guesses = speculator.guess(requests, room, len(chunks), self._budget - len(chunks))
        for chunk, made in zip(chunks, guesses, strict=True):
            if not made:
                continue
            constraint = chunk.request.constraint
            if constraint is not None:
                made = constraint.conforming(made)
            stop = chunk.start + 1 + len(made)
            if stop > len(chunk.block_ids) * BLOCK_SIZE:
                made = made[: self._room_to_guess(chunk)]
                stop = chunk.start + 1 + len(made)
                self.kv.grow(chunk.request, stop)
            chunk.guesses, chunk.num_tokens = made, stop - chunk.start
        verifying = [chunk for chunk in chunks if chunk.guesses]
        if verifying:
            plan.chunks = [chunk for chunk in chunks if not chunk.guesses] + verifying
            plan.num_decodes, plan.num_verifying = len(chunks) - len(verifying), len(verifying)
            self._is_verifying = True

    def _room_to_guess(self, chunk: Chunk) -> int:
        """Positions for guesses: in the request's own blocks, and in those that nobody needs now or soon."""
        free = max(0, self.kv.pool.num_unkept - self._watermark)
        return (len(chunk.block_ids) + free) * BLOCK_SIZE - chunk.start - 1

    def _prefill_budget(self, plan: StepPlan) -> int:
        """Tokens left for prompts: what a step may have, and while requests decode what their latency allows."""
        rows = plan.num_tokens
        left = self._budget - rows
        if self._micro_batches > 1:
            left = min(left, self._micro_batch_prefill())
        if self.chunking is None or not rows or not (self._prefilling or self._waiting):
            return left
        plan.decode_context = sum(chunk.start for chunk in plan.chunks)
        start = self._prefilling[0].num_computed_tokens if self._prefilling else 0
        latency = self.chunking.budget(StepWork(rows, plan.decode_context), start)
        backlog = self._backlog()
        budget = min(left, latency, spread(backlog, rows))
        return filled(budget, rows, self._step_rows) if budget < backlog else budget

    def _micro_batch_prefill(self) -> int:
        """An equal part of the prompt tokens there are, for as many micro-batches as it pays to share them among."""
        backlog = self._backlog()
        parts = max(1, min(self._micro_batches, backlog // PIPELINED_PREFILL))
        return max(1, -(-backlog // parts))

    def _backlog(self) -> int:
        """Prompt tokens that could be computed now, or nearly: what is begun, and what waits if there is a place."""
        waiting = self._waiting.num_prompt_tokens if self.num_running < self._max_running else 0
        return waiting + sum(r.num_tokens - r.num_computed_tokens for r in self._prefilling)

    def _plan_prefills(self, plan: StepPlan, budget: int) -> int:
        """The next chunk of every prompt begun, oldest first. Returns the budget left."""
        for request in list(self._prefilling):
            if budget <= 0:
                break
            if self.kv.is_loaded(request):
                budget -= self._plan_chunk(plan, request, budget)
        return budget

    def _plan_chunk(self, plan: StepPlan, request: Request, budget: int) -> int:
        """As much of the prompt as budget and blocks allow. Returns the number of tokens planned."""
        start = request.num_computed_tokens
        room = (len(request.block_ids) + self.kv.pool.num_available) * BLOCK_SIZE - start
        num_tokens = min(request.num_tokens - start, budget, room)
        if num_tokens <= 0 or (self._whole_prompts and num_tokens < request.num_tokens - start):
            return 0
        self.kv.grow(request, start + num_tokens)
        samples = start + num_tokens == request.num_tokens
        plan.chunks.append(Chunk(request, start, num_tokens, samples, request.slot, request.block_ids))
        request.num_computed_tokens = start + num_tokens
        request.num_launched_chunks += 1
        if samples:
            request.num_in_flight += 1
            self._prefilling.remove(request)
            self._decoding.append(request)
        return num_tokens

    # -- admission -----------------------------------------------------------------------------------------------

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Start waiting requests in order while budget, slots and blocks last."""
        if not self._waiting or budget <= 0 or self.num_running >= self._max_running or self._still_blocked():
            return
        computing, held = self._blocks_being_computed(), False
        self._num_held = 0
        for request in islice(self._waiting.in_order(), 4 * self._max_running):
            if budget <= 0 or self.num_running >= self._max_running or request.num_launched_chunks:
                return  # the last: it was preempted, and its step has not come back
            if self._is_held(request):
                self._num_held += 1
                continue
            if not self.place_adapter(request):
                held = True
                continue
            match = self.kv.match(request)
            next_key = self._next_key(request, match.node, match.num_blocks)
            computed_by_another = next_key in computing and not request.params.reads_whole_prompt
            if computed_by_another or self.kv.tail_is_loading(match):
                held = True
                continue  # this block is being written or loaded right now: share it in a moment
            lacking = self._lacking(request, match)
            if lacking > 0 and self.kv.pool.num_kept:
                lacking = self._displace(request, match, lacking)
                if 0 < lacking <= self._not_to_be_had():
                    self._hold(request, lacking)
                    continue
            if lacking > 0:
                if not held:
                    room = self.kv.pool.num_unkept + lacking
                    self._blocked = (self._waiting.order(request), room, self._num_steps)
                return
            self._start(plan, request, match)
            if self.kv.is_loaded(request):
                budget -= self._plan_chunk(plan, request, budget)
            if next_key is not None:
                computing.add(next_key)

    def _still_blocked(self) -> bool:
        """Whether the first in line was looked at already, and nothing has changed since that could help it."""
        if self._blocked is None or not self.num_running:
            return False
        _, available, step = self._blocked
        return self.kv.pool.num_unkept < available and self._num_steps - step < RETRY_STEPS

    def _lacking(self, request: Request, match: Match) -> int:
        """Blocks missing for the whole request above the watermark and the prompts begun.

        A tail to copy needs its source kept for a moment: it is dropped where that is one block too many. (A tail on
        the host is loaded into the request's own block, and needs no more than that.)
        """
        reserved = self._watermark if self.num_running else 0
        reserved += sum(blocks_for(r.num_tokens) - len(r.block_ids) for r in self._prefilling)
        room = self.kv.pool.num_available if self._residency is None else self._residency.room_for(request)
        room -= reserved
        lacking = self.kv.blocks_wanted(request, match) - room
        if lacking > 0 and match.tail_tokens:
            match.tail_tokens = 0
            lacking = self.kv.blocks_wanted(request, match) - room
        return lacking

    # -- sessions ------------------------------------------------------------------------------------------------

    def _displace(self, request: Request, match: Match, lacking: int) -> int:
        """Take room from what is kept for younger sessions. Returns the blocks that are lacking then."""
        residency = self._residency
        if residency is None:
            return lacking
        overdue = residency.is_overdue(request, self.kv.blocks_wanted(request, match), self._now)
        if overdue and lacking <= residency.reserved_blocks:
            return 0
        return self._lacking(request, match) if residency.displace(request, lacking, overdue=overdue) else lacking

    def _not_to_be_had(self) -> int:
        """Blocks that are there, and are not to be had: kept or reserved for sessions, or below the watermark."""
        reserved = self._residency.reserved_blocks if self._residency is not None else 0
        return self.kv.pool.num_kept + reserved + self._watermark

    def _hold(self, request: Request, lacking: int) -> None:
        """It would fit, but for sessions that are expected back: its turn has not begun, and waits as a whole."""
        request.held_room = self.kv.pool.num_unkept + lacking
        request.held_step = self._num_steps
        self._num_held += 1

    def _is_held(self, request: Request) -> bool:
        """Whether it was held a moment ago, and nothing has changed since that could help it."""
        pool = self.kv.pool
        return (
            request.held_room > pool.num_unkept
            and self._num_steps - request.held_step < RETRY_STEPS
            and pool.num_kept > 0
        )

    def _fetch_ahead(self, residency: Residency) -> None:
        due_s = residency.next_fetch_s()
        if due_s is not None and due_s <= self._now:
            begun = sum(blocks_for(r.num_tokens) - len(r.block_ids) for r in self._prefilling)
            residency.fetch_ahead(self._now, self.kv.pool.num_unkept - begun - self._watermark)

    def _blocks_being_computed(self) -> set[BlockKey]:
        """The next block of every prompt of which a step in flight, or to come, writes more."""
        keys = (
            self._next_key(request, request.tree_node, request.num_tree_blocks)
            for request in (*self._decoding, *self._prefilling)
            if request.num_written_tokens < len(request.prompt_token_ids)
        )
        return {key for key in keys if key is not None}

    def _next_key(self, request: Request, node: Node | None, num_blocks: int) -> BlockKey | None:
        """The prompt's block after num_blocks, and the node it hangs below. None: no full block can be shared there."""
        start, stop = num_blocks * BLOCK_SIZE, (num_blocks + 1) * BLOCK_SIZE
        if stop > len(request.prompt_token_ids) or not self._sharing:
            return None
        return id(node) if node else 0, request.cache_salt, pack_tokens(request.prompt_token_ids[start:stop])

    def _start(self, plan: StepPlan, request: Request, match: Match) -> None:
        self._waiting.remove(request)
        copy = self.kv.admit(request, match)
        if copy is not None:
            plan.copies.append(copy)
        if self._residency is not None:
            self._residency.started(request)
        request.held_room, request.resume_node = 0, None
        request.slot = self._slots.pop()
        request.move(RequestStatus.RUNNING)
        self._prefilling.append(request)
        on_device = match.num_tokens - match.num_host_tokens
        if self.kv.host.pool.num_blocks:
            self._host_queries += request.num_tokens - on_device
            self._host_hits += match.num_host_tokens
        if request.num_preemptions:
            self._note_resumed(request, match)
        else:
            prompt_len = len(request.prompt_token_ids)
            request.num_cached_tokens = min(match.num_tokens, prompt_len)  # the rest: forced output
            request.num_host_tokens = max(0, request.num_cached_tokens - on_device)
            self._prefix_queries += prompt_len
            self._prefix_hits += request.num_cached_tokens
            uncached = prompt_len - request.num_cached_tokens
            self._accounts[request.request_id].served += PROMPT_WEIGHT * uncached

    def _note_resumed(self, request: Request, match: Match) -> None:
        self._num_swapped -= 1
        recomputed = max(0, request.num_lost_tokens - match.num_tokens)
        self._num_recomputed += recomputed
        log.info(
            "resumed %s: %d tokens still on the device, %d from the host, %d to compute again",
            request.request_id,
            match.num_tokens - match.num_host_tokens,
            match.num_host_tokens,
            recomputed,
        )

    # -- preemption ----------------------------------------------------------------------------------------------

    def _victim(self) -> Request:
        """Lowest priority, then least lost work; among those who would free anything."""
        ranked = [(r.priority, self.kv.lost_work(r), -r.arrival_index, r) for r in self._decoding + self._prefilling]
        return min([entry for entry in ranked if entry[1]] or ranked)[3]

    def _preempt(self, request: Request) -> None:
        """Back to waiting. What was computed stays cached, and is on either tier when it resumes.

        That includes what a step in flight writes: the device does it before anything that is launched from now on. If
        that step fails, it is forgotten.
        """
        log.info(
            "preempted %s: %d tokens computed, %d blocks of its own (pool of %d blocks is full)",
            request.request_id,
            request.num_computed_tokens,
            self.kv.lost_work(request),
            self.kv.pool.num_blocks,
        )
        self._stop_running(request)
        request.num_lost_tokens = request.num_computed_tokens
        if self.kv.is_loaded(request):
            request.num_written_tokens = min(request.num_computed_tokens, request.num_tokens)
        request.resume_node = self.kv.suspend(request)
        request.move(RequestStatus.WAITING)
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._num_swapped += 1
        self._waiting.push(request)
        self._look_again(request)

    def _stop_running(self, request: Request) -> None:
        running = self._decoding if request in self._decoding else self._prefilling
        running.remove(request)
        self._slots.append(request.slot)
        request.slot = -1

    # -- what came of a step -------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[RequestOutput]:
        """Take a finished step's tokens, in launch order. Returns what each request got."""
        self.settle()
        self._plans_in_flight -= 1
        self._is_verifying = False
        self._now = now
        self._measure(plan, now, ended_unseen=result.ended_unseen)
        self._take_loads(result.num_loaded, now)
        outputs = self.take_outputs()
        tokens, after = result.token_ids, 0
        for index, chunk in enumerate(plan.chunks):
            request = chunk.request
            request.num_launched_chunks -= 1
            first, token = after, None
            if chunk.samples:
                after, token = first + 1 + len(chunk.guesses), tokens[first]
            if token is not None and not request.num_superseded:
                request.num_in_flight -= 1
            elif token is not None:
                request.num_superseded -= 1
                token = None if token >= 0 else token
            if request.status is RequestStatus.FINISHED:
                continue
            if token is not None and token < 0:
                outputs.append(self._fail(request, token))
                continue
            extras = result.extras.get(index)
            if chunk.guesses and token is not None:
                outputs.append(self._accept_guesses(chunk, tokens[first:after], extras))
                continue
            if request.status is RequestStatus.RUNNING:
                self._written(request, chunk.start + chunk.num_tokens)
            if extras is not None:
                outputs.append(self._accept_with_extras(request, token, extras))
            elif token is not None:
                outputs.append(self._accept(request, [token]))
        return outputs

    def settle(self) -> None:
        """Do what `commit` has put off: the next step waits for its tokens, and for nothing else of this.

        For when the device is busy again; the next `commit` does it, if nobody did.
        """
        for request in self._unshared:
            self.kv.written(request, request.num_written_tokens)
        self._unshared.clear()
        if self._speculator is not None:
            self._speculator.source.settle()

    def _take_loads(self, num_loaded: int, now: float) -> None:
        """So many blocks have come from the host since the start."""
        arrived = num_loaded - self.kv.host.num_loaded
        if arrived > 0 and self._residency is not None:
            self._residency.loaded(arrived, now - self._loading_since_s)
            self._loading_since_s = now
        self.kv.loaded(num_loaded)

    def _measure(self, plan: StepPlan, now: float, *, ended_unseen: bool) -> None:
        """How long the step took: from the end of the one before it, if that was later than its own beginning."""
        before_s, self._last_commit_s = self._last_commit_s, now
        is_exact, self._end_was_seen = self._end_was_seen and not ended_unseen, not ended_unseen
        began_s = max(plan.planned_s, before_s)
        prefills = plan.prefills
        if self._speculator is not None and plan.chunks and not prefills:
            # from the end of the step before: where nothing overlaps, the host's part counts
            self._speculator.measured(len(plan.chunks), plan.num_tokens, now - before_s, overlapped=plan.is_overlapped)
        if self._residency is not None and prefills:
            num_tokens = sum(chunk.num_tokens for chunk in prefills)
            if num_tokens >= MEASURED_PREFILL and is_exact:
                self._residency.computed(num_tokens, now - began_s)
        if self.chunking is None or not plan.chunks or plan.num_verifying:
            return
        context = plan.decode_context or sum(chunk.start for chunk in plan.chunks[: plan.num_decodes])
        work = StepWork(
            plan.num_decodes,
            context,
            sum(chunk.num_tokens for chunk in prefills),
            sum(attention_pairs(chunk.start, chunk.num_tokens) for chunk in prefills),
        )
        self.chunking.observe(work, now - began_s, ended_unseen=ended_unseen)

    def _written(self, request: Request, num_tokens: int) -> None:
        if num_tokens >= (request.num_tree_blocks + 1) * BLOCK_SIZE:
            self.kv.written(request, num_tokens)
        else:
            request.num_written_tokens = num_tokens

    def _accept_guesses(self, chunk: Chunk, tokens: list[int], extras: ChunkExtras | None) -> RequestOutput:
        """tokens: those of the decode itself and after each guess."""
        request, guesses = chunk.request, chunk.guesses
        num_right = right_guesses(guesses, tokens)
        if self._speculator is not None:
            self._speculator.verified(request, len(guesses), num_right)
        return self._accept(request, verified_tokens(tokens, num_right), extras, verified=True)

    def _accept(
        self,
        request: Request,
        tokens: list[int],
        extras: ChunkExtras | None = None,
        *,
        verified: bool = False,
    ) -> RequestOutput:
        """The request's next tokens, up to the one that ends it, and those that its grammar forces after them.

        verified: all but the last of them were guessed, and their KV is written.
        """
        start = len(request.output_token_ids) - request.num_unsent_tokens
        request.num_unsent_tokens = 0
        constraint, reason = request.constraint, None
        if constraint is None and tokens and self._goes_on(request, tokens):
            self._extend(request, tokens)
        else:
            for token in tokens:
                if constraint is not None and not constraint.accept(token):
                    return self._fail_constraint(request, "the token that was sampled does not conform to the grammar")
                reason = self._append(request, token)
                if reason is not None:
                    break
        if verified:
            request.num_computed_tokens = request.num_written_tokens = request.num_tokens - 1
            if request.num_computed_tokens >= (request.num_tree_blocks + 1) * BLOCK_SIZE:
                self._unshared.append(request)
        if constraint is not None and tokens and reason is None:
            reason = self._jump_forward(request, constraint)
        if reason is not None:
            self._finish(request, reason)
        tokens = request.output_token_ids[start:]
        logprobs = prompt_logprobs = embedding = None
        if extras is not None:
            logprobs = extras.logprobs and extras.logprobs[: len(tokens)]
            prompt_logprobs, embedding = extras.prompt_logprobs, extras.embedding
        return RequestOutput(  # by position: twice as fast
            request.request_id, tokens, reason, request.stop_reason, request.num_cached_tokens, None,
            logprobs, prompt_logprobs, embedding, request.num_preemptions, request.num_host_tokens,
        )  # fmt: skip

    def _accept_with_extras(self, request: Request, token: int | None, extras: ChunkExtras) -> RequestOutput:
        request.num_prompt_logprobs += len(extras.prompt_logprobs or ())
        return self._accept(request, [] if token is None else [token, *extras.token_ids], extras)

    def _append(self, request: Request, token: int) -> FinishReason | None:
        """One more output token. Returns why it is the last, if it is."""
        self._extend(request, (token,))
        return self._stops(request, token)

    def _extend(self, request: Request, tokens: Sequence[int]) -> None:
        request.output_token_ids.extend(tokens)
        self._accounts[request.request_id].served += OUTPUT_WEIGHT * len(tokens)
        if self._speculator is not None:
            self._speculator.source.saw(request, tokens)

    def _goes_on(self, request: Request, tokens: Sequence[int]) -> bool:
        """Whether none of these next tokens can be the last: what `_stops` says of each, at once."""
        ends = request.params.stop_token_ids
        return (
            request.num_tokens + len(tokens) < request.max_num_tokens
            and self._eos.isdisjoint(tokens)
            and not (ends and any(token in ends for token in tokens))
        )

    def _stops(self, request: Request, token: int) -> FinishReason | None:
        """Whether this token ends the request; before min_tokens only length can, and the end of a grammar."""
        params, constraint = request.params, request.constraint
        if constraint is not None and constraint.ended and token in constraint.stop_token_ids:
            return FinishReason.STOP
        if len(request.output_token_ids) >= params.min_tokens:
            if token in self._eos and not params.ignore_eos:
                return FinishReason.STOP
            if token in params.stop_token_ids:
                request.stop_reason = token
                return FinishReason.STOP
        return FinishReason.LENGTH if request.num_tokens >= request.max_num_tokens else None

    # -- structured output -------------------------------------------------------------------------------------------

    def _force_beginning(self, request: Request) -> None:
        """What the grammar forces before anything is sampled is computed along with the prompt."""
        constraint = request.constraint
        if constraint is not None:
            forced = constraint.forced(request.max_num_tokens - request.num_tokens - 1, may_end=False)
            request.output_token_ids.extend(forced)
            request.num_unsent_tokens = len(forced)

    def _jump_forward(self, request: Request, constraint: Constraint) -> FinishReason | None:
        """Append the tokens that must come next; a chunk like a prompt's computes their KV in one step.

        A step in flight samples the first of them anyway: its token is dropped when it comes.
        """
        running = request.status is RequestStatus.RUNNING
        room = request.max_num_tokens - request.num_tokens
        if running:
            blocks = len(request.block_ids) + self.kv.pool.num_available
            room = min(room, blocks * BLOCK_SIZE - request.num_tokens)
        forced = constraint.forced(room, least=request.num_in_flight + 1)
        for token in forced:
            reason = self._append(request, token)
            if reason is not None:
                return reason
        if forced:
            request.num_superseded += request.num_in_flight
            request.num_in_flight = 0
        if forced and running:
            self.kv.grow(request, request.num_tokens)
            self._decoding.remove(request)
            self._prefilling.insert(0, request)
        return None

    def fail(self, request: Request, message: str) -> None:
        """End a request that cannot go on; the next outputs say so."""
        if not request.is_finished:
            self._outputs.append(self._fail_constraint(request, message))

    def _fail_constraint(self, request: Request, message: str) -> RequestOutput:
        self._finish(request, FinishReason.ERROR)
        return RequestOutput(request.request_id, [], FinishReason.ERROR, stop_reason="grammar", error=message)

    def _fail(self, request: Request, token: int) -> RequestOutput:
        """The step brought no token for this request, but one of the codes for why."""
        if token == FORBIDDEN_TOKEN:
            self._finish(request, FinishReason.ERROR)
            message = "the request's own parameters (allowed_token_ids, bad_words, …) forbid every token here"
            return RequestOutput(request.request_id, [], FinishReason.ERROR, stop_reason="forbidden", error=message)
        self.kv.discard(request)
        self._finish(request, FinishReason.ERROR)
        message = "the model's output was not a number (NaN or infinity) for this request"
        return RequestOutput(request.request_id, [], FinishReason.ERROR, error=message)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is RequestStatus.RUNNING:
            self._stop_running(request)
            leaf = self.kv.release(request)
            if self._residency is not None:
                self._residency.finished(request, leaf, self._now)
        else:
            self._waiting.remove(request)
            self._num_swapped -= request.num_preemptions > 0
            self.kv.forget_tenant(request)
            self._look_again(request)
            if self._residency is not None:
                self._residency.abandoned(request)
        request.move(RequestStatus.FINISHED)
        request.finish_reason = reason
        del self._requests[request.request_id], self._accounts[request.request_id]
        if len(self._deadlines) > 2 * len(self._requests) + MANY_DEADLINES:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].is_finished]
            heapify(self._deadlines)
        if self._speculator is not None:
            self._speculator.source.forget(request)
        self._waiting.leave(request)

    # -- what others may know ------------------------------------------------------------------------------------

    def kv_waste(self) -> float:
        """Room for tokens in the blocks of running requests that holds none, as a share of what is in use."""
        unused = 0
        for request in (*self._decoding, *self._prefilling):
            blocks = len(request.block_ids) + len(request.shadow_block_ids)
            unused += blocks * BLOCK_SIZE - request.num_computed_tokens
        used = self.kv.pool.num_owned * BLOCK_SIZE - unused
        return unused / used if used > 0 else 0.0

    def stats(self) -> SchedulerStats:
        host = self.kv.host
        if self._num_steps % WASTE_STEPS == 0 or not self.num_running:
            self._kv_waste = self.kv_waste()
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=len(self._waiting),
            kv_usage=self.kv.pool.num_owned / self.kv.pool.num_blocks,
            num_preemptions=self._num_preemptions,
            prefix_cache_queries=self._prefix_queries,
            prefix_cache_hits=self._prefix_hits,
            host_cache_queries=self._host_queries,
            host_cache_hits=self._host_hits,
            host_usage=host.pool.num_idle / host.pool.num_blocks if host.pool.num_blocks else 0.0,
            num_swapped_out=host.num_stored,
            num_swapped_in=host.num_loaded,
            num_recomputed_tokens=self._num_recomputed,
            num_swapped=self._num_swapped,
            kv_waste=self._kv_waste,
            **self._session_stats(),
            **self._speculation_stats(),
        )

    def take_block_lives(self) -> list[BlockLife]:
        """Of the sampled blocks that have left the device's cache since the last call."""
        return self.kv.times.take() if self.kv.times is not None else []

    def _speculation_stats(self) -> SpeculationStats:
        if self._speculator is None:
            return {}
        counts = self._speculator.counts
        return {
            "num_drafts": counts.num_drafts,
            "num_draft_tokens": counts.num_draft_tokens,
            "num_accepted_tokens": counts.num_accepted_tokens,
            "accepted_per_position": counts.accepted_per_position,
        }

    def _session_stats(self) -> dict[str, int]:
        residency, pool = self._residency, self.kv.pool
        if residency is None:
            return {}
        return {
            "sessions_active": self.num_running + len(self._waiting) - self._num_held,
            "sessions_acting": residency.num_acting,
            "sessions_parked": residency.num_parked,
            "sessions_held": self._num_held,
            "sessions_kv_wanted": pool.num_owned + pool.num_kept + residency.parked_blocks,
            "sessions_kv_kept": pool.num_kept,
        }

    def check_integrity(self) -> None:
        """Recount blocks, references and slots. Raises BlockPoolError. For tests after every step, and when idle."""
        if self._residency is not None:
            self._residency.check_integrity()
        self.kv.check_integrity(self._decoding + self._prefilling)


def _lacks_block(request: Request) -> bool:
    """Whether a decode begins a new block."""
    if request.num_in_flight and request.num_tokens + request.num_in_flight >= request.max_num_tokens:
        return False
    return request.num_computed_tokens == len(request.block_ids) * BLOCK_SIZE
