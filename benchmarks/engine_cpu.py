"""SmolLM2 on the CPU: output tokens per second at concurrency 1, 8 and 32, beside transformers in the same run.

    python benchmarks/engine_cpu.py MODEL.gguf [--dtype float32] [--no-transformers] [--output results/engine_cpu.json]

Prompts of 128 random token ids, 128 tokens out, greedy. "ours" is the runner driven directly: every round prefills its
requests within the engine's token budget of a step, then decodes them together (no HTTP). `transformers.generate` takes
the same prompts one by one, with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner.model_runner import ModelRunner, batched_tokens
from mainsail_engine.step import Chunk, StepPlan

LENGTH_IN = LENGTH_OUT = 128
BLOCKS_PER_REQUEST = (LENGTH_IN + LENGTH_OUT) // 16 + 1
CONCURRENCIES = (1, 8, 32)


def make_runner(model: str, dtype: str) -> ModelRunner:
    return ModelRunner(
        EngineConfig(
            model=ModelConfig(path=model, dtype=dtype, max_model_len=512),
            cache=CacheConfig(num_blocks=max(CONCURRENCIES) * BLOCKS_PER_REQUEST),
            scheduler=SchedulerConfig(max_num_seqs=max(CONCURRENCIES)),
            device="cpu",
        )
    )


def make_prompts(count: int, vocab: int) -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(3, vocab) for _ in range(LENGTH_IN)] for _ in range(count)]


def step(runner: ModelRunner, chunks: list[Chunk], num_decodes: int) -> None:
    tokens = runner.launch(StepPlan(chunks=chunks, num_decodes=num_decodes)).result().token_ids
    for chunk, token in zip(chunks, tokens, strict=True):
        chunk.request.output_token_ids.append(token)


def round_of(runner: ModelRunner, prompts: list[list[int]], budget: int) -> list[list[int]]:
    """Answer these prompts together: prefill as many a step as the budget takes, then decode all."""
    params = SamplingParams(max_tokens=LENGTH_OUT, temperature=0.0, ignore_eos=True)
    requests = [
        Request(str(i), prompt, params, 0.0, slot=i,
                block_ids=list(range(i * BLOCKS_PER_REQUEST, (i + 1) * BLOCKS_PER_REQUEST)))
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    at_once = max(1, budget // LENGTH_IN)
    for first in range(0, len(requests), at_once):
        some = requests[first : first + at_once]
        step(runner, [Chunk(r, 0, LENGTH_IN, True, r.slot, r.block_ids) for r in some], 0)
    for position in range(LENGTH_IN, LENGTH_IN + LENGTH_OUT - 1):
        step(runner, [Chunk(r, position, 1, True, r.slot, r.block_ids) for r in requests], len(requests))
    return [request.output_token_ids for request in requests]


def ours(runner: ModelRunner, concurrency: int, budget: int, num_prompts: int) -> dict[str, float]:
    prompts = make_prompts(num_prompts, runner.vocab_size)
    started = time.perf_counter()
    made = 0
    for first in range(0, num_prompts, concurrency):
        made += sum(map(len, round_of(runner, prompts[first : first + concurrency], budget)))
    elapsed = time.perf_counter() - started
    return {"concurrency": concurrency, "requests": num_prompts, "tokens_per_s": round(made / elapsed, 1)}


def peer(model: str, num_prompts: int) -> dict[str, Any]:
    import transformers

    path = Path(model)
    started = time.perf_counter()
    net = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    load_s = time.perf_counter() - started
    prompts = make_prompts(num_prompts, net.config.vocab_size)
    started = time.perf_counter()
    for prompt in prompts:
        ids = torch.tensor([prompt])
        net.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=LENGTH_OUT, min_new_tokens=LENGTH_OUT, pad_token_id=0,
        )  # fmt: skip
    elapsed = time.perf_counter() - started
    return {
        "version": transformers.__version__, "dtype": "float32", "requests": num_prompts,
        "load_s": round(load_s, 1), "tokens_per_s": round(num_prompts * LENGTH_OUT / elapsed, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    runner = make_runner(args.model, args.dtype)
    load_s = time.perf_counter() - started
    result: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__, "dtype": args.dtype, "load_s": round(load_s, 1),
    }  # fmt: skip
    budget = batched_tokens(EngineConfig(model=ModelConfig(path=args.model)), torch.device("cpu"))
    result["ours"] = [ours(runner, c, budget, {1: 2, 8: 8, 32: 32}[c]) for c in CONCURRENCIES]
    if not args.no_transformers:
        result["transformers"] = peer(args.model, 2)
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
