"""Every metric of the engine, in a few tables.

Names, labels and bucket bounds are vLLM's, so that dashboards, KEDA scalers and endpoint pickers made for it work
unchanged; low bounds are added where its own are too coarse to see a fast model. Names that it has given up are shown
beside those that took their place (`OLDER_NAMES`): dashboards outlive them. Our own go under `mainsail:`.

Tokens are counted when they come from the core. Times are the client's, as near as a server can know them: a request
arrives when its HTTP head has been read, a token of a stream is there when its event was handed to the socket (of an
answer sent whole, when the token came from the core).

Values live in cells that all API processes share (`cells.py`): each writes its own, and a scrape of any one shows the
sums. That also makes an observation one look-up and two additions, which a stream of tokens can afford. The exposition
is prometheus_client's.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString  # pyright: ignore[reportUnknownVariableType]

from mainsail_engine.cells import Cells
from mainsail_engine.config import MAX_SPECULATIVE_TOKENS, CacheConfig
from mainsail_engine.protocol import AdapterUse, Ready, SchedulerStats, StepOutputs
from mainsail_engine.timeline import PHASES

if TYPE_CHECKING:
    from opentelemetry.trace import Span

LABELS = ("model_name", "engine")

# A request's first token comes after milliseconds when its prefix is cached, after minutes when the queue is long.
TTFT_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
# vLLM begins at 10 ms; an 8B model on an H200 takes 3 to 8 ms a token.
ITL_BUCKETS = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
# vLLM begins at 0.3 s; queue times that matter for an objective are well below.
REQUEST_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0),
    *(50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# From a lone decode to the largest token budget in use.
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# n is small, or a mistake.
N_BUCKETS = (1, 2, 5, 10, 20)
# A step takes from 1 ms (a small model's decode) to seconds (a long prefill on a CPU), its host's part 0.2 ms to 20 ms.
STEP_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# Preempted once is bad luck, twenty times is a pool that is too small.
PREEMPTION_BUCKETS = (1, 2, 3, 4, 5, 10, 20)
# A loop that lags 10 ms delays every stream's token by so much.
LAG_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
# vLLM's, for how long a cached block stays: from the next step to half an hour.
RESIDENCY_BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800),
)
# The instrumentator's own three are too coarse; long streams take minutes.
HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
THROUGHPUT_WINDOW_S = 5.0


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 … up to the limit: token counts spread over decades."""
    bounds: list[int] = []
    decade = 1
    while decade <= limit:
        bounds.extend(step * decade for step in (1, 2, 5) if step * decade <= limit)
        decade *= 10
    return tuple(bounds)


