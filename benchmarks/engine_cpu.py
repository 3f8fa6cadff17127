"""SmolLM2 on the CPU: output tokens per second at concurrency 1, 8 and 32, beside two peers in the same run.

    python benchmarks/engine_cpu.py MODEL.gguf [--dtypes bfloat16,float32] [--vllm-python V/bin/python]
                                    [--no-transformers] [--output results/engine_cpu.json]

Prompts of 128 random token ids, 128 tokens out, greedy. "ours" is the runner driven directly: every round prefills its
requests within the engine's token budget of a step, then decodes them together (no HTTP). `transformers.generate` takes
prompts one by one, with the same number of threads. vLLM (vllm_cpu.py tells how to install it) takes the same rounds
through `LLM.generate`, twice: with its default binding, which leaves one core to its other processes, and with
every core (`VLLM_CPU_OMP_THREADS_BIND`) if --vllm-all-cores. Ratios are ours over the peer's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import tempfile
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
ROUNDS = {1: 2, 8: 8, 32: 32}
"""Concurrency: how many requests."""
VOCAB = 49_000


def make_runner(model: str, dtype: str) -> ModelRunner:
    return ModelRunner(
        EngineConfig(
            model=ModelConfig(path=model, dtype=dtype, max_model_len=512),
            cache=CacheConfig(num_blocks=max(ROUNDS) * BLOCKS_PER_REQUEST),
            scheduler=SchedulerConfig(max_num_seqs=max(ROUNDS)),
            device="cpu",
        )
    )


def make_prompts(count: int, vocab: int = VOCAB) -> list[list[int]]:
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


def ours(model: str, dtype: str) -> dict[str, Any]:
    started = time.perf_counter()
    runner = make_runner(model, dtype)
    load_s = time.perf_counter() - started
    budget = batched_tokens(EngineConfig(model=ModelConfig(path=model)), torch.device("cpu"))
    results: list[dict[str, float]] = []
    for concurrency, num_prompts in ROUNDS.items():
        prompts = make_prompts(num_prompts)
        started, made = time.perf_counter(), 0
        for first in range(0, num_prompts, concurrency):
            made += sum(map(len, round_of(runner, prompts[first : first + concurrency], budget)))
        speed = made / (time.perf_counter() - started)
        results.append({"concurrency": concurrency, "requests": num_prompts, "tokens_per_s": round(speed, 1)})
    return {"load_s": round(load_s, 1), "results": results}


def transformers_peer(net: Any, dtype: str, num_prompts: int = 2) -> dict[str, Any]:
    import transformers

    net = net.to(getattr(torch, dtype))
    started = time.perf_counter()
    for prompt in make_prompts(num_prompts):
        ids = torch.tensor([prompt])
        net.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=LENGTH_OUT, min_new_tokens=LENGTH_OUT, pad_token_id=0,
        )  # fmt: skip
    speed = num_prompts * LENGTH_OUT / (time.perf_counter() - started)
    results = [{"concurrency": 1, "requests": num_prompts, "tokens_per_s": round(speed, 1)}]
    return {"version": transformers.__version__, "results": results}


def vllm_peer(python: str, checkpoint: Path, dtype: str, *, all_cores: bool = False) -> dict[str, Any]:
    rounds = {concurrency: make_prompts(count) for concurrency, count in ROUNDS.items()}
    prompts = checkpoint / "prompts.json"
    prompts.write_text(json.dumps(rounds))
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    if all_cores:
        cores = sorted(os.sched_getaffinity(0))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    # -P: the folder of this file must not be searched for modules, it has a kernels.py
    command = [python, "-P", str(Path(__file__).with_name("vllm_cpu.py")), str(checkpoint), dtype, str(prompts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"vLLM said nothing:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def load_net(model: str) -> Any:
    import transformers

    path = Path(model)
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def save_checkpoint(net: Any, folder: Path) -> None:
    """The GGUF's weights as a checkpoint in Hugging Face form, in bfloat16 like the original."""
    import transformers

    config = {key: value for key, value in net.config.to_dict().items() if key != "quantization_config"}
    plain: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    plain.load_state_dict(net.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)


def ratios(mine: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """By concurrency."""
    theirs = {entry["concurrency"]: entry["tokens_per_s"] for entry in peer["results"]}
    return {
        str(entry["concurrency"]): round(entry["tokens_per_s"] / theirs[entry["concurrency"]], 2)
        for entry in mine["results"]
        if entry["concurrency"] in theirs
    }


def measure(args: argparse.Namespace, result: dict[str, Any]) -> None:
    net = None if args.no_transformers and not args.vllm_python else load_net(args.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.checkpoint or Path(temporary)
        if args.vllm_python and not (folder / "config.json").exists():
            save_checkpoint(net, folder)
        for dtype in args.dtypes.split(","):
            one: dict[str, Any] = {"ours": ours(args.model, dtype)}
            result[dtype] = one
            print(json.dumps({dtype: one}), flush=True)
            if not args.no_transformers:
                one["transformers"] = transformers_peer(net, dtype)
            if args.vllm_python:
                one["vllm"] = vllm_peer(args.vllm_python, folder, dtype)
                if args.vllm_all_cores:
                    one["vllm_all_cores"] = vllm_peer(args.vllm_python, folder, dtype, all_cores=True)
            one["ratios"] = {name: ratios(one["ours"], peer) for name, peer in one.items() if name != "ours"}
            print(json.dumps({dtype: one}), flush=True)
            if args.output:
                args.output.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--vllm-python", help="the interpreter of an environment with vllm-cpu")
    parser.add_argument("--checkpoint", type=Path, help="where to keep vLLM's: it finds what it compiled by the path")
    parser.add_argument("--vllm-all-cores", action="store_true", help="vLLM once more, bound to every core")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    result: dict[str, Any] = {
        "cpu": cpu.partition(": ")[2] or platform.machine(), "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2), "torch": torch.__version__,
    }  # fmt: skip
    measure(args, result)


if __name__ == "__main__":
    main()
