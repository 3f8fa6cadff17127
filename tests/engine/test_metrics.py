from __future__ import annotations

import pytest

from mainsail_engine.metrics import Metrics, RequestTimes, one_two_five
from mainsail_engine.protocol import RequestOutput, SchedulerStats, StepOutputs

LABELS = {"model_name": "m", "engine": "0"}


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
        metrics.tokens(times, 1, 60, now)
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


def test_a_request_without_a_token_counts_as_an_abort_only(metrics: Metrics) -> None:
    metrics.finished(RequestTimes(0.0, 5, 5), "abort")
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(metrics, "vllm:request_prompt_tokens_count") == 0


def test_token_buckets() -> None:
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100)
