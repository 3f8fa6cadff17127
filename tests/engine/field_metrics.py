"""vLLM's metrics as data: names as they are on the wire, labels, bucket bounds (vLLM 0.33, v1/metrics/loggers.py).

Dashboards, autoscalers and endpoint pickers made for it ask for these.
"""

from __future__ import annotations

OWN = frozenset({"model_name", "engine"})

GAUGES: dict[str, frozenset[str]] = {
    "vllm:num_requests_running": OWN,
    "vllm:num_requests_waiting": OWN,
    "vllm:num_requests_waiting_by_reason": OWN | {"reason"},
    "vllm:kv_cache_usage_perc": OWN,
    "vllm:engine_sleep_state": OWN | {"sleep_state"},
    "vllm:cache_config_info": frozenset(
        {"block_size", "num_gpu_blocks", "num_gpu_blocks_override", "kv_cache_size_tokens", "gpu_memory_utilization",
         "enable_prefix_caching", "kv_offloading_size", "cache_dtype", "engine"}
    ),
}  # fmt: skip
WITH_LORA: dict[str, frozenset[str]] = {
    "vllm:lora_requests_info": frozenset({"max_lora", "waiting_lora_adapters", "running_lora_adapters"}),
}
COUNTERS: dict[str, frozenset[str]] = {
    "vllm:prefix_cache_queries_total": OWN,
    "vllm:prefix_cache_hits_total": OWN,
    "vllm:external_prefix_cache_queries_total": OWN,
    "vllm:external_prefix_cache_hits_total": OWN,
    "vllm:mm_cache_queries_total": OWN,
    "vllm:mm_cache_hits_total": OWN,
    "vllm:num_preemptions_total": OWN,
    "vllm:prompt_tokens_total": OWN,
    "vllm:prompt_tokens_by_source_total": OWN | {"source"},
    "vllm:prompt_tokens_cached_total": OWN,
    "vllm:prompt_tokens_cached_by_source_total": OWN | {"source"},
    "vllm:generation_tokens_total": OWN,
    "vllm:request_success_total": OWN | {"finished_reason"},
    "vllm:admission_rejections_total": frozenset({"model_name", "reason"}),
    "vllm:spec_decode_num_drafts_total": OWN,
    "vllm:spec_decode_num_draft_tokens_total": OWN,
    "vllm:spec_decode_num_accepted_tokens_total": OWN,
    "vllm:spec_decode_num_accepted_tokens_per_pos_total": OWN | {"position"},
    "vllm:corrupted_requests_total": OWN,
    "vllm:tool_call_parser_invocations_total": frozenset({"model_name", "mode", "outcome", "request_type"}),
    "http_requests_total": frozenset({"method", "status", "handler"}),
}
LABEL_VALUES: dict[tuple[str, str], frozenset[str]] = {
    ("vllm:num_requests_waiting_by_reason", "reason"): frozenset({"capacity", "deferred"}),
    ("vllm:engine_sleep_state", "sleep_state"): frozenset({"awake", "weights_offloaded", "discard_all"}),
    ("vllm:request_success_total", "finished_reason"): frozenset({"stop", "length", "abort", "error"}),
    ("vllm:admission_rejections_total", "reason"): frozenset({"max_num_queued_reqs", "max_num_queued_tokens"}),
    ("vllm:prompt_tokens_cached_by_source_total", "source"): frozenset({"device", "host"}),
    ("vllm:prompt_tokens_by_source_total", "source"): frozenset(
        {"local_compute", "local_cache_hit", "external_kv_transfer"}
    ),
}

_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640),
    2560,
)
_LATENCY = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_RESIDENCY = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
"""1-2-5 up to the model's length; so far for a length of 2,048."""
HISTOGRAMS: dict[str, tuple[float, ...]] = {
    "vllm:iteration_tokens_total": _ITERATION,
    "vllm:request_prompt_tokens": _TOKENS,
    "vllm:request_generation_tokens": _TOKENS,
    "vllm:request_max_num_generation_tokens": _TOKENS,
    "vllm:request_params_n": (1, 2, 5, 10, 20),
    "vllm:request_params_max_tokens": _TOKENS,
    "vllm:request_prefill_kv_computed_tokens": _TOKENS,
    "vllm:request_num_preemptions": (1, 2, 3, 4, 5, 10, 20),
    "vllm:time_to_first_token_seconds": _TTFT,
    "vllm:inter_token_latency_seconds": _LATENCY,
    "vllm:request_time_per_output_token_seconds": _LATENCY,
    "vllm:e2e_request_latency_seconds": _WHOLE,
    "vllm:request_queue_time_seconds": _WHOLE,
    "vllm:request_inference_time_seconds": _WHOLE,
    "vllm:request_prefill_time_seconds": _WHOLE,
    "vllm:request_decode_time_seconds": _WHOLE,
    "vllm:kv_block_lifetime_seconds": _RESIDENCY,
    "vllm:kv_block_idle_before_evict_seconds": _RESIDENCY,
    "vllm:kv_block_reuse_gap_seconds": _RESIDENCY,
}
HTTP_HISTOGRAMS: dict[str, tuple[float, ...]] = {"http_request_duration_seconds": (0.1, 0.5, 1)}
"""Labelled by handler and method."""
OLDER: dict[str, str] = {
    "vllm:gpu_cache_usage_perc": "gauge",
    "vllm:cpu_cache_usage_perc": "gauge",
    "vllm:num_requests_swapped": "gauge",
    "vllm:gpu_prefix_cache_hit_rate": "gauge",
    "vllm:cpu_prefix_cache_hit_rate": "gauge",
    "vllm:avg_prompt_throughput_toks_per_s": "gauge",
    "vllm:avg_generation_throughput_toks_per_s": "gauge",
    "vllm:gpu_prefix_cache_queries": "counter",
    "vllm:gpu_prefix_cache_hits": "counter",
    "vllm:time_per_output_token_seconds": "histogram",
}
"""Given up by vLLM, still asked for in the field; their types."""
OF_WHAT_IS_NOT_HERE = {
    "vllm:num_requests_kv_fetch_by_stage": "of instances that take KV computed by others (disaggregated prefill)",
    "vllm:estimated_flops_per_gpu_total": "only with a flag (--enable-mfu-metrics)",
    "vllm:estimated_read_bytes_per_gpu_total": "the same",
    "vllm:estimated_write_bytes_per_gpu_total": "the same",
}
"""The rest of the set: what this engine has not, and why vLLM itself does not show it by default."""
