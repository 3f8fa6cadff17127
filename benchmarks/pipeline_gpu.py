"""Pipeline stages on the GPUs of one host: the same tokens as on one, and what a token takes beside one GPU.

    python benchmarks/pipeline_gpu.py [--stages 2] [--model llama-3-8b] [--output FILE]

Tokens: a small model with random float32 weights, greedy, on one GPU and in stages, with CUDA graphs. Rates: dummy
weights, bf16, context 1k: the time between two tokens of a request when so many decode, and tokens a second. One node:
what crosses between the stages goes over NVLink or PCIe, not over a network. Every measurement runs in processes of its
own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engine_gpu import MODELS, Load
from tensor_parallel_gpu import answers, child_of, make_tiny

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.core import build
from mainsail_engine.request import SamplingParams

BATCHES = (2, 16, 64, 256)
WINDOW = 40
"""Tokens of each request that are timed."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def child(task: str, *arguments: str) -> Any:
    return child_of(__file__, task, *arguments)


def tokens(folder: Path, stages: int) -> list[list[int]]:
    """Greedy and drawn answers to 16 prompts, long ones among them."""
    config = EngineConfig(
        model=ModelConfig(path=str(folder), dtype="float32", max_model_len=512), cache=CacheConfig(num_blocks=512),
        scheduler=SchedulerConfig(max_num_seqs=16), pipeline_parallel_size=stages, device=DEVICE,
    )  # fmt: skip
    params = [
        SamplingParams(max_tokens=64, temperature=float(index % 2), seed=index, ignore_eos=True) for index in range(16)
    ]
    return answers(config, params)


def rates(model: str, stages: int) -> dict[str, Any]:
    config = EngineConfig(
        model=ModelConfig(path=str(MODELS / model), load_format="dummy", max_model_len=4096),
        cache=CacheConfig(enable_prefix_caching=False), scheduler=SchedulerConfig(max_num_seqs=256),
        pipeline_parallel_size=stages, device=DEVICE,
    )  # fmt: skip
    started = time.perf_counter()
    core, ready = build(config)
    start_s = time.perf_counter() - started
    load = Load(core, ready.vocab_size)
    load.add(1000, 8)
    load.drain()
    return {"start_s": start_s, "num_blocks": ready.num_blocks, "ms": {n: token_ms(load, n) for n in BATCHES}}


def token_ms(load: Load, batch: int) -> float:
    """Mean time between two tokens of a request while `batch` of them decode."""
    for _ in range(batch):
        load.add(1000, 3 * WINDOW)
    begun: set[str] = set()
    counted, started = 0, 0.0
    while counted < WINDOW * batch:
        outputs = load.core.step(time.monotonic())
        for output in outputs.outputs if outputs else ():
            counted += len(output.token_ids) if len(begun) == batch else 0
            begun.add(output.request_id)
        if len(begun) < batch or not started:
            started = time.perf_counter()
    elapsed = time.perf_counter() - started
    load.drain()
    return elapsed * batch / counted * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--task", choices=("tokens", "rates"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        found = tokens(args.folder, args.stages) if args.task == "tokens" else rates(args.model, args.stages)
        print(json.dumps(found), flush=True)
        return
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    result: dict[str, Any] = {"card": card, "stages": args.stages, "torch": torch.__version__, "model": args.model}
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(Path(folder))
        alone, staged = (child("tokens", "--folder", folder, "--stages", str(n)) for n in (1, args.stages))
    same = sum(a == b for a, b in zip(alone, staged, strict=True))
    result["same_answers"] = f"{same} of {len(alone)}"
    print(f"answers of 64 tokens that are the same on 1 GPU and in {args.stages} stages: {same} of {len(alone)}")
    one, many = (child("rates", "--model", args.model, "--stages", str(n)) for n in (1, args.stages))
    result |= {"start_s": [one["start_s"], many["start_s"]], "num_blocks": [one["num_blocks"], many["num_blocks"]]}
    result["token_ms"] = {n: [one["ms"][str(n)], many["ms"][str(n)]] for n in BATCHES}
    for batch, (ms, staged_ms) in result["token_ms"].items():
        print(
            f"{batch:4} decodes: a token every {ms:6.2f} ms on 1 GPU, {staged_ms:6.2f} in {args.stages} stages; "
            f"{batch / ms * 1e3:8,.0f} and {batch / staged_ms * 1e3:8,.0f} tokens/s",
            flush=True,
        )
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
