"""Every metric of the engine, in one table and one registry (that of the API process).

Names, labels and bucket bounds are vLLM's, so that dashboards, KEDA scalers and endpoint pickers made for it work
unchanged; low bounds are added where its own are too coarse to see a fast model. Our own go under `mainsail:`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from mainsail_engine.protocol import Ready, SchedulerStats, StepOutputs

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
    "vllm:gpu_cache_usage_perc": "The older name of vllm:kv_cache_usage_perc.",
    "mainsail:kv_waste_perc": "Room in allocated KV blocks that holds nothing, as a share of what is in use.",
    "mainsail:host_cache_usage_perc": "Share of the host memory for KV that holds something: 0 to 1.",
    "mainsail:sessions_active": "Agent sessions with a turn that runs or waits for room.",
    "mainsail:sessions_acting": "Agent sessions between turns, their KV kept on the device.",
    "mainsail:sessions_parked": "Agent sessions between turns that are expected back; their KV may be in host memory.",
    "mainsail:sessions_held": "Agent sessions with a turn that is held, because others are expected back.",
    "mainsail:sessions_kv_wanted_blocks": "KV blocks of all live sessions, wherever they are.",
    "mainsail:last_step_timestamp_seconds": "Unix time of the last finished step: the heartbeat.",
}
COUNTERS = {
    "vllm:num_preemptions": "Requests that lost their place to others.",
    "vllm:prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "vllm:prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "vllm:external_prefix_cache_hits": "Tokens found in host memory: of prompts, and of requests that resume.",
    "mainsail:swapped_out_blocks": "KV blocks copied to host memory.",
    "mainsail:swapped_in_blocks": "KV blocks copied back to the device.",
    "mainsail:recomputed_tokens": "Tokens that preempted requests had computed before and had to compute again.",
    "vllm:prompt_tokens": "Prompt tokens of requests that got a first token.",
    "vllm:prompt_tokens_cached": "… of which the prefix cache held the KV.",
    "vllm:generation_tokens": "Tokens generated.",
    "mainsail:steps": "Forward passes.",
    "mainsail:admitted": "Requests let in by admission.",
}
STATS_GAUGES = {
    "vllm:num_requests_running": "num_running",
    "vllm:num_requests_waiting": "num_waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:gpu_cache_usage_perc": "kv_usage",
    "mainsail:kv_waste_perc": "kv_waste",
    "mainsail:host_cache_usage_perc": "host_usage",
    "mainsail:sessions_active": "sessions_active",
    "mainsail:sessions_acting": "sessions_acting",
    "mainsail:sessions_parked": "sessions_parked",
    "mainsail:sessions_held": "sessions_held",
    "mainsail:sessions_kv_wanted_blocks": "sessions_kv_wanted",
}
"""Gauges that every step's stats bring, and the fields they come in."""
STATS_COUNTERS = {
    "vllm:num_preemptions": "num_preemptions",
    "vllm:prefix_cache_queries": "prefix_cache_queries",
    "vllm:prefix_cache_hits": "prefix_cache_hits",
    "vllm:external_prefix_cache_hits": "host_cache_hits",
    "mainsail:swapped_out_blocks": "num_swapped_out",
    "mainsail:swapped_in_blocks": "num_swapped_in",
    "mainsail:recomputed_tokens": "num_recomputed_tokens",
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
    "mainsail:step_time_seconds": ("Duration of a step.", STEP_BUCKETS),
    "mainsail:step_host_time_seconds": ("A step without its wait for the device.", STEP_BUCKETS),
}
TOKEN_HISTOGRAMS = {
    "vllm:request_prompt_tokens": "Prompt tokens of a finished request.",
    "vllm:request_generation_tokens": "Generated tokens of a finished request.",
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
    last_token_s: float | None = None
    num_tokens: int = 0


@dataclass
class Metrics:
    """Builds every series at once, so that a scrape before the first request shows zeros and not gaps."""

    model_name: str
    max_model_len: int
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        disable_created_metrics()
        labels = {"model_name": self.model_name, "engine": "0"}
        self._gauges = {n: Gauge(n, doc, LABELS, registry=self.registry).labels(**labels) for n, doc in GAUGES.items()}
        self._counters = {
            n: Counter(n, doc, LABELS, registry=self.registry).labels(**labels) for n, doc in COUNTERS.items()
        }
        tokens = one_two_five(self.max_model_len)
        tables = TIME_HISTOGRAMS | {name: (doc, tokens) for name, doc in TOKEN_HISTOGRAMS.items()}
        self._histograms = {
            n: Histogram(n, doc, LABELS, registry=self.registry, buckets=bounds).labels(**labels)
            for n, (doc, bounds) in tables.items()
        }
        success = Counter(
            "vllm:request_success", "Finished requests.", (*LABELS, "finished_reason"), registry=self.registry
        )
        self._finished = {
            reason: success.labels(**labels, finished_reason=reason) for reason in ("stop", "length", "abort", "error")
        }
        rejections = Counter(
            "vllm:admission_rejections", "Refused with 429.", ("model_name", "reason"), registry=self.registry
        )
        self._rejections = {
            reason: rejections.labels(model_name=self.model_name, reason=reason)
            for reason in ("max_num_queued_reqs", "max_num_queued_tokens", "max_queue_wait")
        }
        self._last_stats = SchedulerStats()

    def set_cache_info(self, ready: Ready, *, enable_prefix_caching: bool) -> None:
        """What endpoint pickers read the pool's size from."""
        values = {
            "block_size": str(ready.block_size),
            "num_gpu_blocks": str(ready.num_blocks),
            "enable_prefix_caching": str(enable_prefix_caching),
            "cache_dtype": ready.dtype,
            "engine": "0",
        }
        Gauge("vllm:cache_config_info", "The KV cache's settings.", tuple(values), registry=self.registry).labels(
            **values
        ).set(1)

    def step(self, step: StepOutputs) -> None:
        stats, last = step.stats, self._last_stats
        for name, field_name in STATS_GAUGES.items():
            self._gauges[name].set(getattr(stats, field_name))
        self._gauges["mainsail:last_step_timestamp_seconds"].set(time.time())
        for name, field_name in STATS_COUNTERS.items():
            self._counters[name].inc(getattr(stats, field_name) - getattr(last, field_name))
        self._last_stats = stats
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

    def tokens(self, times: RequestTimes, count: int, num_cached_tokens: int, now: float) -> None:
        """A step brought a request `count` tokens."""
        if times.first_token_s is None:
            times.first_token_s = now
            times.num_cached_tokens = num_cached_tokens
            self._histograms["vllm:time_to_first_token_seconds"].observe(now - times.arrival_s)
            self._counters["vllm:prompt_tokens"].inc(times.num_prompt_tokens)
            self._counters["vllm:prompt_tokens_cached"].inc(num_cached_tokens)
        elif times.last_token_s is not None:
            self._histograms["vllm:inter_token_latency_seconds"].observe(now - times.last_token_s)
        times.last_token_s = now
        times.num_tokens += count
        self._counters["vllm:generation_tokens"].inc(count)

    def finished(self, times: RequestTimes, reason: str) -> None:
        self._finished[reason].inc()
        if times.first_token_s is None or times.last_token_s is None:
            return
        observe = {
            "vllm:request_prompt_tokens": times.num_prompt_tokens,
            "vllm:request_generation_tokens": times.num_tokens,
            "vllm:request_params_max_tokens": times.max_tokens,
            "vllm:request_prefill_kv_computed_tokens": times.num_prompt_tokens - times.num_cached_tokens,
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

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
