"""Offline figures of the engine on one GPU: decode steps, prefill, whole runs; each beside its floor and its peer.

    python benchmarks/engine_gpu.py [--model NAME] [--rows ROW,…] [--output FILE]

    step      decode steps at a context of 1,024, by batch         mixed, long   whole runs of 256 and 512 requests
    prefill   64 prompts of 1,024 tokens                           sampling      what sampling settings add to a step
    deep      one decode at a context of 32k (--max-model-len)     sleep         to sleep and to wake up, twice
    kernels   a decode step by kernel, from the profiler

Real shapes, dummy weights, bf16, greedy, prompts of random token ids, prefix caching off, no bound on the time between
tokens. The engine core runs in this process, with its scheduler, CUDA graphs and overlap. The floor of a decode step is
the bytes of weights and KV that it must read over the copy bandwidth measured here; for a sampling setting it is the
greedy step measured beside it. Peer: vLLM 0.26.0 on an H200 (torch 2.11, FlashAttention 3, CUDA graphs, torch.compile),
measured with the same shapes on another day.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.core import EngineCore, build
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.protocol import Abort, Add, Control
from mainsail_engine.request import FinishReason, SamplingParams

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
    "llama-3-8b fp8": {"step_ms": {1: 3.50, 32: 5.56, 128: 9.47, 256: 15.7}, "prefill": 79_000, "mixed": None,
                       "long": None},
    "llama-3-70b": {"step_ms": {}, "prefill": None, "mixed": None, "long": None},
    "llama-3-70b fp8": {"step_ms": {1: 20.65, 32: 27.9, 128: 37.1}, "prefill": None, "mixed": None, "long": None},
    "llama-2-13b": {"step_ms": {}, "prefill": None, "mixed": None, "long": None},
    "qwen3-30b-a3b": {"step_ms": {1: 4.13, 128: 21.5}, "prefill": 72_000, "mixed": None, "long": None},
    "gpt-oss-20b": {"step_ms": {}, "prefill": None, "mixed": None, "long": None},
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


@dataclass(frozen=True)
class Widths:
    """Bytes of a number; the head is always bf16."""

    weight: float = 2.0
    kv: float = 2.0
    expert: float = 2.0

    @classmethod
    def of(cls, model: str, quantization: str, kv_dtype: str) -> Widths:
        """Of a model of MODELS under serve's options of these names."""
        weight = {"fp8": 1.0, "int4": (4 + 24 / 32) / 8}.get(quantization, 2.0)
        experts = (4 + 8 / 32) / 8 if model == "gpt-oss-20b" else weight  # its checkpoint has them in MXFP4
        return cls(weight, 1.0 if kv_dtype == "fp8" else 2.0, experts)


def step_bytes(a: Architecture, batch: int, context: int, widths: Widths) -> float:
    """Bytes that a decode step must read: every weight but the embedding table, and the KV."""
    qkv = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim * a.hidden_size
    attention = (qkv + a.num_heads * a.head_dim * a.hidden_size) * widths.weight
    mlp = mlp_weights(a, batch) * (widths.weight if a.experts is None else widths.expert)
    head = 2 * a.vocab_size * a.hidden_size
    seen = sum(min(context, a.window(layer) or context) for layer in range(a.num_layers))
    kv = 2 * a.num_kv_heads * a.head_dim * seen * batch
    return head + a.num_layers * (attention + mlp) + kv * widths.kv


def mlp_weights(a: Architecture, batch: int) -> float:
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

    def add(self, prompt_len: int, max_tokens: int, **settings: Any) -> None:
        prompt = [self.numbers.randrange(self.vocab) for _ in range(prompt_len)]
        params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **settings})
        self.count += 1
        self.core.handle(Add(str(self.count), prompt, params), time.monotonic())

    def abort(self, after: int) -> None:
        """End all requests but the first `after`."""
        names = [str(number) for number in range(after + 1, self.count + 1)]
        self.core.handle(Abort(names, FinishReason.ABORT), time.monotonic())

    def drain(self) -> tuple[int, float]:
        """Run until all is done: (output tokens, seconds)."""
        started, tokens = time.perf_counter(), 0
        while self.core.has_work:
            outputs = self.core.step(time.monotonic())
            tokens += sum(len(o.token_ids) for o in outputs.outputs) if outputs else 0
        return tokens, time.perf_counter() - started


