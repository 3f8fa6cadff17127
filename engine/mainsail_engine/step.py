"""What passes between scheduler and runner: a step's plan, and what came of it.

    plan   = scheduler.schedule(now)          which tokens of which requests, block tables grown, copies to make
    handle = runner.launch(plan)              asynchronous on CUDA
    result = handle.result()                  the sampled tokens, on the CPU
    outputs = scheduler.commit(plan, result, now)

With constrained rows (structured output) the step is sampled in a second move, `handle.sample(masks)`.

Up to two plans may be in flight: plan N+1 may name a token that step N is still sampling. Its id is then not in
`request.output_token_ids` yet (`chunk.start >= request.num_tokens`), and the runner takes it from the device, where it
keeps the newest sampled token of every slot. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mainsail_engine.kv.moves import BlockCopy, BlockMove
from mainsail_engine.protocol import TokenLogprobs
from mainsail_engine.request import Request


@dataclass(slots=True)
class Chunk:
    """Consecutive positions [start, start + num_tokens) of one request, to be computed in this step."""

    request: Request
    start: int
    num_tokens: int
    samples: bool
    """The last position's logits are sampled: the chunk reaches the end of what is known (or in flight)."""
    slot: int
    """The request's slot when the plan was made (the request may be preempted or finished before the step ends)."""
    block_ids: list[int]
    """The request's own block table (a reference: it covers every position of the chunk)."""
    guesses: Sequence[int] = ()
    """Tokens that may follow the one at `start`: a decode that verifies them. It has one row for each and one more, and
    every row is sampled. Nothing else is in flight when such a chunk is planned, and nothing is planned until it is
    committed: all of its tokens are known on the CPU."""


@dataclass(slots=True)
class StepPlan:
    """One forward pass, and the copies around it. In this order: stores, copies, loads begun, forward pass.

    Decodes (one token, samples) come first, so that a pure prefix of the batch is uniform, then those that verify
    guesses. A plan may be without any
    chunk: its result then waits for all loads begun so far, since nothing else can go on.
    """

    chunks: list[Chunk] = field(default_factory=list[Chunk])
    stores: list[BlockMove] = field(default_factory=list[BlockMove])
    """Device to host, read before anything of this plan is written. Their device blocks may be written by it."""
    loads: list[BlockMove] = field(default_factory=list[BlockMove])
    """Host to device, begun with this plan and finished whenever: no chunk of this plan touches these blocks."""
    copies: list[BlockCopy] = field(default_factory=list[BlockCopy])
    """Done before the forward pass. No block is both a source and a destination, so their order does not matter."""
    num_decodes: int = 0
    """The first num_decodes chunks have exactly one token and sample."""
    planned_s: float = 0.0
    """Monotonic clock."""
    num_loaded: int = 0
    """On a rank above 0: so many loads are known to be done on rank 0, and this plan may read what they brought."""
    constrained_elsewhere: bool = False
    """On a rank above 0: rank 0, which has the grammars, says that the plan is constrained."""
    decode_context: int = 0
    """Tokens in the contexts of the decodes, together (counted only where chunks follow a latency target)."""

    is_overlapped: bool = False
    """It was planned while another was in flight."""
    num_verifying: int = 0
    """The chunks after the decodes that verify guesses."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def prefills(self) -> list[Chunk]:
        """The chunks of prompts."""
        return self.chunks[self.num_decodes + self.num_verifying :]

    @property
    def is_constrained(self) -> bool:
        """Some row's next token must conform to a grammar: the sampling waits for masks (see PendingLogits)."""
        return self.constrained_elsewhere or any(
            chunk.samples and chunk.request.constraint is not None for chunk in self.chunks
        )


FAILED_TOKEN = -1
"""In place of a token: the row's logits held NaN or only infinities. That request alone fails."""
FORBIDDEN_TOKEN = -2
"""In place of a token: the request's own parameters forbid every one."""


@dataclass(slots=True)
class ChunkExtras:
    """What a chunk brought besides one token."""

    token_ids: list[int] = field(default_factory=list[int])
    """Further tokens, after the one in StepResult.token_ids."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each token of the chunk."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the request's next prompt positions."""
    embedding: bytes | None = None
    """Float32, of the whole prompt."""


@dataclass(slots=True, frozen=True)
class StepResult:
    """Sampled token ids, in the plan's order: one for each chunk with `samples`, and one for each of its guesses."""

    token_ids: list[int]
    extras: dict[int, ChunkExtras] = field(default_factory=dict[int, ChunkExtras])
    """By a chunk's place in the plan; empty when no request of the step wants more than a token."""
    num_loaded: int = 0
    """Blocks of `loads` that have arrived since the runner started, over all plans, in the order they were begun."""
    ended_unseen: bool = False
    """The device was done with it before anybody asked, so that nobody knows since when."""


class PendingStep(Protocol):
    def result(self) -> StepResult:
        """Wait for the step and bring its tokens to the CPU. Called once, in launch order."""
        ...


class PendingLogits(PendingStep, Protocol):
    """A launched step of a constrained plan: the forward pass is on its way, nothing is sampled yet.

    A row's mask depends on its last token, which the step before may still be computing. So the masks are filled and
    the sampling is queued once that step is committed, while the device computes this one's forward pass.
    """

    def sample(self, rows: Sequence[int], fill: Callable[[np.ndarray], None]) -> None:
        """Queue the sampling, before `result`. rows: those with a mask, among the rows that the step samples.

        fill writes the masks, one for each of rows, into an array [len(rows), ceil(vocab / 32)] int32.
        """
        ...


class Runner(Protocol):
    """What the core needs of a model runner."""

    num_blocks: int
    """KV blocks in the pool. The scheduler hands out ids 0 .. num_blocks - 1."""
    max_model_len: int
    eos_token_ids: frozenset[int]
    vocab_size: int

    @property
    def num_host_blocks(self) -> int:
        """Blocks of host memory there are by now: 0 .. num_host_blocks - 1. It may grow after the start."""
        ...

    def launch(self, plan: StepPlan) -> PendingStep | PendingLogits:
        """Start one step; PendingLogits if and only if the plan is constrained. Reads the plan's requests at once."""
        ...
