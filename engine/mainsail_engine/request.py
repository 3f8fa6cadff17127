"""A request as the core sees it: token ids, sampling parameters, where it stands, and the moves it may make.

    WAITING ──admit──▶ RUNNING ──▶ FINISHED
       ▲                  │
       └────preempt───────┘        (abort: from anywhere to FINISHED)

The scheduler owns every field below but `params` and `prompt_token_ids`, which never change. With two steps in
flight a request's newest token may exist on the device only: `num_in_flight` counts those.
Nothing here imports torch: the API process builds `SamplingParams` too.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from mainsail_engine.kv.prefix_tree import Node
    from mainsail_engine.sessions import Session
    from mainsail_engine.structured.constraint import Constraint


class Pooling(enum.StrEnum):
    """How the hidden states of a prompt become one vector."""

    MEAN = "mean"
    LAST = "last"
    CLS = "cls"
    """The first one, of an encoder."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to pick tokens and when to stop. The API process has checked every value before it gets here."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    seed: int | None = None
    """The same seed gives the same tokens whatever else is in the batch. None: a fresh one per request."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the answer has."""
    frequency_penalty: float = 0.0
    """… and once more for each time that it has it."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in prompt or answer are divided by this, negative ones multiplied."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what to add to its logit)."""
    allowed_token_ids: tuple[int, ...] = ()
    """Nothing else may be picked. Empty: everything may."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that the answer must not contain: the last token of each is forbidden after the others."""
    logprobs: int | None = None
    """With each token its log-probability and those of so many best ones (0: its own only). None: none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, from the second on."""
    pooling: Pooling | None = None
    """The prompt's embedding is asked for, not its continuation (max_tokens is 1 then, and its token of no use)."""

    @property
    def reads_whole_prompt(self) -> bool:
        """Every position's hidden state is needed: cached KV cannot stand in for it."""
        return self.prompt_logprobs is not None or self.pooling in (Pooling.MEAN, Pooling.CLS)


class FinishReason(enum.StrEnum):
    """OpenAI's finish reasons, and two of our own that never reach a client as a reason."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


Place = tuple[int, float, int]
"""Of a waiting request in its lane: smaller goes first (waiting.py)."""

LEGAL_MOVES: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.WAITING: frozenset({RequestStatus.RUNNING, RequestStatus.FINISHED}),
    RequestStatus.RUNNING: frozenset({RequestStatus.WAITING, RequestStatus.FINISHED}),
    RequestStatus.FINISHED: frozenset(),
}


class IllegalMoveError(RuntimeError):
    """A bug: a request was moved to a state that it cannot reach from where it is."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Request:
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time_s: float
    """Monotonic clock."""
    priority: int = 0
    """Higher first."""
    cache_salt: str = ""
    """Requests share cached prefixes only with the same salt."""
    adapter_slot: int = -1
    """Where the LoRA adapter lies that this request goes through. -1: it goes through none."""
    user: str = ""
    """Whose account this request is charged to: users who wait are served fairly."""
    session_id: str = ""
    """The client's name for the conversation, if it has one: sessions are recognised without (sessions.py)."""
    session: Session | None = None
    """Whose turn this is. Set by the scheduler."""
    deadline_s: float | None = None
    """Monotonic clock: not finished by then, the request ends with an error. None: no deadline."""
    constraint: Constraint | None = None
    """What the output must conform to. It has accepted exactly output_token_ids."""
    output_token_ids: list[int] = field(default_factory=list[int])
    num_unsent_tokens: int = 0
    """The last output tokens that no output has told yet: forced ones, before the first step."""
    num_superseded: int = 0
    """Tokens that launched steps will sample for nothing: a jump forward has put others there."""
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    slot: int = -1
    """Row in the runner's per-request tensors while RUNNING, else -1."""
    block_ids: list[int] = field(default_factory=list[int])
    """Block table: block i holds the KV of positions [16 i, 16 i + 16)."""
    num_computed_tokens: int = 0
    """Positions whose KV is written, or will be by the steps in flight."""
    num_in_flight: int = 0
    """Tokens that launched steps will sample and that are not in output_token_ids yet."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix tree gave at the first admission (usage.prompt_tokens_details.cached_tokens)."""
    num_host_tokens: int = 0
    """… and those of them that came from host memory."""
    num_prompt_logprobs: int = 0
    """Prompt positions whose log-probabilities a finished step has brought."""
    num_preemptions: int = 0
    num_written_tokens: int = 0
    """Positions whose KV a finished step has written: what the prefix tree may share."""
    last_decode_step: int = 0
    """The scheduler's step that planned its last decode: of several that may decode, who waited longest comes first."""
    num_launched_chunks: int = 0
    """Chunks of this request in launched steps. A preempted request waits until there is none."""
    max_num_tokens: int = 0
    """Prompt and answer together end here: by max_tokens, or the model's length. Set by the scheduler."""
    arrival_index: int = -1
    """Seniority: by its session's arrival, then its own; kept through preemptions. Set by the scheduler."""
    place: Place = (0, 0.0, 0)
    """Among the waiting requests of its user, while it waits. Set by the queue (waiting.py)."""
    tree_node: Node | None = None
    """Where this request's written path ends in the prefix tree; None: at the root."""
    num_tree_blocks: int = 0
    """Full blocks on that path."""
    shadow_block_ids: list[int] = field(default_factory=list[int])
    """The tree's blocks for content that this request computed a second time; owned to keep the path."""
    load: int = 0
    """Number of the last load from the host that this request waits for (kv/host_tier.py). 0: of none."""
    held_room: int = 0
    """While it is held for other sessions: the available blocks that it would need."""
    held_step: int = 0
    """… and the step that last looked at it."""
    resume_node: Node | None = None
    """Where its KV ended in the prefix tree when it was preempted last."""
    num_lost_tokens: int = 0
    """Positions that were computed when it was preempted last, and not resumed from yet."""

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_cached_tokens(self) -> int:
        """How many leading positions may come from the cache: a step must compute at least one."""
        if not self.params.reads_whole_prompt:
            return self.num_tokens - 1
        done = self.num_prompt_logprobs if self.params.pooling is None else 0
        return self.num_tokens - 1 if done and done >= len(self.prompt_token_ids) - 1 else done

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Known token ids of positions [start, stop)."""
        prompt_len = len(self.prompt_token_ids)
        if stop <= prompt_len:
            return self.prompt_token_ids[start:stop]
        if start >= prompt_len:
            return self.output_token_ids[start - prompt_len : stop - prompt_len]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - prompt_len]

    def move(self, status: RequestStatus) -> None:
        """Change state. Raises IllegalMoveError for a move that the diagram above does not have."""
        if status not in LEGAL_MOVES[self.status]:
            raise IllegalMoveError(f"request {self.request_id}: {self.status.name} -> {status.name}")
        self.status = status