GAUGES = {
    "vllm:num_requests_running": "Requests in the running batch.",
    "vllm:num_requests_waiting": "Requests that wait to be scheduled.",
    "vllm:kv_cache_usage_perc": "Share of the KV blocks that requests hold: 0 to 1.",
    "vllm:num_requests_swapped": "Preempted requests that wait to resume (vLLM has given this one up).",
    "mainsail:kv_waste_perc": "Room in allocated KV blocks that holds nothing, as a share of what is in use.",
    "mainsail:host_cache_usage_perc": "Share of the host memory for KV that holds something: 0 to 1.",
    "mainsail:sessions_active": "Agent sessions with a turn that runs or waits for room.",
    "mainsail:sessions_acting": "Agent sessions between turns, their KV kept on the device.",
    "mainsail:sessions_parked": "Agent sessions between turns that are expected back; their KV may be in host memory.",
    "mainsail:sessions_held": "Agent sessions with a turn that is held, because others are expected back.",
    "mainsail:sessions_kv_wanted_blocks": "KV blocks of all live sessions, wherever they are.",
    "mainsail:sessions_kv_kept_blocks": "KV blocks on the device that are kept for sessions between turns.",
    "vllm:avg_prompt_throughput_toks_per_s": "Prompt tokens per second over the last seconds.",
    "vllm:avg_generation_throughput_toks_per_s": "Generated tokens per second over the last seconds.",
    "mainsail:queued_requests": "Requests let in that have no first token yet.",
    "mainsail:queued_prompt_tokens": "Prompt tokens of requests that have no first token yet.",
    "mainsail:prefill_tokens_per_second": "Rate at which prompt tokens leave the queue: what Retry-After is made from.",
    "mainsail:last_step_timestamp_seconds": "Unix time of the last finished step: the heartbeat.",
}
COUNTERS = {
    "vllm:num_preemptions": "Requests that lost their place to others.",
    "vllm:prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "vllm:prefix_cache_hits": "Prompt tokens found in the prefix cache, on the device or in host memory.",
    "vllm:external_prefix_cache_queries": "Tokens not on the device, looked up in host memory: of prompts and resumes.",
    "vllm:external_prefix_cache_hits": "Tokens found in host memory: of prompts, and of requests that resume.",
    "mainsail:swapped_out_blocks": "KV blocks copied to host memory.",
    "mainsail:swapped_in_blocks": "KV blocks copied back to the device.",
    "mainsail:recomputed_tokens": "Tokens that preempted requests had computed before and had to compute again.",
    "vllm:prompt_tokens": "Prompt tokens of requests that got a first token.",
    "vllm:prompt_tokens_cached": "Prompt tokens whose KV the prefix cache held.",
    "vllm:generation_tokens": "Tokens generated.",
    "vllm:mm_cache_queries": "Images looked up in a cache: this engine's models take none.",
    "vllm:mm_cache_hits": "Images found in a cache: this engine's models take none.",
    "vllm:corrupted_requests": "Requests whose logits were not numbers.",
    "vllm:spec_decode_num_drafts": "Times that a request's guesses were verified (speculative decoding).",
    "vllm:spec_decode_num_draft_tokens": "Guesses verified.",
    "vllm:spec_decode_num_accepted_tokens": "Guesses that were right.",
    "mainsail:steps": "Forward passes.",
    "mainsail:admitted": "Requests let in by admission.",
}
STATS_GAUGES = {
    "vllm:num_requests_running": "num_running",
    "vllm:num_requests_waiting": "num_waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:num_requests_swapped": "num_swapped",
    "mainsail:kv_waste_perc": "kv_waste",
    "mainsail:host_cache_usage_perc": "host_usage",
    "mainsail:sessions_active": "sessions_active",
    "mainsail:sessions_acting": "sessions_acting",
    "mainsail:sessions_parked": "sessions_parked",
    "mainsail:sessions_held": "sessions_held",
    "mainsail:sessions_kv_wanted_blocks": "sessions_kv_wanted",
    "mainsail:sessions_kv_kept_blocks": "sessions_kv_kept",
}
"""Gauges that every step's stats bring, and the fields they come in."""
LABELLED_GAUGES = {
    "vllm:num_requests_waiting_by_reason": (
        "Requests that wait: for room (capacity), or for another reason (deferred).",
        "reason",
        ("capacity", "deferred"),
    ),
    "mainsail:start_time_seconds": ("Seconds of the start, by phase.", "phase", tuple(PHASES)),
}
LABELLED_COUNTERS = {
    "vllm:prompt_tokens_by_source": (
        "Prompt tokens by where their KV came from.",
        "source",
        ("local_compute", "local_cache_hit", "external_kv_transfer"),
    ),  # external: from host memory
    "vllm:prompt_tokens_cached_by_source": ("Cached prompt tokens by tier.", "source", ("device", "host")),
    "vllm:spec_decode_num_accepted_tokens_per_pos": (
        "Guesses that were right, by their place among those of a request.",
        "position",
        tuple(map(str, range(MAX_SPECULATIVE_TOKENS))),
    ),
    "vllm:request_success": (
        "Finished requests.",
        "finished_reason",
        ("stop", "length", "abort", "error"),
    ),
}
OLDER_NAMES = {
    "vllm:gpu_cache_usage_perc": "vllm:kv_cache_usage_perc",
    "vllm:cpu_cache_usage_perc": "mainsail:host_cache_usage_perc",
    "vllm:gpu_prefix_cache_queries": "vllm:prefix_cache_queries",
    "vllm:gpu_prefix_cache_hits": "vllm:prefix_cache_hits",
    "vllm:time_per_output_token_seconds": "vllm:inter_token_latency_seconds",
}
"""Names that vLLM had, and what they are called now."""
OLDER_RATES = {
    "vllm:gpu_prefix_cache_hit_rate": ("vllm:prefix_cache_hits", "vllm:prefix_cache_queries"),
    "vllm:cpu_prefix_cache_hit_rate": ("vllm:external_prefix_cache_hits", "vllm:external_prefix_cache_queries"),
}
"""Gauges that vLLM had, and the counters that they are the ratio of, since the start."""
HANDLERS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/models"),
    *("/tokenize", "/detokenize", "other"),
)
"""What http_* metrics tell apart. Probes and scrapes do not count."""
METHODS = ("GET", "POST", "other")
PARSED_MODES = ("streaming", "non_streaming")
PARSED_OUTCOMES = ("tool_call", "no_tool_call")
PARSED_FOR = ("chat_completions", "responses")
REJECTIONS = ("max_num_queued_reqs", "max_num_queued_tokens", "max_queue_wait")
STATUSES = ("2xx", "3xx", "4xx", "5xx")
STATS_COUNTERS = {
    "vllm:num_preemptions": "num_preemptions",
    "vllm:prefix_cache_queries": "prefix_cache_queries",
    "vllm:prefix_cache_hits": "prefix_cache_hits",
    "vllm:external_prefix_cache_queries": "host_cache_queries",
    "vllm:external_prefix_cache_hits": "host_cache_hits",
    "mainsail:swapped_out_blocks": "num_swapped_out",
    "mainsail:swapped_in_blocks": "num_swapped_in",
    "mainsail:recomputed_tokens": "num_recomputed_tokens",
    "vllm:spec_decode_num_drafts": "num_drafts",
    "vllm:spec_decode_num_draft_tokens": "num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "num_accepted_tokens",
}
"""Counters of which every step's stats bring the sum since the start, and the fields they come in."""
TIME_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("From arrival to the first token.", TTFT_BUCKETS),
    "vllm:inter_token_latency_seconds": ("Between the steps that brought a request tokens.", ITL_BUCKETS),
    "vllm:request_time_per_output_token_seconds": ("A finished request's mean time per token.", ITL_BUCKETS),
    "vllm:e2e_request_latency_seconds": ("From arrival to the last token.", REQUEST_BUCKETS),
    "vllm:request_queue_time_seconds": ("From the core's receipt to the first scheduled token.", REQUEST_BUCKETS),
    "vllm:request_inference_time_seconds": ("From the first scheduled to the last token.", REQUEST_BUCKETS),
    "vllm:request_prefill_time_seconds": ("From the first scheduled to the first token.", REQUEST_BUCKETS),
    "vllm:request_decode_time_seconds": ("From the first to the last token.", REQUEST_BUCKETS),
    "vllm:iteration_tokens_total": ("Tokens computed in a step.", ITERATION_BUCKETS),
    "vllm:request_params_n": ("The parameter n.", N_BUCKETS),
    "vllm:request_num_preemptions": ("How often a finished request was preempted.", PREEMPTION_BUCKETS),
    "vllm:kv_block_lifetime_seconds": ("Of sampled KV blocks: in the prefix cache, until evicted.", RESIDENCY_BUCKETS),
    "vllm:kv_block_idle_before_evict_seconds": ("Of sampled KV blocks: last use to eviction.", RESIDENCY_BUCKETS),
    "vllm:kv_block_reuse_gap_seconds": ("Of sampled, evicted KV blocks: between two uses.", RESIDENCY_BUCKETS),
    "mainsail:event_loop_lag_seconds": ("How much later than asked for an API process's loop woke.", LAG_BUCKETS),
    "mainsail:step_time_seconds": ("Duration of a step.", STEP_BUCKETS),
    "mainsail:step_host_time_seconds": ("A step without its wait for the device.", STEP_BUCKETS),
}
TOKEN_HISTOGRAMS = {
    "vllm:request_prompt_tokens": "Prompt tokens of a finished request.",
    "vllm:request_generation_tokens": "Generated tokens of a finished request.",
    "vllm:request_max_num_generation_tokens": "The longest answer of a request (of its n).",
    "vllm:request_params_max_tokens": "The parameter max_tokens.",
    "vllm:request_prefill_kv_computed_tokens": "Prompt tokens of a finished request that no cache held.",
}


