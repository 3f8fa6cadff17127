"""The messages between API processes and the core process: msgspec structs as msgpack over ZMQ.

API → core: `Add`, `Abort`, and `Compile`, `Control`, `LoadAdapter` and `UnloadAdapter`, which are answered by
`Compiled` and `Controlled`. Core → API: `Ready` once, then one `StepOutputs` for every step (its counter is the
heartbeat), or `Failed` with the last breath. Draining is the API processes' business: the core just runs out of work.
Text never crosses: the core deals in token ids only.

With several API processes, the id of a request, compile or control begins with its process's number
(`request_id_prefix`): answers go back to where it came from. Process 0, the leader, hears of every step; the others of
those that bring them something.
"""

from __future__ import annotations

import msgspec

from mainsail_engine.config import EngineConfig
from mainsail_engine.request import FinishReason, SamplingParams
from mainsail_engine.structured.grammar import Grammar


class Add(msgspec.Struct, frozen=True, tag=True, array_like=True):
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    user: str = ""
    """Users who wait are served fairly."""
    timeout_s: float | None = None
    """Not finished after this long, the request ends with an error. None: no limit."""
    output_token_ids: list[int] = []
    """Generated already, by another engine: the answer goes on after them."""
    grammar: Grammar | None = None
    """What the answer must conform to."""
    session_id: str = ""
    """The client's name for the conversation, if it has one."""
    adapter: str = ""
    """The LoRA adapter to go through; empty: none."""


