"""Tensor parallelism on the GPUs of one host: the same tokens as on one, decode steps beside one GPU's, and the sums.

    python benchmarks/tensor_parallel_gpu.py [--size 2] [--model llama-3-8b] [--output FILE]

Three tables. Tokens: a small model with random float32 weights, greedy, on one GPU and on `size`. Sums: one all-reduce
of a decode step's hidden states in a CUDA graph, ours (one-shot over symmetric memory, or NCCL where it is larger) and
NCCL alone. Steps: dummy weights, bf16, context 1k, beside the floor (bytes of weights and KV over the copy bandwidth of
all GPUs together). Every measurement runs in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_gpu import MODELS, Load, Widths, decode_step_ms, measured_bandwidth, step_bytes

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.core import build
from mainsail_engine.model.architecture import read_architecture
from mainsail_engine.protocol import Add
from mainsail_engine.request import SamplingParams
from mainsail_engine.runner.distributed import join, listen

BATCHES = (1, 8, 32, 128)
SUM_ROWS = (1, 8, 32, 128, 512)
HIDDEN = 4096
TINY = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "dtype": "float32", "eos_token_id": 2,
}  # fmt: skip


def child_of(script: str, task: str, *arguments: str) -> Any:
    """What a script prints last when it is called for one task."""
    done = subprocess.run([sys.executable, script, "--task", task, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{task} {' '.join(arguments)} failed with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def child(task: str, *arguments: str) -> Any:
    return child_of(__file__, task, *arguments)


def make_tiny(folder: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    wide, kv = 8 * 64, 4 * 64

    def matrix(out: int, inputs: int) -> torch.Tensor:
        return torch.randn(out, inputs) * inputs**-0.5

    tensors = {"model.embed_tokens.weight": matrix(1024, 256), "model.norm.weight": torch.ones(256)}
    tensors["lm_head.weight"] = matrix(1024, 256) * 4
    for layer in range(4):
        at = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (wide, 256), "self_attn.k_proj": (kv, 256), "self_attn.v_proj": (kv, 256),
            "self_attn.o_proj": (256, wide), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256),
            "mlp.down_proj": (256, 512),
        }  # fmt: skip
        tensors |= {f"{at}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {f"{at}.{name}_layernorm.weight": torch.ones(256) for name in ("input", "post_attention")}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY))


def tokens(folder: Path, size: int) -> list[list[int]]:
    config = EngineConfig(
        model=ModelConfig(path=str(folder), dtype="float32", max_model_len=512),
        cache=CacheConfig(num_blocks=512), scheduler=SchedulerConfig(max_num_seqs=16),
        tensor_parallel_size=size, device="cuda",
    )  # fmt: skip
    return answers(config, [SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)] * 16)


def answers(config: EngineConfig, params: Sequence[SamplingParams]) -> list[list[int]]:
    """Token ids by such an engine, one answer for each of params, to prompts of growing length."""
    core, _ = build(config)
    found: dict[str, list[int]] = {}
    for index, each in enumerate(params):
        prompt = [(7 * index + 3 * i) % 1000 + 3 for i in range(20 + 17 * index)]
        core.handle(Add(f"{index:02}", prompt, each), 0.0)
        found[f"{index:02}"] = []
    while core.has_work:
        outputs = core.step(time.monotonic())
        for output in outputs.outputs if outputs else ():
            found[output.request_id] += output.token_ids
    return [found[key] for key in sorted(found)]


def steps(model: str, size: int) -> dict[str, Any]:
    config = EngineConfig(
        model=ModelConfig(path=str(MODELS / model), load_format="dummy", max_model_len=4096),
        cache=CacheConfig(enable_prefix_caching=False), scheduler=SchedulerConfig(max_num_seqs=128),
        tensor_parallel_size=size, device="cuda",
    )  # fmt: skip
    started = time.perf_counter()
    core, ready = build(config)
    start_s = time.perf_counter() - started
    load = Load(core, ready.vocab_size)
    load.add(1000, 8)
    load.drain()
    return {"start_s": start_s, "num_blocks": ready.num_blocks, "ms": {n: decode_step_ms(load, n) for n in BATCHES}}


def graph_us(run: Any, x: torch.Tensor, repeats: int = 50) -> float:
    """Microseconds of one `run(x)` inside a CUDA graph of many."""
    run(x.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run(x)
    times: list[float] = []
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / repeats)
    return sorted(times)[len(times) // 2]


def sums(rank: int, size: int, port: int) -> list[dict[str, Any]]:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    parallel = join(rank, size, device, port if rank else listen_here(size))
    table: list[dict[str, Any]] = []
    for rows in SUM_ROWS:
        x = torch.randn(rows, HIDDEN, device=device, dtype=torch.bfloat16)
        apart = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(apart, x)
        truth = torch.stack(apart).double().sum(0)
        error = float((parallel.sum(x.clone()).double() - truth).norm() / truth.norm())
        ours = graph_us(parallel.sum, x)
        plain = graph_us(dist.all_reduce, x * 0)
        table.append(
            {"rows": rows, "ours_us": ours, "nccl_us": plain, "error": error, "shared": bool(parallel._shared)}
        )
    return table


def listen_here(size: int) -> Any:
    """Rank 0 keeps the store, and starts the others with its port."""
    store = listen(size)
    for rank in range(1, size):
        subprocess.Popen(
            [sys.executable, __file__, "--task", "sums", "--rank", str(rank), "--size", str(size),
             "--port", str(store.port)], stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return store


def one_task(args: argparse.Namespace) -> None:
    if args.task == "tokens":
        found: Any = tokens(args.folder, args.size)
    elif args.task == "steps":
        found = steps(args.model, args.size)
    elif args.task == "sums":
        found = sums(args.rank, args.size, args.port)
    else:
        found = measured_bandwidth()
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--task", choices=("tokens", "steps", "sums", "bandwidth"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        one_task(args)
        return
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(), "gpus": args.size, "torch": torch.__version__, "model": args.model,
        "command": " ".join(sys.argv),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(Path(folder))
        alone, together = (child("tokens", "--folder", folder, "--size", str(n)) for n in (1, args.size))
    same = sum(a == b for a, b in zip(alone, together, strict=True))
    result["same_answers"] = f"{same} of {len(alone)}"
    print(
        f"greedy answers of 64 tokens that are the same on 1 and {args.size} GPUs: {same} of {len(alone)}", flush=True
    )
    result["sums"] = child("sums", "--size", str(args.size))
    for row in result["sums"]:
        print(f"sum of {row['rows']:4} x {HIDDEN}: {row['ours_us']:7.1f} us, NCCL {row['nccl_us']:7.1f} us", flush=True)
    bandwidth = child("bandwidth")
    result["copy_GB_per_s"] = round(bandwidth / 1e9)
    one, many = (child("steps", "--model", args.model, "--size", str(n)) for n in (1, args.size))
    architecture = read_architecture(MODELS / args.model)
    result["start_s"] = [one["start_s"], many["start_s"]]
    result["steps"] = []
    for batch in BATCHES:
        floor = step_bytes(architecture, batch, 1024, Widths(2.0, 2.0, 2.0)) / bandwidth * 1e3
        row = {
            "batch": batch,
            "one_ms": one["ms"][str(batch)],
            "ms": many["ms"][str(batch)],
            "floor_ms": floor / args.size,
        }
        result["steps"].append(row)
        print(
            f"step, batch {batch:4}: 1 GPU {row['one_ms']:6.2f} ms ({row['one_ms'] / floor:.2f} x floor), "
            f"{args.size} GPUs {row['ms']:6.2f} ms ({row['ms'] / row['floor_ms']:.2f} x floor), "
            f"{row['one_ms'] / row['ms']:.2f} x faster",
            flush=True,
        )
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