@dataclass(slots=True)
class RequestTimes:
    """One request's course, on the API process's monotonic clock."""

    arrival_s: float
    num_prompt_tokens: int
    max_tokens: int
    queue_time_s: float | None = None
    num_cached_tokens: int = 0
    first_token_s: float | None = None
    """When it was there for the client; last_token_s likewise."""
    last_token_s: float | None = None
    num_tokens: int = 0
    """Generated so far."""
    num_preemptions: int = 0
    span: Span | None = None
    """Of its trace, where it is traced (server/tracing.py)."""

    def in_words(self, reason: str) -> str:
        """For the log: counts and times, nothing of what was said."""
        times = (("queued", self.queue_time_s), ("first token after", self.since_arrival(self.first_token_s)),
                 ("last after", self.since_arrival(self.last_token_s)))  # fmt: skip
        spans = ", ".join(f"{name} {span:.3f} s" for name, span in times if span is not None)
        prompt = f"{self.num_prompt_tokens} prompt tokens ({self.num_cached_tokens} cached)"
        return f"{reason}; {prompt}, {self.num_tokens} generated; {spans or 'no token'}"

    def since_arrival(self, moment_s: float | None) -> float | None:
        """Seconds from the request's arrival to that moment."""
        return None if moment_s is None else moment_s - self.arrival_s


