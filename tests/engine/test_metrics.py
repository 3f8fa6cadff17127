from __future__ import annotations

import pytest

from mainsail_engine.metrics import Metrics, RequestTimes, one_two_five
from mainsail_engine.protocol import BlockLife, Ready, RequestOutput, SchedulerStats, StepOutputs

LABELS = {"model_name": "m", "engine": "0"}
ENGINE = {"engine"}
FIELD: dict[str, set[str]] = {
    **{
        f"vllm:{name}": ENGINE
        for name in (
            "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
            "prefix_cache_hits_total", "external_prefix_cache_queries_total", "external_prefix_cache_hits_total",
            "num_preemptions_total", "prompt_tokens_total", "prompt_tokens_cached_total", "generation_tokens_total",
            "corrupted_requests_total",
        )
    },
    **{
        f"vllm:{name}_{kind}": ENGINE
        for kind in ("bucket", "sum", "count")
        for name in (
            "iteration_tokens_total", "request_prompt_tokens", "request_generation_tokens",
            "request_max_num_generation_tokens", "request_params_n", "request_params_max_tokens",
            "request_prefill_kv_computed_tokens", "request_num_preemptions", "time_to_first_token_seconds",
            "inter_token_latency_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
            "request_queue_time_seconds", "request_inference_time_seconds", "request_prefill_time_seconds",
            "request_decode_time_seconds", "kv_block_lifetime_seconds", "kv_block_idle_before_evict_seconds",
            "kv_block_reuse_gap_seconds",
        )
    },
    "vllm:num_requests_waiting_by_reason": ENGINE | {"reason"},
    "vllm:engine_sleep_state": ENGINE | {"sleep_state"},
    "vllm:cache_config_info": {"block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype", "engine"},
    "vllm:prompt_tokens_by_source_total": ENGINE | {"source"},
    "vllm:prompt_tokens_cached_by_source_total": ENGINE | {"source"},
    "vllm:request_success_total": ENGINE | {"finished_reason"},
    "vllm:admission_rejections_total": {"reason"},
    "vllm:tool_call_parser_invocations_total": {"mode", "outcome", "request_type"},
}  # fmt: skip
"""Not here: vllm:mm_cache_* (images), lora_requests_info, num_requests_kv_fetch_by_stage, estimated_*_per_gpu."""
LATENCY = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FIELD_BUCKETS: dict[str, tuple[float, ...]] = {
    "vllm:time_to_first_token_seconds": (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640),
        2560,
    ),
    "vllm:inter_token_latency_seconds": LATENCY,
    "vllm:request_time_per_output_token_seconds": LATENCY,
    "vllm:e2e_request_latency_seconds": WHOLE,
    "vllm:request_queue_time_seconds": WHOLE,
    "vllm:iteration_tokens_total": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "vllm:kv_block_lifetime_seconds": (
        *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800),
    ),
    "vllm:request_prompt_tokens": (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("m", 8192)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {**LABELS, **labels})


def step(number: int, stats: SchedulerStats, tokens: int = 4) -> StepOutputs:
    return StepOutputs(number, [RequestOutput("a", [1])], stats, tokens, 0.01)


def test_everything_is_there_from_the_start(metrics: Metrics) -> None:
    text = metrics.exposition().decode()
    for name in ("vllm:num_requests_running", "vllm:num_preemptions_total", "vllm:inter_token_latency_seconds_bucket"):
        assert f"{name}{{" in text
    assert "_created" not in text


def test_counters_grow_by_the_difference(metrics: Metrics) -> None:
    metrics.step(step(1, SchedulerStats(2, 1, 0.5, 3, 100, 40)))
    metrics.step(step(2, SchedulerStats(1, 0, 0.25, 5, 150, 40)))
    assert value(metrics, "vllm:num_requests_running") == 1
    assert value(metrics, "vllm:kv_cache_usage_perc") == value(metrics, "vllm:gpu_cache_usage_perc") == 0.25
    assert value(metrics, "vllm:num_preemptions_total") == 5
    assert value(metrics, "vllm:prefix_cache_queries_total") == 150
    assert value(metrics, "vllm:prefix_cache_hits_total") == 40
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 8


def test_news_without_a_forward_pass_is_no_step(metrics: Metrics) -> None:
    metrics.step(step(0, SchedulerStats(), tokens=0))
    assert value(metrics, "mainsail:steps_total") == 0
    assert value(metrics, "vllm:iteration_tokens_total_count") == 0


def test_a_requests_course(metrics: Metrics) -> None:
    times = RequestTimes(arrival_s=10.0, num_prompt_tokens=100, max_tokens=3, queue_time_s=0.5)
    for now in (11.0, 11.25, 11.75):
        metrics.generated(times, 1, 60, 20)
        metrics.delivered(times, now)
    metrics.finished(times, "length")
    assert value(metrics, "vllm:time_to_first_token_seconds_sum") == 1.0
    assert value(metrics, "vllm:inter_token_latency_seconds_sum") == 0.75
    assert value(metrics, "vllm:request_time_per_output_token_seconds_sum") == 0.375
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum") == 1.75
    assert value(metrics, "vllm:request_queue_time_seconds_sum") == 0.5
    assert value(metrics, "vllm:request_prefill_time_seconds_sum") == 0.5
    assert value(metrics, "vllm:request_inference_time_seconds_sum") == 1.25
    assert value(metrics, "vllm:request_prefill_kv_computed_tokens_sum") == 40
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1
    assert value(metrics, "vllm:prompt_tokens_cached_total") == 60
    sources = {"local_compute": 40, "local_cache_hit": 40, "external_kv_transfer": 20}
    assert {s: value(metrics, "vllm:prompt_tokens_by_source_total", source=s) for s in sources} == sources
    tiers = {"device": 40, "host": 20}
    assert {t: value(metrics, "vllm:prompt_tokens_cached_by_source_total", source=t) for t in tiers} == tiers


def test_a_request_without_a_token_counts_as_an_abort_only(metrics: Metrics) -> None:
    metrics.finished(RequestTimes(0.0, 5, 5), "abort")
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(metrics, "vllm:request_prompt_tokens_count") == 0


def test_lives_of_blocks(metrics: Metrics) -> None:
    lives = [BlockLife(60.0, 10.0, [20.0, 30.0]), BlockLife(5.0, 5.0, [])]
    metrics.step(StepOutputs(1, [], SchedulerStats(), 0, 0.0, block_lives=lives))
    assert value(metrics, "vllm:kv_block_lifetime_seconds_sum") == 65.0
    assert value(metrics, "vllm:kv_block_idle_before_evict_seconds_sum") == 15.0
    assert value(metrics, "vllm:kv_block_reuse_gap_seconds_count") == 2


def test_the_fields_names_labels_and_buckets(metrics: Metrics) -> None:
    """vLLM's current set, but for what this engine has no such thing as: dashboards made for it find theirs."""
    metrics.set_cache_info(Ready(8192, 100, 16, 256, [2], "cpu", "float32"), enable_prefix_caching=True)
    seen = {s.name: set(s.labels) for family in metrics.registry.collect() for s in family.samples}
    for name, labels in FIELD.items():
        assert name in seen, name
        own = set() if name in ("vllm:cache_config_info",) else {"model_name"}
        assert seen[name] >= labels | own, name
    for name, bounds in FIELD_BUCKETS.items():
        text = metrics.exposition().decode()
        for bound in bounds:
            assert f'{name}_bucket{{engine="0",le="{float(bound)}",model_name="m"}}' in text, (name, bound)


def test_token_buckets() -> None:
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100)
