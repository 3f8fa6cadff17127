"""benchmarks/device_trace.py: how a profiled step's time is divided among its kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.device_trace import Kernel, exclusive, labels, read, shares


def _in_a_row(*names: str) -> list[Kernel]:
    return [Kernel(name, 10.0 * index, 10.0 * index + 10.0) for index, name in enumerate(names)]


def test_own_times_and_gaps_add_up_to_the_whole() -> None:
    kernels = [Kernel("a", 0, 10), Kernel("b", 8, 14), Kernel("c", 9, 12), Kernel("d", 20, 21)]
    cut = list(exclusive(kernels))
    assert cut == [(10, 0), (4, 0), (0, 0), (1, 6)]
    assert sum(own + gap for own, gap in cut) == 21


def test_products_are_told_apart_by_what_ran_before_them() -> None:
    layer = [
        "_rms_norm_kernel", "nvjet_a", "_rope_write_kernel", "_decode_kernel", "_hopper_kernel", "nvjet_b",
        "cublasLt::splitKreduce_kernel", "_rms_norm_kernel",
    ]  # fmt: skip
    of_fp8_cache = [*layer[:4], "_transpose_values_kernel", "_prefill_kernel", "_hopper_fp8_kernel", *layer[5:]]
    plain, fused = [*layer, "nvjet_c", "_gated_kernel", "nvjet_d"], [*of_fp8_cache, "_rows_kernel", "_rows_kernel"]
    end = ["index_kernel", "_rms_norm_kernel", "nvjet_e", "_argmax_kernel"]
    named = labels(_in_a_row("_resolve_kernel", *plain, *fused, *end, *plain))
    products = [name.removeprefix("linear ") for name in named if name.startswith("linear")]
    one = ["qkv", "output", "output", "gate_up", "down"]
    assert products == [*one, *one, "head", *one]
    assert named.count("prefill attention") == 5


def test_a_router_and_a_quantized_product_do_not_shift_the_rest() -> None:
    experts = ["_rms_norm_kernel", "nvjet_router", "_route_kernel", "_grouped_kernel"]
    layer = ["_rms_norm_kernel", "_quantize_kernel", "nvjet_a", "_rope_write_kernel", "_decode_kernel", "nvjet_b"]
    named = labels(_in_a_row(*layer, *experts, *layer))
    assert [name for name in named if name.startswith("linear")] == [
        "linear qkv", "linear output", "linear gate_up", "linear qkv", "linear output",
    ]  # fmt: skip


def test_a_trace_is_read_by_the_kernels_start(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    kernel = {
        "cat": "kernel",
        "name": "_decode_kernel",
        "ts": 5.0,
        "dur": 2.5,
        "args": {"stream": 7, "grid": [8, 2, 1]},
    }
    copy = {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 1.0, "dur": 1.0, "args": {"stream": 7}}
    path.write_text(
        json.dumps({"traceEvents": [kernel, copy, {"cat": "cuda_runtime", "name": "x", "ts": 0, "dur": 9}]})
    )
    table = shares(read(path))
    assert list(table) == ["inputs", "decode attention"]
    share = table["decode attention"]
    assert (share.own_us, share.gap_us, share.launches) == (pytest.approx(2.5), pytest.approx(3.0), 1)
    assert share.main_kernel == "_decode_kernel [8, 2, 1]"