class _Value:
    """A counter or a gauge: this process's share of it."""

    __slots__ = ("_at", "_own")

    def __init__(self, cells: Cells) -> None:
        self._own, self._at = cells.own, cells.allocate()

    def inc(self, by: float = 1.0) -> None:
        self._own[self._at] += by

    def set(self, value: float) -> None:
        self._own[self._at] = value

    def total(self, cells: Cells) -> float:
        return cells.total(self._at)


class _Histogram:
    """Cells: one for each bucket, one for what is above the last, and the sum."""

    __slots__ = ("_at", "_own", "_sum", "bounds")

    def __init__(self, cells: Cells, bounds: Sequence[float]) -> None:
        self._own, self.bounds = cells.own, tuple(bounds)
        self._at = cells.allocate(len(bounds) + 2)
        self._sum = self._at + len(bounds) + 1

    def observe(self, value: float) -> None:
        self._own[self._at + bisect_left(self.bounds, value)] += 1
        self._own[self._sum] += value

    def totals(self, cells: Cells) -> tuple[list[tuple[str, float]], float]:
        """(cumulative counts by upper bound, sum), over all processes."""
        count, buckets = 0.0, list[tuple[str, float]]()
        for index, bound in enumerate((*self.bounds, float("inf"))):
            count += cells.total(self._at + index)
            buckets.append((floatToGoString(bound), count))
        return buckets, cells.total(self._sum)