class Compile(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Compile a grammar, before a request that needs it: what is wrong with it is known before an answer begins."""

    compile_id: str
    grammar: Grammar


class Compiled(msgspec.Struct, frozen=True, tag=True, array_like=True):
    compile_id: str
    error: str | None
    """For the client. None: compiled, and cached."""


class Abort(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Forget these requests. reason: stop when a stop string ended them, abort when the client went away."""

    request_ids: list[str]
    reason: FinishReason = FinishReason.ABORT


class Control(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Something to do between requests: sleep (weights to the host, KV dropped) or wake_up. Waits for running ones."""

    control_id: str
    """Begins with the process's number, as request ids do."""
    action: str


class Controlled(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A control is done, or why not."""

    control_id: str
    error: str | None = None


class LoadAdapter(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Load a LoRA adapter beside what runs; answered by `Controlled`, after everybody was told by `Adapters`."""

    control_id: str
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Forget a LoRA adapter: requests that go through it finish. Answered as `LoadAdapter`."""

    control_id: str
    name: str


class Adapters(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The LoRA adapters that there are from now on."""

    paths: dict[str, str]
    """By served name."""


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Weights are loaded and one token was generated."""

    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    eos_token_ids: list[int]
    device: str
    dtype: str
    adapters: dict[str, str] = {}
    """LoRA adapters: served name → path."""
    embeds_only: bool = False
    """The model has no head: it makes embeddings and no text."""
    hidden_size: int = 0
    start: dict[str, float] = {}
    """Seconds of each phase of the core's start (timeline.py)."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """One position: log-probabilities under the model's own distribution (before penalties and temperature)."""

    token_ids: list[int]
    """The token that is there, then the best ones, best first."""
    logprobs: list[float]
    rank: int
    """1 + how many tokens are more probable than the one that is there."""


class RequestOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step brought one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    """With finish_reason error: what went wrong with this request."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each of token_ids, if they were asked for."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the next prompt positions (the first output begins at the prompt's second token)."""
    embedding: bytes | None = None
    """The prompt's embedding: float32 numbers, not normalized."""
    num_preemptions: int = 0
    """How often the request has been preempted so far."""
    num_host_tokens: int = 0
    """Of num_cached_tokens, those that came from host memory."""


class SchedulerStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges at the end of the step, counters since the core started or woke up."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    """Share of the blocks that requests hold (cached but idle ones are free): 0 .. 1."""
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens looked up."""
    prefix_cache_hits: int = 0
    """Prompt tokens found."""
    host_cache_queries: int = 0
    """Tokens that were not on the device, looked up in host memory: of prompts, and of requests that resume."""
    host_cache_hits: int = 0
    """Tokens found in host memory: of prompts, and of requests that resume."""
    host_usage: float = 0.0
    """Share of the host tier's blocks that hold something: 0 .. 1."""
    num_swapped_out: int = 0
    """Blocks copied to the host."""
    num_swapped_in: int = 0
    """Blocks copied back."""
    num_recomputed_tokens: int = 0
    """Tokens that preempted requests had computed before and had to compute again."""
    num_swapped: int = 0
    """Preempted requests that wait to resume."""
    kv_waste: float = 0.0
    """Room in allocated blocks that holds nothing, as a share of what is in use."""
    sessions_active: int = 0
    """With a turn that runs, or waits for room."""
    sessions_acting: int = 0
    """Between turns, their KV kept on the device."""
    sessions_parked: int = 0
    """Between turns, expected back; their KV may go to the host."""
    sessions_held: int = 0
    """With a turn that is held, because others are expected back."""
    sessions_kv_wanted: int = 0
    """KV blocks of all live sessions together, wherever they are: more than the pool has is over-subscription."""
    sessions_kv_kept: int = 0
    """KV blocks on the device that are kept for sessions between turns."""
    num_drafts: int = 0
    """Times that a request's guesses were verified (speculative decoding)."""
    num_draft_tokens: int = 0
    """Those guesses."""
    num_accepted_tokens: int = 0
    """… and the right ones among them."""
    accepted_per_position: list[int] = []
    """… by their place among a request's guesses."""


class BlockLife(msgspec.Struct, frozen=True, array_like=True):
    """A sampled KV block has left the device's prefix cache."""

    lifetime_s: float
    """Since it came."""
    idle_s: float
    """Since a request began with it last, or it came."""
    reuse_gaps_s: list[float]
    """Between its coming and the uses that followed: the last few."""


class FirstScheduled(msgspec.Struct, frozen=True, array_like=True):
    """A request's first tokens were planned: its time in the queue is over."""

    request_id: str
    queue_time_s: float


class AdapterUse(msgspec.Struct, frozen=True, array_like=True):
    """Names of the LoRA adapters that requests go through which run, or wait; an adapter may be in both."""

    running: list[str] = []
    waiting: list[str] = []


class StepOutputs(msgspec.Struct, frozen=True, tag=True, array_like=True):
    step: int
    """Counts every step: the heartbeat."""
    outputs: list[RequestOutput]
    stats: SchedulerStats
    num_step_tokens: int
    step_time_s: float
    first_scheduled: list[FirstScheduled] = []
    host_time_s: float = 0.0
    """The step's time without the wait for the device."""
    block_lives: list[BlockLife] = []
    adapter_use: AdapterUse | None = None
    """Told where it has changed since the last step, and then to every API process."""
    num_wakes: int = 0
    """How often the engine has woken up: each time the counters of its stats begin anew."""


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The core cannot go on (or could not start). The process exits non-zero after this."""

    reason: str
    message: str


ToCore = Add | Abort | Compile | Control | LoadAdapter | UnloadAdapter
FromCore = Ready | StepOutputs | Compiled | Controlled | Adapters | Failed


def request_id_prefix(process: int) -> str:
    """What the ids of an API process's requests begin with: two hexadecimal digits."""
    return f"{process:02x}"


def process_of(request_id: str) -> int:
    """The API process that a request came from; 0 for ids that do not say."""
    try:
        return int(request_id[:2], 16)
    except ValueError:
        return 0


class CoreStart(msgspec.Struct, frozen=True, kw_only=True):
    """The one line of JSON on the core's standard input: what to run, and the addresses to talk over."""

    config: EngineConfig
    commands_addresses: list[str]
    """One for each API process, the leader's first; `outputs_addresses` likewise."""
    outputs_addresses: list[str]
    started_s: float = 0.0
    """Monotonic time at which this process was started."""


encode = msgspec.msgpack.Encoder().encode
decode_to_core = msgspec.msgpack.Decoder(ToCore).decode
decode_from_core = msgspec.msgpack.Decoder(FromCore).decode
