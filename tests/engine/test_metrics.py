from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.engine import field_metrics

from mainsail_engine.config import CacheConfig
from mainsail_engine.metrics import Metrics, RequestTimes, one_two_five
from mainsail_engine.protocol import AdapterUse, BlockLife, Ready, RequestOutput, SchedulerStats, StepOutputs

READY = Ready(8192, 100, 16, 256, [2], "cpu", "float32")

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


def test_counters_go_on_after_a_sleep_whatever_they_were_before(metrics: Metrics) -> None:
    """The engine's own begin anew: here with a prompt longer than all before, and with fewer blocks swapped."""
    before = SchedulerStats(num_preemptions=3, prefix_cache_queries=100, prefix_cache_hits=40, num_swapped_in=9)
    after = SchedulerStats(num_preemptions=4, prefix_cache_queries=150, prefix_cache_hits=10, num_swapped_in=2)
    metrics.step(step(1, before))
    metrics.step(msgspec.structs.replace(step(2, after), num_wakes=1))
    metrics.step(msgspec.structs.replace(step(3, after), num_wakes=1))
    assert value(metrics, "vllm:num_preemptions_total") == 7
    assert value(metrics, "vllm:prefix_cache_queries_total") == 250
    assert value(metrics, "vllm:prefix_cache_hits_total") == 50
    assert value(metrics, "mainsail:swapped_in_blocks_total") == 11


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


@dataclass
class Seen:
    """What a scrape shows of one name."""

    kind: str
    labels: set[str] = field(default_factory=set)
    values: dict[str, set[str]] = field(default_factory=dict)


def scrape(text: str) -> dict[str, Seen]:
    """By a sample's name."""
    seen: dict[str, Seen] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            one = seen.setdefault(sample.name, Seen(family.type))
            one.labels |= sample.labels.keys()
            for label, text_value in sample.labels.items():
                one.values.setdefault(label, set()).add(text_value)
    return seen


def check_the_field(text: str) -> None:
    """Everything that vLLM shows is there, with its type, labels, their values, and bounds."""
    seen = scrape(text)
    for kind, table in (("gauge", field_metrics.GAUGES), ("counter", field_metrics.COUNTERS)):
        for name, labels in table.items():
            assert name in seen, name
            assert seen[name].kind == kind, name
            assert seen[name].labels >= labels, name
    for (name, label), values in field_metrics.LABEL_VALUES.items():
        assert seen[name].values[label] >= values, name
    for name, bounds in (field_metrics.HISTOGRAMS | field_metrics.HTTP_HISTOGRAMS).items():
        labels = field_metrics.OWN if name in field_metrics.HISTOGRAMS else {"handler", "method"}
        assert all(seen[f"{name}_{part}"].labels >= labels for part in ("bucket", "sum", "count")), name
        assert seen[f"{name}_bucket"].kind == "histogram", name
        assert {float(le) for le in seen[f"{name}_bucket"].values["le"]} >= {*bounds, float("inf")}, name
    ends = {"gauge": "", "counter": "_total", "histogram": "_bucket"}
    for name, kind in field_metrics.OLDER.items():
        assert seen[name + ends[kind]].kind == kind, name
        assert seen[name + ends[kind]].labels >= field_metrics.OWN, name


def test_the_fields_names_labels_and_buckets(metrics: Metrics) -> None:
    """vLLM's whole set, and what it had before: dashboards made for it find theirs."""
    metrics.set_cache_info(READY, CacheConfig())
    text = metrics.exposition().decode()
    check_the_field(text)
    assert not any(name in text for name in (*field_metrics.WITH_LORA, *field_metrics.OF_WHAT_IS_NOT_HERE))


@pytest.mark.parametrize("name", ["vllm:num_requests_running", "vllm:mm_cache_hits", "vllm:gpu_cache_usage_perc"])
def test_a_missing_one_is_missed(metrics: Metrics, name: str) -> None:
    metrics.set_cache_info(READY, CacheConfig())
    text = "".join(line for line in metrics.exposition().decode().splitlines(keepends=True) if name not in line)
    with pytest.raises((AssertionError, KeyError)):
        check_the_field(text)


def test_older_names_say_the_same(metrics: Metrics) -> None:
    metrics.step(step(1, SchedulerStats(kv_usage=0.25, host_usage=0.5, num_swapped=3, prefix_cache_queries=80,
                                        prefix_cache_hits=20, host_cache_queries=10, host_cache_hits=5)))  # fmt: skip
    times = RequestTimes(arrival_s=0.0, num_prompt_tokens=4, max_tokens=2)
    metrics.delivered(times, 1.0)
    metrics.delivered(times, 1.5)
    shown = {
        "vllm:gpu_cache_usage_perc": 0.25, "vllm:cpu_cache_usage_perc": 0.5, "vllm:num_requests_swapped": 3,
        "vllm:gpu_prefix_cache_queries_total": 80, "vllm:gpu_prefix_cache_hits_total": 20,
        "vllm:gpu_prefix_cache_hit_rate": 0.25, "vllm:cpu_prefix_cache_hit_rate": 0.5,
        "vllm:time_per_output_token_seconds_sum": 0.5, "vllm:time_per_output_token_seconds_count": 1,
    }  # fmt: skip
    assert {name: value(metrics, name) for name in shown} == shown


def test_adapters_in_use_are_one_series(metrics: Metrics) -> None:
    use = AdapterUse(["a", "b"], ["c"])
    metrics.set_adapters(4, lambda: use)
    (family,) = [family for family in metrics.registry.collect() if family.name in field_metrics.WITH_LORA]
    (sample,) = family.samples
    assert sample.labels == {"max_lora": "4", "waiting_lora_adapters": "c", "running_lora_adapters": "a,b"}
    assert sample.labels.keys() == field_metrics.WITH_LORA[family.name]
    assert abs(sample.value - time.time()) < 60


def test_token_buckets() -> None:
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100)
