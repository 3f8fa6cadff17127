"""A step's plan for other ranks: what they do not know yet, and nothing else, as one small message.

Every rank computes the same plan with its own share of the weights. The sender remembers what the others know of each
request; the receiver keeps requests of its own up to date by what it is told, and makes the same plan of them. For a
decode this is a few numbers a request.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from mainsail_engine.kv.moves import BlockCopy, BlockMove
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.step import Chunk, StepPlan


class NewRequest(msgspec.Struct, frozen=True, array_like=True):
    key: int
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    adapter_slot: int


class ChunkMessage(msgspec.Struct, frozen=True, array_like=True):
    key: int
    start: int
    num_tokens: int
    samples: bool
    slot: int
    num_preemptions: int
    num_prompt_logprobs: int
    new_tokens: list[int]
    """Output tokens that have become known."""
    new_blocks: list[int]
    fresh_table: bool
    """new_blocks is the whole table: the request has moved in, or was preempted."""
    guesses: list[int] = []


class PlanMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    num_decodes: int
    num_verifying: int
    constrained: bool
    added: list[NewRequest]
    gone: list[int]
    chunks: list[ChunkMessage]
    copies: list[tuple[int, int, int]]
    stores: list[tuple[int, int]]
    loads: list[tuple[int, int]]
    num_loaded: int
    """Loads, of all plans before, that are known to be done on the sender (step.StepPlan)."""


class SleepMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Weights to the host, KV dropped. Nothing is in flight."""


class WakeUpMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The way back. It ends with a step that all ranks compute together."""


class MasksMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The masks of the oldest constrained plan that is not sampled yet (step.PendingLogits)."""

    rows: list[int]
    words: bytes
    """[len(rows), ceil(vocab / 32)] int32."""


class AdapterMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Read this LoRA adapter and put it into this slot, before the next plan. Rank 0 has read it too: it is right."""

    slot: int
    name: str
    path: str


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(PlanMessage | MasksMessage | AdapterMessage | SleepMessage | WakeUpMessage).decode


@dataclass(slots=True, eq=False)
class _Told:
    """What the others know of a request."""

    key: int
    request: Request
    num_outputs: int = 0
    blocks: list[int] | None = None
    num_blocks: int = 0


class PlanSender:
    def __init__(self) -> None:
        self._told: dict[int, _Told] = {}
        """By the identity of the request, which the entry keeps alive."""
        self._next_key = 0

    def message(self, plan: StepPlan, num_loaded: int = 0) -> PlanMessage:
        """What to tell of this plan. Call once for every plan, in the order of their launch, before it is launched."""
        gone = [told for told in self._told.values() if told.request.is_finished]
        for told in gone:
            del self._told[id(told.request)]
        added: list[NewRequest] = []
        chunks = [self._chunk(chunk, added) for chunk in plan.chunks]
        return PlanMessage(
            num_decodes=plan.num_decodes,
            num_verifying=plan.num_verifying,
            constrained=plan.is_constrained,
            added=added,
            gone=[told.key for told in gone],
            chunks=chunks,
            copies=[(copy.src, copy.dst, copy.num_tokens) for copy in plan.copies],
            stores=[(move.device, move.host) for move in plan.stores],
            loads=[(move.device, move.host) for move in plan.loads],
            num_loaded=num_loaded,
        )

    def _chunk(self, chunk: Chunk, added: list[NewRequest]) -> ChunkMessage:
        request = chunk.request
        told = self._told.get(id(request))
        if told is None:
            told = self._told[id(request)] = _Told(self._next_key, request)
            self._next_key += 1
            params = _without_grammar(request)
            added.append(
                NewRequest(told.key, request.request_id, request.prompt_token_ids, params, request.adapter_slot)
            )
        new_tokens = request.output_token_ids[told.num_outputs :]
        fresh = told.blocks is not chunk.block_ids or told.num_blocks > len(chunk.block_ids)
        new_blocks = chunk.block_ids[0 if fresh else told.num_blocks :]
        told.num_outputs += len(new_tokens)
        told.blocks, told.num_blocks = chunk.block_ids, len(chunk.block_ids)
        return ChunkMessage(
            told.key, chunk.start, chunk.num_tokens, chunk.samples, chunk.slot, request.num_preemptions,
            request.num_prompt_logprobs, new_tokens, new_blocks, fresh, list(chunk.guesses),
        )  # fmt: skip


def _without_grammar(request: Request) -> SamplingParams:
    """What a sampler has to know that is told nothing of the request's grammar, but its masks: those see to min_tokens,
    and let a text end that is complete before."""
    return request.params if request.constraint is None else msgspec.structs.replace(request.params, min_tokens=0)


class PlanReceiver:
    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}

    def plan(self, message: PlanMessage) -> StepPlan:
        """The sender's plan, of requests of our own. Call once for every message, in order."""
        for new in message.added:
            self._requests[new.key] = Request(
                new.request_id, new.prompt_token_ids, new.params, arrival_time_s=0.0, adapter_slot=new.adapter_slot
            )
        plan = StepPlan(
            chunks=[self._chunk(chunk) for chunk in message.chunks],
            copies=[BlockCopy(*copy) for copy in message.copies],
            stores=[BlockMove(*move) for move in message.stores],
            loads=[BlockMove(*move) for move in message.loads],
            num_loaded=message.num_loaded,
            num_decodes=message.num_decodes,
            num_verifying=message.num_verifying,
            constrained_elsewhere=message.constrained,
        )
        for key in message.gone:
            del self._requests[key]
        return plan

    def _chunk(self, told: ChunkMessage) -> Chunk:
        request = self._requests[told.key]
        request.output_token_ids += told.new_tokens
        request.num_preemptions = told.num_preemptions
        request.num_prompt_logprobs = told.num_prompt_logprobs
        if told.fresh_table:
            request.block_ids = told.new_blocks
        else:
            request.block_ids += told.new_blocks
        return Chunk(request, told.start, told.num_tokens, told.samples, told.slot, request.block_ids, told.guesses)
