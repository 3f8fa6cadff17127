"""Kernel figures on a GPU: each against its floor, in GB/s or TFLOP/s; `--tune` tries several configurations.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json          (with kernels/ on PYTHONPATH)

Every case is checked against the PyTorch reference before it is timed. Times are medians of CUDA graph replays; a
graph runs over several inputs, more than the L2 cache holds together. The copy bandwidth is measured in the same run.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

from mainsail_kernels import reference
from mainsail_kernels.attention_decode import decode_workspace, paged_attention_decode
from mainsail_kernels.attention_prefill import paged_attention_prefill
from mainsail_kernels.kv_write import rope_and_write_kv
from mainsail_kernels.linear import linear
from mainsail_kernels.rms_norm import rms_norm
from mainsail_kernels.sample import argmax, sample
from mainsail_kernels.silu_mul import silu_mul
from mainsail_kernels.tuned import DecodeConfig, LinearConfig, PrefillConfig, override

HEADS, KV_HEADS, DIM = 32, 8, 128
DEVICE, BF16 = torch.device("cuda"), torch.bfloat16


@dataclass
class Row:
    """One figure: a rate of `work` (bytes or operations) over the median time."""

    name: str
    unit: str
    rate: float
    microseconds: float
    goal: float | None = None
    error: float | None = None
    config: dict[str, object] = field(default_factory=dict)

    def line(self) -> str:
        goal = f" goal {self.goal:,.0f} ({self.rate / self.goal:.0%})" if self.goal else ""
        error = f" err {self.error:.1e}" if self.error is not None else ""
        short = ",".join(str(value) for value in self.config.values())
        return f"{self.name:34} {self.rate:8,.0f} {self.unit:7} {self.microseconds:9.1f} µs{goal}{error} {short}"


def graph_time(calls: list[Callable[[], object]], replays: int = 7) -> float:
    """Median seconds of one call, replaying a graph of them all."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    started = time.perf_counter()
    while time.perf_counter() - started < 0.15:  # the first replays after other work are up to a tenth slower
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    del kept
    return statistics.median(times)


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return ((out.double() - truth.double()).norm() / truth.double().norm()).item()