def decode_together(load: Load, batch: int, context: int, **settings: Any) -> None:
    """Bring `batch` decodes to a context of about `context`."""
    for _ in range(batch):
        load.add(context, 100, **settings)
    whole = 0
    while whole < 6:
        if not load.core.has_work:
            raise SystemExit(f"{batch} requests never decoded together")
        outputs = load.core.step(time.monotonic())
        whole += bool(outputs and sum(len(o.token_ids) for o in outputs.outputs) == batch)


def decode_step_times(load: Load, batch: int, context: int = 992, **settings: Any) -> list[float]:
    """Seconds of each of 48 steps with `batch` decodes at a context of about `context` and 32 more."""
    first = load.count
    decode_together(load, batch, context, **settings)
    ends = [time.perf_counter()]
    for _ in range(48):
        load.core.step(time.monotonic())
        ends.append(time.perf_counter())
    load.abort(first)
    load.drain()
    return [end - before for before, end in pairwise(ends)]


def decode_step_ms(load: Load, batch: int, context: int = 992, **settings: Any) -> float:
    """Their mean."""
    return statistics.fmean(decode_step_times(load, batch, context, **settings)) * 1e3


def kernel_times(load: Load, batch: int, context: int = 992, steps: int = 8) -> list[tuple[str, float, float]]:
    """(kernel, launches of a step, milliseconds of a step) of decodes on the device, the largest share first."""
    decode_together(load, batch, context)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            load.core.step(time.monotonic())
        torch.cuda.synchronize()
    load.drain()
    kernels = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    table = [(event.key, event.count / steps, event.self_device_time_total / steps / 1e3) for event in kernels]
    return sorted(table, key=lambda row: -row[2])


SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {"temperature": 1.0},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top_k 50, top_p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "penalties": {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logprobs 5": {"logprobs": 5},
    "seed": {"temperature": 1.0, "seed": 7},
    "logit_bias": {"logit_bias": ((5, 1.0), (17, -2.0))},
}


def sampling_rows(load: Load, batch: int, rounds: int) -> Iterator[tuple[str, float, float]]:
    """(setting, milliseconds of a step, of a greedy one): medians over all rounds, of the steps of greedy runs right
    before and after each."""
    asked: dict[str, list[float]] = {name: [] for name in SETTINGS}
    greedy: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        before = decode_step_times(load, batch, 256)
        for name, settings in SETTINGS.items():
            asked[name] += decode_step_times(load, batch, 256, **settings)
            after = decode_step_times(load, batch, 256)
            greedy[name] += before + after
            before = after
    for name in SETTINGS:
        yield name, 1e3 * statistics.median(asked[name]), 1e3 * statistics.median(greedy[name])


def sleep_rows(load: Load) -> Iterator[tuple[str, float]]:
    """Seconds to sleep, to wake up, and to the first token after that."""
    for turn in ("first", "second"):
        for action in ("sleep", "wake_up"):
            started = time.perf_counter()
            load.core.handle(Control(action, action), time.monotonic())
            done = load.core.control()
            if done is None or done.error is not None:
                raise SystemExit(f"{action} failed: {done}")
            torch.cuda.synchronize()
            yield f"{action}, {turn} time", time.perf_counter() - started
        started = time.perf_counter()
        load.add(32, 1)
        load.drain()
        yield f"first token afterwards, {turn} time", time.perf_counter() - started


