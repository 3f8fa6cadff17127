"""SmolLM2 on the CPU: output tokens per second at concurrency 1, 8 and 32, beside two peers in the same run.

    python benchmarks/engine_cpu.py MODEL.gguf [--dtypes bfloat16,float32] [--modes ours,vllm,…]
        [--vllm-python V/bin/python] [--output results/engine_cpu.json]

Prompts of 128 random token ids, 128 tokens out, greedy. "ours" is `LLM.generate`: scheduler, core process and all but
HTTP; "runner" is the runner driven directly, a round's prompts prefilled within the token budget of a step, then
decoded together; "plain" is that with PyTorch's operations instead of compiled kernels. `transformers.generate` takes
prompts one by one. vLLM (vllm_cpu.py tells how to install it) takes the same rounds through `LLM.generate`: "vllm" with
its default binding, which leaves one core to its other processes, "vllm_all_cores" with every core
(`VLLM_CPU_OMP_THREADS_BIND`). Each is a process of its own, one after the other. Ratios are ours over the other's.

The floor is what the machine allows: all weights read once a step at the best rate of reading much memory, or all
products at the best rate of large ones (PyTorch's or the compiled kernels'), whichever takes longer, and the prompts'
products. An output file keeps what it has of other dtypes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mainsail_engine
from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.llm import TokensPrompt
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner.model_runner import ModelRunner, batched_tokens
from mainsail_engine.step import Chunk, StepPlan
from mainsail_kernels.cpu import decoder

LENGTH_IN = LENGTH_OUT = 128
BLOCKS_PER_REQUEST = (LENGTH_IN + LENGTH_OUT) // 16 + 1
ROUNDS = {1: 2, 8: 8, 32: 32}
"""Concurrency: how many requests."""
VOCAB = 49_000
MODES = {"ours": {}, "runner": {}, "plain": {"MAINSAIL_CPU_KERNELS": "0"}, "floor": {}, "transformers": {}}
"""What a process of ours measures, and its environment."""
ALL = (*MODES, "vllm", "vllm_all_cores")


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
    numbers = random.Random(count)
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


def rounds_of(answer: Callable[[list[list[int]]], int]) -> list[dict[str, float]]:
    """answer takes prompts at once and tells how many tokens it made."""
    results: list[dict[str, float]] = []
    for concurrency, num_prompts in ROUNDS.items():
        prompts = make_prompts(num_prompts)
        started, made = time.perf_counter(), 0
        for first in range(0, num_prompts, concurrency):
            made += answer(prompts[first : first + concurrency])
        speed = made / (time.perf_counter() - started)
        results.append({"concurrency": concurrency, "requests": num_prompts, "tokens_per_s": round(speed, 1)})
    return results


def runner_alone(model: str, dtype: str) -> dict[str, Any]:
    started = time.perf_counter()
    runner = make_runner(model, dtype)
    load_s = time.perf_counter() - started
    budget = batched_tokens(EngineConfig(model=ModelConfig(path=model)), torch.device("cpu"))
    results = rounds_of(lambda prompts: sum(map(len, round_of(runner, prompts, budget))))
    return {"load_s": round(load_s, 1), "results": results}


def whole_engine(model: str, dtype: str) -> dict[str, Any]:
    started = time.perf_counter()
    with mainsail_engine.LLM(
        model=model, dtype=dtype, device="cpu", max_model_len=512, max_num_seqs=max(ROUNDS), enable_prefix_caching=False
    ) as llm:
        load_s = time.perf_counter() - started
        params = mainsail_engine.SamplingParams(temperature=0.0, max_tokens=LENGTH_OUT, ignore_eos=True)

        def answer(prompts: list[list[int]]) -> int:
            some = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
            return sum(len(out.outputs[0].token_ids) for out in llm.generate(some, params, use_tqdm=False))

        results = rounds_of(answer)
    return {"load_s": round(load_s, 1), "results": results}


def best_s(work: Callable[[], object], times: int) -> float:
    taken: list[float] = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def floor(model: str, dtype: str) -> dict[str, Any]:
    """Tokens a second that no engine passes here: see the head of this file."""
    kind, a = getattr(torch, dtype), read_architecture(Path(model))
    much, x, weight = torch.ones(1 << 27), torch.ones(2048, 4096, dtype=kind), torch.ones(16384, 4096, dtype=kind)
    reads: list[tuple[int, Callable[[], object]]] = [(much.nbytes, much.sum)]
    products: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(x, weight)]
    if (panels := decoder.pack(weight)) is not None:
        reads.append((weight.nbytes, lambda: decoder.linear(x[:1], panels)))
        products.append(lambda: decoder.linear(x, panels))
    bytes_per_s = max(num_bytes / best_s(read, 30) for num_bytes, read in reads)
    flops_per_s = 2 * x.shape[0] * weight.numel() / min(best_s(product, 5) for product in products)
    heads = (2 * a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    layers = a.num_layers * a.hidden_size * (heads + 3 * a.intermediate_size)
    head = a.vocab_size * a.hidden_size
    results: list[dict[str, float]] = []
    for rows in ROUNDS:
        step_s = max((layers + head) * kind.itemsize / bytes_per_s, 2 * (layers + head) * rows / flops_per_s)
        prompts_s = rows * 2 * (layers * LENGTH_IN + head) / flops_per_s
        speed = rows * LENGTH_OUT / (prompts_s + (LENGTH_OUT - 1) * step_s)
        results.append({"concurrency": rows, "step_ms": round(1e3 * step_s, 2), "tokens_per_s": round(speed, 1)})
    rates = {"read_gb_per_s": round(bytes_per_s / 1e9, 1), "products_gflop_per_s": round(flops_per_s / 1e9)}
    return {**rates, "results": results}


def result_of(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"{command} said nothing:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def transformers_peer(model: str, dtype: str, num_prompts: int = 2) -> dict[str, Any]:
    import transformers

    net = load_net(model).to(getattr(torch, dtype))
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


MEASURES = {
    "ours": whole_engine, "runner": runner_alone, "plain": runner_alone, "floor": floor,
    "transformers": transformers_peer,
}  # fmt: skip


def in_a_process(mode: str, model: str, dtype: str) -> dict[str, Any]:
    command = [sys.executable, __file__, model, "--mode", mode, "--dtypes", dtype]
    return result_of(command, {**os.environ, **MODES[mode]})


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
    return result_of(command, environment)


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
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.checkpoint or Path(temporary)
        saved = (folder / "config.json").exists() or not args.vllm_python
        if not saved:
            save_checkpoint(load_net(args.model), folder)
        for dtype in args.dtypes.split(","):
            one: dict[str, Any] = {"load_average": round(os.getloadavg()[0], 2)}
            result[dtype] = one
            modes = [mode for mode in args.modes.split(",") if mode in MODES or args.vllm_python]
            for mode in modes:
                if mode in MODES:
                    one[mode] = in_a_process(mode, args.model, dtype)
                else:
                    one[mode] = vllm_peer(args.vllm_python, folder, dtype, all_cores=mode == "vllm_all_cores")
                print(json.dumps({mode: one[mode]}), flush=True)
                others = [other for other in modes if other in one and other != "ours"]
                one["ratios"] = {other: ratios(one["ours"], one[other]) for other in others if "ours" in one}
                if args.output:
                    args.output.write_text(json.dumps(result, indent=2) + "\n")
            print(json.dumps({dtype: one["ratios"]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--vllm-python", help="the interpreter of an environment with vllm-cpu")
    parser.add_argument("--checkpoint", type=Path, help="where to keep vLLM's: it finds what it compiled by the path")
    parser.add_argument("--modes", default="ours,vllm,floor,transformers,runner", help=f"of {', '.join(ALL)}")
    parser.add_argument("--mode", choices=MODES, help="only this, of one dtype, printed for the process that asks")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if unknown := set(args.modes.split(",")) - set(ALL):
        parser.error(f"--modes: there is no {', '.join(sorted(unknown))}")
    if args.mode:
        print("RESULT " + json.dumps(MEASURES[args.mode](args.model, args.dtypes)))
        return
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    result |= {
        "cpu": cpu.partition(": ")[2] or platform.machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip
    result.pop("load_average", None)
    measure(args, result)


if __name__ == "__main__":
    main()