def paged_batch(num_seqs: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A cache of shuffled blocks, tables and lengths."""
    blocks = -(-length // 16)
    kv = torch.randn(num_seqs * blocks, 2, KV_HEADS, 16, DIM, device=DEVICE, dtype=BF16)
    tables = torch.randperm(num_seqs * blocks, device=DEVICE).to(torch.int32).view(num_seqs, blocks)
    return kv, tables, torch.full((num_seqs,), length, dtype=torch.int32, device=DEVICE)


def attempt(name: str, config: object, make: Callable[[], Row]) -> Iterator[Row]:
    try:
        yield make()
    except Exception as error:  # a configuration that does not fit the card is a result too
        print(f"{name}: {config}: {type(error).__name__}: {str(error)[:150]}", flush=True)


def decode_rows(configs: list[DecodeConfig | None]) -> Iterator[Row]:
    cases = [
        (16, 2048, 3300),
        (64, 2048, 3900),
        (256, 4096, 4200),
        (1, 32768, 3300),
        (256, 1024, None),
        (1, 2048, None),
    ]
    for num_seqs, length, goal in cases:
        kv, tables, lens = paged_batch(num_seqs, length)
        query = torch.randn(num_seqs, HEADS, DIM, device=DEVICE, dtype=BF16)
        some = min(num_seqs, 4)
        own = torch.arange(some * tables.shape[1], device=DEVICE, dtype=torch.int32).view(some, -1)
        wide = kv[tables[:some].flatten().long()].double()
        truth = reference.paged_attention_decode(query[:some].double(), wide, own, lens[:some], DIM**-0.5)
        del wide

        def measure(config: DecodeConfig | None) -> Row:
            workspace = decode_workspace(num_seqs, HEADS, KV_HEADS, DIM, DEVICE)  # noqa: B023

            def call() -> torch.Tensor:
                return paged_attention_decode(query, kv, tables, lens, DIM**-0.5, workspace=workspace)  # noqa: B023

            error = relative_error(call()[:some], truth)  # noqa: B023
            seconds = graph_time([call] * 20)
            size = num_seqs * length * 2 * KV_HEADS * DIM * 2  # noqa: B023
            shown = {} if config is None else asdict(config)
            return Row(f"decode {num_seqs} x {length}", "GB/s", size / seconds / 1e9, seconds * 1e6, goal, error, shown)  # noqa: B023

        yield from each(f"decode {num_seqs} x {length}", configs, measure)


def each(name: str, configs: list, measure: Callable[..., Row]) -> Iterator[Row]:
    for config in configs:
        if config is None:
            yield from attempt(name, config, lambda: measure(None))
        else:
            with override(config):
                yield from attempt(name, config, lambda: measure(config))  # noqa: B023


def prefill_rows(configs: list[PrefillConfig | None]) -> Iterator[Row]:
    cases = [(8192, 8192, 1, 500), (2048, 32768, 1, 500), (1024, 1024, 8, None), (512, 16384, 4, None)]
    cases += [(128, 1152, 8, None), (256, 512, 2, None)]
    for chunk, length, num_seqs, goal in cases:
        kv, tables, lens = paged_batch(num_seqs, length)
        starts = torch.arange(num_seqs + 1, device=DEVICE, dtype=torch.int32) * chunk
        query = torch.randn(num_seqs * chunk, HEADS, DIM, device=DEVICE, dtype=BF16)
        last = query[chunk - 16 : chunk].double()
        truth = reference.paged_attention_prefill(
            last, kv.double(), tables[:1], torch.tensor([0, 16]), lens[:1], 16, DIM**-0.5
        )
        pairs = num_seqs * (chunk * length - chunk * (chunk - 1) // 2)

        def measure(config: PrefillConfig | None) -> Row:
            def call() -> torch.Tensor:
                return paged_attention_prefill(query, kv, tables, starts, lens, chunk, DIM**-0.5)  # noqa: B023

            error = relative_error(call()[chunk - 16 : chunk], truth)  # noqa: B023
            seconds = graph_time([call] * 4)
            shown = {} if config is None else asdict(config)
            rate = 4 * pairs * HEADS * DIM / seconds / 1e12  # noqa: B023
            return Row(f"prefill {num_seqs} x {chunk} of {length}", "TFLOP/s", rate, seconds * 1e6, goal, error, shown)  # noqa: B023

        yield from each(f"prefill {chunk} of {length}", configs, measure)
        if chunk == length:
            yield sdpa_row(query, kv, tables, num_seqs, chunk, pairs)


def sdpa_row(query: torch.Tensor, kv: torch.Tensor, tables: torch.Tensor, num_seqs: int, chunk: int, pairs: int) -> Row:
    """The comparison: torch's attention on contiguous K and V, without the cost of gathering them."""
    q = query.view(num_seqs, chunk, HEADS, DIM).transpose(1, 2)
    both = [reference.gather_sequence(kv, table, chunk) for table in tables]
    key, value = (torch.stack([pair[side] for pair in both]).repeat_interleave(4, 1) for side in (0, 1))
    seconds = graph_time([lambda: F.scaled_dot_product_attention(q, key, value, is_causal=True)] * 4)
    rate = 4 * pairs * HEADS * DIM / seconds / 1e12
    return Row(f"  torch SDPA, contiguous, {num_seqs} x {chunk}", "TFLOP/s", rate, seconds * 1e6)


def linear_rows(configs: list[LinearConfig | None], rows: int) -> Iterator[Row]:
    for num_out, num_in in [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]:
        size = num_out * num_in * 2
        weights = torch.randn(max(1, 1_000_000_000 // size), num_out, num_in, device=DEVICE, dtype=BF16)
        x = torch.randn(rows, num_in, device=DEVICE, dtype=BF16)
        truth = x.double() @ weights[0].double().T

        def measure(config: LinearConfig | None, function: Callable = linear, label: str = "linear") -> Row:
            error = relative_error(function(x, weights[0]), truth)  # noqa: B023
            seconds = graph_time([lambda weight=weight: function(x, weight) for weight in weights])  # noqa: B023
            shown = {} if config is None else asdict(config)
            name = f"{label} {rows} row {num_out} x {num_in}"  # noqa: B023
            return Row(name, "GB/s", size / seconds / 1e9, seconds * 1e6, 3900 if rows == 1 else None, error, shown)  # noqa: B023

        yield from each(f"linear {num_out}", configs, measure)
        yield measure(None, F.linear, "  cuBLAS")


def memory_rows() -> Iterator[Row]:
    big = torch.randn(1 << 30, device=DEVICE, dtype=BF16)
    other = torch.empty_like(big)
    seconds = graph_time([lambda: torch.mul(big, 1.0, out=other)] * 3)
    copy = 4 * big.numel() / seconds / 1e9
    yield Row("copy", "GB/s", copy, seconds * 1e6)
    goal = 0.85 * 4200
    n = 32768
    x, residual = torch.randn(2, n, 4096, device=DEVICE, dtype=BF16)
    weight = torch.randn(4096, device=DEVICE, dtype=BF16)
    gate_up = big[: n * 28672].view(n, 28672)
    for name, call, size in [
        ("rms_norm 32768 x 4096", lambda: rms_norm(x, weight, 1e-5), 4 * x.numel()),
        ("rms_norm with residual", lambda: rms_norm(x, weight, 1e-5, residual), 8 * x.numel()),
        ("silu_mul 32768 x 2 x 14336", lambda: silu_mul(gate_up), 6 * n * 14336),
    ]:
        seconds = graph_time([call] * 3)
        yield Row(name, "GB/s", size / seconds / 1e9, seconds * 1e6, goal)
    yield rope_row(n, goal)


def sample_rows() -> Iterator[Row]:
    """Choosing tokens at batch 256 and 1 from logits like a model's that never trained: nothing can be skipped."""
    for n in (256, 1):
        logits = torch.randn(n, 128256, device=DEVICE, dtype=BF16)
        off, one, step = torch.zeros(n, device=DEVICE), torch.ones(n, device=DEVICE), torch.arange(n, device=DEVICE)
        size = 2 * logits.numel()
        for name, call in [
            ("argmax", lambda: argmax(logits)),  # noqa: B023
            ("sample, temperature 1", lambda: sample(logits, one, off.int(), one, off, step, step)),  # noqa: B023
            ("sample, top_p 0.9", lambda: sample(logits, one, off.int(), one * 0.9, off, step, step)),  # noqa: B023
            ("sample, top_k 50, top_p 0.9", lambda: sample(logits, one, (one * 50).int(), one * 0.9, off, step, step)),  # noqa: B023
        ]:
            seconds = graph_time([call] * 3)
            yield Row(f"{name}, {n} rows", "GB/s", size / seconds / 1e9, seconds * 1e6)


def rope_row(n: int, goal: float) -> Row:
    qkv = torch.randn(n, (HEADS + 2 * KV_HEADS) * DIM, device=DEVICE, dtype=BF16)
    kv = torch.empty(n // 16, 2, KV_HEADS, 16, DIM, device=DEVICE, dtype=BF16)
    cos_sin = torch.rand(n, DIM, device=DEVICE)
    slots, positions = torch.randperm(n, device=DEVICE), torch.arange(n, device=DEVICE)
    seconds = graph_time(
        [lambda: rope_and_write_kv(qkv, positions, cos_sin, kv, slots, num_heads=HEADS, num_kv_heads=KV_HEADS)] * 3
    )
    return Row(
        "rope + KV write 32768", "GB/s", (4 * qkv.numel() + 4 * cos_sin.numel()) / seconds / 1e9, seconds * 1e6, goal
    )


# The configurations that --tune tries, field by field as in tuned.py.
PREFILLS = [(128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2, True)]
DECODES = [
    *[(64, 4, 3, 4, 1), (64, 4, 3, 4, 2), (64, 4, 3, 4, 4), (32, 4, 3, 4, 2)],
    *[(64, 4, 2, 5, 1), (128, 4, 2, 3, 1), (64, 2, 3, 4, 1)],
]
ONE_ROW = [(2, 2048, 4, 1, 512), (4, 1024, 4, 2, 512), (2, 1024, 4, 2, 512), (4, 512, 4, 4, 512), (2, 2048, 4, 1, 4096)]
SKINNY = [
    *[(64, 256, 4, 3, 512, split) for split in (1, 2, 4)],
    *[(64, 128, 4, 4, 512, split) for split in (1, 2, 4)],
    *[(128, 128, 8, 3, 512, split) for split in (1, 4)],
]


def all_rows(tune: bool, groups: list[str]) -> Iterator[Row]:
    if "memory" in groups:
        yield from memory_rows()
    if "sample" in groups:
        yield from sample_rows()
    if "prefill" in groups:
        yield from prefill_rows([PrefillConfig(*c) for c in PREFILLS] if tune else [None])
    if "decode" in groups:
        yield from decode_rows([DecodeConfig(*c) for c in DECODES] if tune else [None])
    if "linear" in groups:
        yield from linear_rows([LinearConfig(*c) for c in ONE_ROW] if tune else [None], 1)
        for rows in (8, 32, 64):
            yield from linear_rows([LinearConfig(*c) for c in SKINNY] if tune else [None], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="several configurations for each case")
    parser.add_argument("--only", default="memory,sample,prefill,decode,linear", help="groups of cases, by comma")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    started, rows = time.time(), []
    for row in all_rows(args.tune, args.only.split(",")):
        rows.append(row)
        print(row.line(), flush=True)
        if args.out:
            args.out.write_text(json.dumps(report(rows, started), indent=1) + "\n")


def report(rows: list[Row], started: float) -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "card": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "commit": commit.stdout.strip() or "unknown",
        "command": " ".join(["python", *sys.argv]),
        "seconds": round(time.time() - started, 1),
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    main()
