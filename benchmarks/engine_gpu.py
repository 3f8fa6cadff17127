"""Offline figures of the engine on one GPU: decode steps, prefill, whole runs; each beside its floor and its peer.

    python benchmarks/engine_gpu.py [--model llama-3-8b|qwen3-0.6b] [--rows step,prefill,mixed,long] [--output FILE]

Real shapes, dummy weights, bf16, greedy, prompts of random token ids, prefix caching off. The engine core runs in this
process, with its scheduler, CUDA graphs and overlap. The floor of a decode step is the bytes of weights and KV that it
must read over the copy bandwidth measured here. Peer: vLLM 0.26.0 on an H200 (torch 2.11, FlashAttention 3, CUDA
graphs, torch.compile), measured with the same shapes on another day.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.core import EngineCore, build
from mainsail_engine.model.architecture import Architecture, read_architecture
from mainsail_engine.protocol import Add
from mainsail_engine.request import SamplingParams

MODELS = Path(__file__).parent / "models"
STEP_BATCHES = (1, 8, 32, 64, 128, 256)
PEER: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "step_ms": {1: 4.93, 8: 5.30, 32: 6.54, 64: 7.75, 128: 10.75, 256: 18.29},
        "prefill": 43_800, "mixed": 10_089, "long": 9_293,
    },
    "qwen3-0.6b": {
        "step_ms": {1: 1.83, 8: 2.63, 32: 2.81, 64: 4.07, 128: 6.21, 256: 10.77},
        "prefill": 419_000, "mixed": 23_216, "long": None,
    },
    "qwen3-30b-a3b": {"step_ms": {1: 4.13, 128: 21.5}, "prefill": 72_000, "mixed": None, "long": None},
}  # fmt: skip


def measured_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy of 4 GiB."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    times: list[float] = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / sorted(times)[len(times) // 2]


def step_bytes(a: Architecture, batch: int, context: int) -> int:
    """bf16 bytes that a decode step must read: every weight but the embedding table, and the KV."""
    qkv = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim * a.hidden_size
    layer = qkv + a.num_heads * a.head_dim * a.hidden_size + round(_mlp_weights(a, batch))
    weights = a.num_layers * layer + a.vocab_size * a.hidden_size
    kv = 2 * a.num_layers * a.num_kv_heads * a.head_dim * context * batch
    return 2 * (weights + kv)


def _mlp_weights(a: Architecture, batch: int) -> float:
    """Of a layer; with experts, the share of them that `batch` random choices hit."""
    if a.experts is None:
        return 3 * a.hidden_size * a.intermediate_size
    e = a.experts
    hit = 1 - (1 - e.experts_per_token / e.num_experts) ** batch
    return 3 * a.hidden_size * e.intermediate_size * e.num_experts * hit + e.num_experts * a.hidden_size


class Load:
    """Requests of random token ids for a core."""

    def __init__(self, core: EngineCore, vocab: int) -> None:
        self.core, self.vocab, self.numbers, self.count = core, vocab, random.Random(0), 0

    def add(self, prompt_len: int, max_tokens: int) -> None:
        prompt = [self.numbers.randrange(self.vocab) for _ in range(prompt_len)]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.count += 1
        self.core.handle(Add(str(self.count), prompt, params), time.monotonic())

    def drain(self) -> tuple[int, float]:
        """Run until all is done: (output tokens, seconds)."""
        started, tokens = time.perf_counter(), 0
        while self.core.has_work:
            outputs = self.core.step(time.monotonic())
            tokens += sum(len(o.token_ids) for o in outputs.outputs) if outputs else 0
        return tokens, time.perf_counter() - started


def decode_step_ms(load: Load, batch: int) -> float:
    """Mean time of 48 steps with `batch` decodes at a context of about 1,024."""
    for _ in range(batch):
        load.add(992, 100)
    whole = 0
    while whole < 6:
        outputs = load.core.step(time.monotonic())
        whole += bool(outputs and sum(len(o.token_ids) for o in outputs.outputs) == batch)
    started = time.perf_counter()
    for _ in range(48):
        load.core.step(time.monotonic())
    elapsed = time.perf_counter() - started
    load.drain()
    return elapsed / 48 * 1e3


def rows(load: Load, name: str, architecture: Architecture, wanted: set[str], bandwidth: float) -> list[dict[str, Any]]:
    peer = PEER[name]
    table: list[dict[str, Any]] = []

    def note(row: str, unit: str, ours: float, floor: float | None, theirs: float | None) -> None:
        table.append({"row": row, "unit": unit, "ours": ours, "floor": floor, "peer": theirs})
        over = f"{ours / floor:5.2f} x floor {floor:6.2f}" if floor else ""
        print(f"{name} {row:24} {ours:10.2f} {unit:8} {over}   peer {theirs}", flush=True)

    if "step" in wanted:
        for batch in STEP_BATCHES:
            floor = step_bytes(architecture, batch, 1024) / bandwidth * 1e3
            note(f"decode step, batch {batch}", "ms", decode_step_ms(load, batch), floor, peer["step_ms"].get(batch))
    if "prefill" in wanted:
        for _ in range(64):
            load.add(1024, 1)
        _, seconds = load.drain()
        note("prefill of 1k prompts", "tok/s", 64 * 1024 / seconds, None, peer["prefill"])
    if "mixed" in wanted:
        for _ in range(256):
            load.add(load.numbers.randint(100, 1024), load.numbers.randint(100, 1024))
        tokens, seconds = load.drain()
        note("256 x 100-1024/100-1024", "tok/s", tokens / seconds, None, peer["mixed"])
    if "long" in wanted:
        for _ in range(512):
            load.add(1000, 1000)
        tokens, seconds = load.drain()
        note("512 x 1000/1000", "tok/s", tokens / seconds, None, peer["long"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llama-3-8b", choices=sorted(PEER))
    parser.add_argument("--rows", default="step,prefill,mixed,long")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    bandwidth = measured_bandwidth()
    torch.cuda.empty_cache()
    config = EngineConfig(
        model=ModelConfig(path=str(MODELS / args.model), load_format="dummy", max_model_len=4096),
        cache=CacheConfig(enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=256),
        device="cuda",
        overlap=not args.no_overlap,
        cuda_graphs=not args.no_graphs,
    )
    started = time.perf_counter()
    core, ready = build(config)
    start_s = time.perf_counter() - started
    print(f"{args.model}: start {start_s:.1f} s, {ready.num_blocks} blocks, {bandwidth / 1e9:.0f} GB/s", flush=True)
    load = Load(core, ready.vocab_size)
    load.add(1000, 8)
    load.drain()
    table = rows(load, args.model, read_architecture(MODELS / args.model), set(args.rows.split(",")), bandwidth)
    if args.output:
        result = {
            "card": torch.cuda.get_device_name(), "torch": torch.__version__, "model": args.model,
            "graphs": config.cuda_graphs, "overlap": config.overlap, "start_s": round(start_s, 1),
            "copy_GB_per_s": round(bandwidth / 1e9), "rows": table,
        }  # fmt: skip
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