def rows(
    load: Load, name: str, architecture: Architecture, wanted: set[str], bandwidth: float, widths: Widths,
    batches: list[int], sampling: list[int], peer: dict[str, Any], rounds: int,
    keep: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    def note(row: str, unit: str, ours: float, floor: float | None, theirs: float | None) -> None:
        keep({"row": row, "unit": unit, "ours": ours, "floor": floor, "peer": theirs})
        over = f"{ours / floor:5.2f} x floor {floor:6.2f}" if floor else ""
        print(f"{name} {row:24} {ours:10.2f} {unit:8} {over}   peer {theirs}", flush=True)

    if "step" in wanted:
        for batch in batches:
            floor = step_bytes(architecture, batch, 1024, widths) / bandwidth * 1e3
            note(f"decode step, batch {batch}", "ms", decode_step_ms(load, batch), floor, peer["step_ms"].get(batch))
    for batch in batches if "kernels" in wanted else ():
        for kernel, launches, ms in kernel_times(load, batch)[:14]:
            print(f"    batch {batch:3}  {ms:8.3f} ms {launches:6.0f} x {kernel[:90]}", flush=True)
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
    if "deep" in wanted:
        floor = step_bytes(architecture, 1, 32_800, widths) / bandwidth * 1e3
        note("decode step, 1 x 32k", "ms", decode_step_ms(load, 1, 32_700), floor, None)
    for batch in sampling if "sampling" in wanted else ():
        for setting, ms, greedy_ms in sampling_rows(load, batch, rounds):
            note(f"batch {batch}, {setting}", "ms", ms, greedy_ms, None)
    if "sleep" in wanted:
        for name_of, seconds in sleep_rows(load):
            note(name_of, "s", seconds, None, None)


def engine_config(args: argparse.Namespace, *, prefix_caching: bool = False) -> EngineConfig:
    """Dummy weights in the shapes of args.model, room for args.max_model_len tokens, no bound on the time of a step."""
    model = MODELS / args.model
    if args.max_model_len > read_architecture(model).max_position_embeddings:
        shapes = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": args.max_model_len}
        model = Path(tempfile.mkdtemp())
        (model / "config.json").write_text(json.dumps(shapes))
    return EngineConfig(
        model=ModelConfig(
            path=str(model),
            load_format="dummy",
            max_model_len=args.max_model_len,
            quantization=args.quantization,
        ),
        cache=CacheConfig(
            enable_prefix_caching=prefix_caching,
            dtype=args.kv_cache_dtype,
            offloading_size_gib=args.kv_offloading_size,
            memory_utilization=_share_of_card(getattr(args, "memory_gib", None)),
        ),
        scheduler=SchedulerConfig(max_num_seqs=args.max_num_seqs, max_inter_token_latency_ms=0),
        device="cuda",
        overlap=not getattr(args, "no_overlap", False),
        cuda_graphs=not getattr(args, "no_graphs", False),
    )


def in_use_gib() -> float:
    """Of the card, by everybody."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def _share_of_card(gib: float | None) -> float:
    default = CacheConfig().memory_utilization
    return default if gib is None else gib * 2**30 / torch.cuda.mem_get_info()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llama-3-8b", choices=sorted(name for name in PEER if " " not in name))
    parser.add_argument("--rows", default="step,prefill,mixed,long")
    parser.add_argument("--quantization", default="auto", choices=("auto", "fp8", "int4"))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"))
    parser.add_argument("--batches", default=",".join(map(str, STEP_BATCHES)), help="of the decode steps")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--memory-gib", type=float, help="of the card that the engine may take; default: as serve")
    parser.add_argument(
        "--kv-offloading-size", type=float,
        help="GiB of host memory for KV; default: what serve takes for the row long, else 0: none is pinned meanwhile",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2, help="of the sampling settings")
    parser.add_argument("--sampling-batches", default="256,1")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--commit", default=os.environ.get("COMMIT", ""), help="noted with the results")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    bandwidth = measured_bandwidth()
    torch.cuda.empty_cache()
    if args.kv_offloading_size is None and "long" not in args.rows.split(","):
        args.kv_offloading_size = 0.0
    config = engine_config(args)
    started = time.perf_counter()
    core, ready = build(config)
    start_s = time.perf_counter() - started
    print(f"{args.model}: start {start_s:.1f} s, {ready.num_blocks} blocks, {bandwidth / 1e9:.0f} GB/s", flush=True)
    load = Load(core, ready.vocab_size)
    load.add(1000, 8)
    load.drain()
    widths = Widths.of(args.model, args.quantization, args.kv_cache_dtype)
    named = args.model if args.quantization == "auto" else f"{args.model} {args.quantization}"
    peer = PEER.get(named, {"step_ms": {}, "prefill": None, "mixed": None, "long": None})
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "model": args.model,
        "quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype, "commit": args.commit,
        "command": " ".join(["python", *sys.argv]), "max_num_seqs": args.max_num_seqs,
        "graphs": config.cuda_graphs, "overlap": config.overlap, "start_s": round(start_s, 1),
        "copy_GB_per_s": round(bandwidth / 1e9), "rows": [],
    }  # fmt: skip

    def keep(row: dict[str, Any]) -> None:
        """Write what there is so far: a run that is cut short has brought something."""
        result["rows"].append(row)
        result["card_GiB_in_use"] = round(in_use_gib(), 2)
        if args.output:
            args.output.write_text(json.dumps(result, indent=2) + "\n")

    rows(
        load, named, read_architecture(Path(config.model.path)), set(args.rows.split(",")), bandwidth, widths,
        [int(batch) for batch in args.batches.split(",")], [int(batch) for batch in args.sampling_batches.split(",")],
        peer, args.rounds, keep,
    )  # fmt: skip
    print(f"{named}: {in_use_gib():.2f} GiB of the card in use", flush=True)


if __name__ == "__main__":
    main()
