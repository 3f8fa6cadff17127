"""Pipeline stages on the GPUs of one host: the same tokens as on one, and what a token takes beside one GPU.

    python benchmarks/pipeline_gpu.py [--stages 2] [--parts tokens,one,rates] [--batches 2,16,64,256] [--output FILE]

Tokens: a small model with random float32 weights, greedy and drawn, on one GPU and in stages, with CUDA graphs. Rates
(`one`: on one GPU): dummy weights, bf16, context 1k: the time between two tokens of a request when so many decode. One
node: what crosses between the stages goes over NVLink or PCIe, not over a network. Every measurement runs in processes
of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from engine_gpu import MODELS, Load
from several_gpus import DEVICE, Results, Task, end_task, make_tiny, tell
from tensor_parallel_gpu import answers

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.core import build
from mainsail_engine.request import SamplingParams

WINDOW = 40
"""Tokens of each request that are timed."""


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


def rates(model: str, stages: int, batches: list[int]) -> None:
    config = EngineConfig(
        model=ModelConfig(path=str(MODELS / model), load_format="dummy", max_model_len=2048),
        cache=CacheConfig(enable_prefix_caching=False, num_blocks=None if DEVICE == "cuda" else 1024),
        scheduler=SchedulerConfig(max_num_seqs=max(batches)), pipeline_parallel_size=stages, device=DEVICE,
    )  # fmt: skip
    started = time.perf_counter()
    core, ready = build(config)
    tell({"stages": stages, "start_s": time.perf_counter() - started, "blocks": ready.num_blocks})
    load = Load(core, ready.vocab_size)
    load.add(1000, 8)
    load.drain()
    for batch in batches:
        ms = token_ms(load, batch)
        tell({"stages": stages, "batch": batch, "token_ms": ms, "tok_per_s": batch / ms * 1e3})


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


def run_tokens(stages: int, results: Results) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(Path(folder))
        tasks = [
            Task(__file__, "tokens", "--folder", folder, "--stages", str(n), "--batches", "1") for n in (1, stages)
        ]
        found = [list(task.rows()) for task in tasks]
    if not all(found):
        results.add({"failed": "tokens", "how": "; ".join(task.trouble for task in tasks)})
        return
    alone, staged = (rows[0]["tokens"] for rows in found)
    same = sum(a == b for a, b in zip(alone, staged, strict=True))
    results.add({"stages": stages, "same_answers_as_one": f"{same} of {len(alone)}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--parts", default="tokens,one,rates")
    parser.add_argument("--batches", default="2,16,64,256")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--task", choices=("tokens", "rates"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    if args.task == "tokens":
        tell({"tokens": tokens(args.folder, args.stages)})
        end_task()
    elif args.task == "rates":
        rates(args.model, args.stages, batches)
        end_task()
    else:
        results = Results(args.output, model=args.model)
        if "tokens" in args.parts:
            run_tokens(args.stages, results)
        for stages in (1,) * ("one" in args.parts) + (args.stages,) * ("rates" in args.parts):
            common: tuple[str, ...] = ("--model", args.model, "--stages", str(stages), "--batches", args.batches)
            results.take(Task(__file__, "rates", *common))


if __name__ == "__main__":
    main()