class Metrics(Collector):
    """Every series is there at once, so that a scrape before the first request shows zeros and not gaps.

    Processes that share cells must be made with the same max_model_len (it decides how many buckets there are).
    """

    def __init__(self, model_name: str, max_model_len: int, cells: Cells | None = None) -> None:
        self.model_name = model_name
        self._cells = cells = cells or Cells()
        self._gauges = {name: _Value(cells) for name in GAUGES}
        self._counters = {name: _Value(cells) for name in COUNTERS}
        labelled = LABELLED_GAUGES | LABELLED_COUNTERS
        self._labelled = {name: {v: _Value(cells) for v in values} for name, (_, _, values) in labelled.items()}
        tokens = one_two_five(max_model_len)
        self._tables = TIME_HISTOGRAMS | {name: (doc, tokens) for name, doc in TOKEN_HISTOGRAMS.items()}
        self._histograms = {name: _Histogram(cells, bounds) for name, (_, bounds) in self._tables.items()}
        self._rejections = {r: _Value(cells) for r in REJECTIONS}
        self._http_requests = {(h, m, s): _Value(cells) for h in HANDLERS for m in METHODS for s in STATUSES}
        self._http_durations = {
            (handler, method): _Histogram(cells, HTTP_BUCKETS) for handler, method in product(HANDLERS, METHODS)
        }
        self._tool_parser: dict[tuple[str, str, str], _Value] = {
            labels: _Value(cells) for labels in product(PARSED_MODES, PARSED_OUTCOMES, PARSED_FOR)
        }
        self._cache_info: dict[str, str] = {}
        self.max_num_seqs = 0
        """Requests that run at once; 0: not said. Gateways let in as many without asking what the latency is."""
        self.is_asleep: Callable[[], bool] = lambda: False
        self._adapters: tuple[str, Callable[[], AdapterUse]] | None = None
        self._last_stats, self._num_wakes = SchedulerStats(), 0
        self._throughput = {
            "vllm:avg_prompt_throughput_toks_per_s": _Rate(self._counters["vllm:prompt_tokens"]),
            "vllm:avg_generation_throughput_toks_per_s": _Rate(self._counters["vllm:generation_tokens"]),
        }
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def set_cache_info(self, ready: Ready, cache: CacheConfig) -> None:
        """What endpoint pickers read the pool's size from: vLLM's names for what this engine has of its settings."""
        self._cache_info = {
            "block_size": str(ready.block_size),
            "num_gpu_blocks": str(ready.num_blocks),
            "num_gpu_blocks_override": str(cache.num_blocks),
            "kv_cache_size_tokens": str(ready.num_blocks * ready.block_size),
            "gpu_memory_utilization": str(cache.memory_utilization),
            "enable_prefix_caching": str(cache.enable_prefix_caching),
            "kv_offloading_size": str(cache.offloading_size_gib),
            "cache_dtype": ready.dtype,
            "engine": "0",
        }

    def started(self, phases: Mapping[str, float]) -> None:
        """Seconds of each phase of the start (timeline.py). Only one process, the leader, says so."""
        for phase, seconds in phases.items():
            self._labelled["mainsail:start_time_seconds"][phase].set(seconds)

    def set_adapters(self, max_loras: int, use: Callable[[], AdapterUse]) -> None:
        """This engine takes LoRA adapters, so many at once; use says which of them are in use."""
        self._adapters = str(max_loras), use

    # -- what happens ----------------------------------------------------------------------------------------------

    def step(self, step: StepOutputs) -> None:
        """A step's stats. Only one process, the leader, counts these."""
        stats, last = step.stats, self._last_stats
        for name, field_name in STATS_GAUGES.items():
            self._gauges[name].set(getattr(stats, field_name))
        self._labelled["vllm:num_requests_waiting_by_reason"]["capacity"].set(stats.num_waiting - stats.sessions_held)
        self._labelled["vllm:num_requests_waiting_by_reason"]["deferred"].set(stats.sessions_held)
        self._gauges["mainsail:last_step_timestamp_seconds"].set(time.time())
        if step.num_wakes != self._num_wakes:
            self._num_wakes, last = step.num_wakes, SchedulerStats()
        for name, field_name in STATS_COUNTERS.items():
            self._counters[name].inc(getattr(stats, field_name) - getattr(last, field_name))
        by_position = self._labelled["vllm:spec_decode_num_accepted_tokens_per_pos"]
        before = last.accepted_per_position or [0] * len(stats.accepted_per_position)
        for position, (count, earlier) in enumerate(zip(stats.accepted_per_position, before, strict=True)):
            by_position[str(position)].inc(count - earlier)
        self._last_stats = stats
        for life in step.block_lives:
            self._histograms["vllm:kv_block_lifetime_seconds"].observe(life.lifetime_s)
            self._histograms["vllm:kv_block_idle_before_evict_seconds"].observe(life.idle_s)
            for gap_s in life.reuse_gaps_s:
                self._histograms["vllm:kv_block_reuse_gap_seconds"].observe(gap_s)
        if step.num_step_tokens == 0:
            return
        self._counters["mainsail:steps"].inc()
        self._histograms["vllm:iteration_tokens_total"].observe(step.num_step_tokens)
        self._histograms["mainsail:step_time_seconds"].observe(step.step_time_s)
        self._histograms["mainsail:step_host_time_seconds"].observe(step.host_time_s)

    def admitted(self, count: int, n: int) -> None:
        self._counters["mainsail:admitted"].inc(count)
        self._histograms["vllm:request_params_n"].observe(n)

    def rejected(self, reason: str) -> None:
        self._rejections[reason].inc()

    def queued(self, requests: float, tokens: float, tokens_per_s: float) -> None:
        """This process's part of the queue."""
        self._gauges["mainsail:queued_requests"].set(requests)
        self._gauges["mainsail:queued_prompt_tokens"].set(tokens)
        self._gauges["mainsail:prefill_tokens_per_second"].set(tokens_per_s)

    def corrupted(self) -> None:
        self._counters["vllm:corrupted_requests"].inc()

    def lagged(self, seconds: float) -> None:
        self._histograms["mainsail:event_loop_lag_seconds"].observe(seconds)

    def http(self, path: str, method: str, status: int, seconds: float) -> None:
        handler = path if path in HANDLERS else "other"
        verb = method if method in METHODS else "other"
        self._http_requests[handler, verb, f"{min(max(status // 100, 2), 5)}xx"].inc()
        self._http_durations[handler, verb].observe(seconds)

    def tools_parsed(self, *, mode: str, called: bool, request_type: str) -> None:
        """A tool parser was fed: once for each whole answer, or each delta of a stream."""
        self._tool_parser[mode, "tool_call" if called else "no_tool_call", request_type].inc()

    def generated(self, times: RequestTimes, count: int, num_cached_tokens: int, num_host_tokens: int) -> None:
        """A step brought a request `count` tokens. Of its prompt, so many were cached, so many of these on the host."""
        if times.num_tokens == 0:
            times.num_cached_tokens = num_cached_tokens
            self._prompt(times.num_prompt_tokens, num_cached_tokens, num_host_tokens)
        times.num_tokens += count
        self._counters["vllm:generation_tokens"].inc(count)

    def _prompt(self, num_tokens: int, num_cached: int, num_on_host: int) -> None:
        self._counters["vllm:prompt_tokens"].inc(num_tokens)
        self._counters["vllm:prompt_tokens_cached"].inc(num_cached)
        by_source = self._labelled["vllm:prompt_tokens_by_source"]
        by_source["local_compute"].inc(num_tokens - num_cached)
        by_source["local_cache_hit"].inc(num_cached - num_on_host)
        by_source["external_kv_transfer"].inc(num_on_host)
        cached = self._labelled["vllm:prompt_tokens_cached_by_source"]
        cached["device"].inc(num_cached - num_on_host)
        cached["host"].inc(num_on_host)

    def delivered(self, times: RequestTimes, now: float) -> None:
        """What a step brought a request is there for its client."""
        if times.first_token_s is None:
            times.first_token_s = now
            self._histograms["vllm:time_to_first_token_seconds"].observe(now - times.arrival_s)
        elif times.last_token_s is not None:
            self._histograms["vllm:inter_token_latency_seconds"].observe(now - times.last_token_s)
        times.last_token_s = now

    def finished(self, times: RequestTimes, reason: str) -> None:
        self._labelled["vllm:request_success"][reason].inc()
        if times.first_token_s is None or times.last_token_s is None:
            return
        observe = {
            "vllm:request_prompt_tokens": times.num_prompt_tokens,
            "vllm:request_generation_tokens": times.num_tokens,
            "vllm:request_params_max_tokens": times.max_tokens,
            "vllm:request_prefill_kv_computed_tokens": times.num_prompt_tokens - times.num_cached_tokens,
            "vllm:request_num_preemptions": times.num_preemptions,
            "vllm:e2e_request_latency_seconds": times.last_token_s - times.arrival_s,
            "vllm:request_decode_time_seconds": times.last_token_s - times.first_token_s,
        }
        if times.num_tokens > 1:
            mean_s = (times.last_token_s - times.first_token_s) / (times.num_tokens - 1)
            observe["vllm:request_time_per_output_token_seconds"] = mean_s
        if times.queue_time_s is not None:
            scheduled_s = times.arrival_s + times.queue_time_s
            observe["vllm:request_queue_time_seconds"] = times.queue_time_s
            observe["vllm:request_prefill_time_seconds"] = max(0.0, times.first_token_s - scheduled_s)
            observe["vllm:request_inference_time_seconds"] = max(0.0, times.last_token_s - scheduled_s)
        for name, value in observe.items():
            self._histograms[name].observe(value)

    def answered(self, longest: int) -> None:
        """All n answers of one prompt are finished; the longest has so many tokens."""
        self._histograms["vllm:request_max_num_generation_tokens"].observe(longest)

    # -- what a scrape sees ----------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        own = (self.model_name, "0")
        yield from self._collect_values(own)
        yield from self._collect_labelled(own)
        for name, histogram in self._histograms.items():
            family = HistogramMetricFamily(name, self._tables[name][0], labels=LABELS)
            family.add_metric(own, *histogram.totals(self._cells))
            yield family
        yield from self._collect_older(own)
        yield from self._collect_http()

    def _collect_values(self, own: tuple[str, str]) -> Iterator[Metric]:
        for name, doc in GAUGES.items():
            gauge = GaugeMetricFamily(name, doc, labels=LABELS)
            rate = self._throughput.get(name)
            value = rate.per_second(self._cells, time.monotonic()) if rate else self._gauges[name].total(self._cells)
            gauge.add_metric(own, value)
            yield gauge
        for name, doc in COUNTERS.items():
            counter = CounterMetricFamily(name, doc, labels=LABELS)
            counter.add_metric(own, self._counters[name].total(self._cells))
            yield counter
        if self.max_num_seqs:
            most = GaugeMetricFamily("mainsail:max_num_seqs", "Requests that run at once, at most.", labels=LABELS)
            most.add_metric(own, self.max_num_seqs)
            yield most
        if self._cache_info:
            info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache's settings.", labels=[*self._cache_info])
            info.add_metric([*self._cache_info.values()], 1.0)
            yield info
        if self._adapters is not None:
            max_loras, use = self._adapters
            yield self._collect_adapters(max_loras, use())

    def _collect_labelled(self, own: tuple[str, str]) -> Iterator[Metric]:
        for kind, table in ((GaugeMetricFamily, LABELLED_GAUGES), (CounterMetricFamily, LABELLED_COUNTERS)):
            for name, (doc, label, values) in table.items():
                family = kind(name, doc, labels=(*LABELS, label))
                for value in values:
                    family.add_metric((*own, value), self._labelled[name][value].total(self._cells))
                yield family
        sleep_state = GaugeMetricFamily(
            "vllm:engine_sleep_state", "1 for the state that the engine is in.", labels=(*LABELS, "sleep_state")
        )
        state = "weights_offloaded" if self.is_asleep() else "awake"
        for name in ("awake", "weights_offloaded", "discard_all"):
            sleep_state.add_metric((*own, name), float(name == state))
        yield sleep_state
        rejections = CounterMetricFamily(
            "vllm:admission_rejections", "Refused with 429.", labels=("model_name", "reason")
        )
        for reason, value in self._rejections.items():
            rejections.add_metric((self.model_name, reason), value.total(self._cells))
        yield rejections
        parsed = CounterMetricFamily(
            "vllm:tool_call_parser_invocations", "How often a tool parser was fed: whole answers, and deltas.",
            labels=("model_name", "mode", "outcome", "request_type"),
        )  # fmt: skip
        for labels, value in self._tool_parser.items():
            parsed.add_metric((self.model_name, *labels), value.total(self._cells))
        yield parsed

    def _collect_adapters(self, max_loras: str, use: AdapterUse) -> Metric:
        """One series, whose value says when it was so: endpoint pickers take the newest."""
        labels = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
        info = GaugeMetricFamily("vllm:lora_requests_info", "LoRA adapters that requests go through.", labels=labels)
        info.add_metric((max_loras, ",".join(use.waiting), ",".join(use.running)), time.time())
        return info

    def _collect_older(self, own: tuple[str, str]) -> Iterator[Metric]:
        for older, name in OLDER_NAMES.items():
            doc = f"The older name of {name}."
            if name in self._histograms:
                histogram = HistogramMetricFamily(older, doc, labels=LABELS)
                histogram.add_metric(own, *self._histograms[name].totals(self._cells))
                yield histogram
            else:
                kind = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
                family = kind(older, doc, labels=LABELS)
                family.add_metric(own, (self._gauges | self._counters)[name].total(self._cells))
                yield family
        for older, (part, whole) in OLDER_RATES.items():
            rate = GaugeMetricFamily(older, f"An older gauge: {part} over {whole} since the start.", labels=LABELS)
            total = self._counters[whole].total(self._cells)
            rate.add_metric(own, self._counters[part].total(self._cells) / total if total else 0.0)
            yield rate

    def _collect_http(self) -> Iterator[Metric]:
        labels = ("handler", "method", "status")
        requests = CounterMetricFamily("http_requests", "HTTP requests answered.", labels=labels)
        for key, value in self._http_requests.items():
            requests.add_metric(key, value.total(self._cells))
        yield requests
        durations = HistogramMetricFamily(
            "http_request_duration_seconds", "Until the last byte of the answer.", labels=("handler", "method")
        )
        for key, histogram in self._http_durations.items():
            durations.add_metric(key, *histogram.totals(self._cells))
        yield durations

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class _Rate:
    """A counter's growth per second over the last window, for dashboards that do not take rates themselves."""

    def __init__(self, counter: _Value) -> None:
        self._counter = counter
        self._from = (0.0, 0.0)
        self._rate = 0.0

    def per_second(self, cells: Cells, now: float) -> float:
        since, before = self._from
        elapsed = now - since
        if elapsed >= THROUGHPUT_WINDOW_S:
            total = self._counter.total(cells)
            self._rate = (total - before) / elapsed if since else 0.0
            self._from = (now, total)
        return self._rate
