"""Decode steps of Llama-3-8B with LoRA adapters on one GPU: none, one, many mixed in a batch; beside an engine without.

    python benchmarks/lora_gpu.py [--batches 1,32,128] [--adapters 0,1,8,32] [--rank 16] [--output FILE]

Real shapes, dummy weights, bf16, greedy, a context of 1,024, rows of a batch taking adapters in turn; every adapter
changes every matrix of every layer. In one process: first the engine without --enable-lora (`plain`), then one with a
slot for each adapter. The floor is the plain step and the bytes of the adapters in use at the card's copy rate. A last
row per setting, `graphs off`, launches the same steps kernel by kernel and says whether its tokens are the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from engine_gpu import MODELS, Load, measured_bandwidth
from safetensors.torch import save_file

from mainsail_engine.config import CacheConfig, EngineConfig, LoraConfig, ModelConfig, SchedulerConfig
from mainsail_engine.core import build
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.model.lora import module_shapes
from mainsail_engine.model.parallel import SINGLE
from mainsail_engine.protocol import Add
from mainsail_engine.request import SamplingParams

CONTEXT, STEPS = 992, 48
REPEATS = 2


@dataclass(frozen=True)
class Setting:
    batch: int
    adapters: int


def save_adapter(folder: Path, a: Architecture, rank: int) -> int:
    """A random adapter of every matrix, as PEFT writes it: its bytes."""
    shapes = module_shapes(a, SINGLE)
    tensors = {
        f"base_model.model.model.layers.{layer}.{module}.lora_{name}.weight":
            torch.randn(size, dtype=torch.bfloat16) * 0.02
        for layer in range(a.num_layers) for module, shape in shapes.items()
        for name, size in (("A", (rank, shape.inputs)), ("B", (shape.outputs, rank)))
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return sum(tensor.nbytes for tensor in tensors.values())


class Bench:
    """One engine, and batches that decode together on it."""

    def __init__(self, config: EngineConfig) -> None:
        started = time.perf_counter()
        self.core, ready = build(config)
        self.start_s = time.perf_counter() - started
        self._load = Load(self.core, ready.vocab_size)

    def step(self, setting: Setting) -> tuple[float, list[list[int]]]:
        """(milliseconds of a step, the tokens of each request)."""
        core, tokens = self.core, dict[str, list[int]]()
        self._load.numbers.seed(1)  # the same prompts each time
        for index in range(setting.batch):
            self._load.count += 1
            prompt = [self._load.numbers.randrange(self._load.vocab) for _ in range(CONTEXT)]
            params = SamplingParams(max_tokens=STEPS + 40, temperature=0.0, ignore_eos=True)
            adapter = f"a{index % setting.adapters}" if setting.adapters else ""
            name = str(self._load.count)
            tokens[name] = []
            core.handle(Add(name, prompt, params, adapter=adapter), time.monotonic())

        def run() -> int:
            outputs = core.step(time.monotonic())
            for output in outputs.outputs if outputs else ():
                if output.error:
                    raise SystemExit(output.error)
                tokens[output.request_id] += output.token_ids
            return len(outputs.outputs) if outputs else 0

        whole = 0
        while whole < 6:
            whole += run() == setting.batch
        started = time.perf_counter()
        for _ in range(STEPS):
            run()
        elapsed = time.perf_counter() - started
        while core.has_work:
            run()
        return elapsed / STEPS * 1e3, list(tokens.values())


def measure(config: EngineConfig, settings: list[Setting]) -> tuple[dict[Setting, float], dict[Setting, Any], float]:
    """(milliseconds, tokens, seconds of the start) of an engine that is gone afterwards."""
    bench = Bench(config)
    bench.step(settings[0])
    times, tokens = dict[Setting, float](), dict[Setting, Any]()
    for setting in settings:
        runs = [bench.step(setting) for _ in range(REPEATS)]
        times[setting], tokens[setting] = min(ms for ms, _ in runs), runs[0][1]
        kind = f"graphs {config.cuda_graphs}, adapters' slots {config.lora is not None}"
        print(f"    {kind}: {setting} {times[setting]:.2f} ms", flush=True)
    start_s = bench.start_s
    del bench
    gc.collect()
    torch.cuda.empty_cache()
    return times, tokens, start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--batches", default="1,32,128")
    parser.add_argument("--adapters", default="0,1,8,32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--no-eager", action="store_true", help="leave the rows without graphs out")
    parser.add_argument("--commit", default=os.environ.get("COMMIT", ""), help="noted with the results")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    batches, counts = ([int(n) for n in text.split(",")] for text in (args.batches, args.adapters))
    settings = [Setting(batch, count) for batch in batches for count in counts if count <= batch]
    bandwidth, model = measured_bandwidth(), MODELS / args.model
    torch.cuda.empty_cache()
    folder = Path(tempfile.mkdtemp())
    num_bytes = save_adapter(folder, read_architecture(model), args.rank)
    plain = EngineConfig(
        model=ModelConfig(path=str(model), load_format="dummy", max_model_len=2048),
        cache=CacheConfig(enable_prefix_caching=False, num_blocks=max(batches) * 72),
        scheduler=SchedulerConfig(max_num_seqs=max(batches), max_inter_token_latency_ms=0),
        device="cuda",
    )
    most = max(*counts, 1)
    modules = tuple((f"a{index}", str(folder)) for index in range(most))
    lora = msgspec.structs.replace(plain, lora=LoraConfig(max_loras=most, max_lora_rank=args.rank, modules=modules))
    floors, _, plain_start = measure(plain, [Setting(batch, 0) for batch in batches])
    times, tokens, start_s = measure(lora, settings)
    table: list[dict[str, Any]] = []
    for setting in settings:
        base = floors[replace(setting, adapters=0)]
        floor = base + setting.adapters * num_bytes / bandwidth * 1e3
        row = {"batch": setting.batch, "adapters": setting.adapters, "ms": times[setting], "plain_ms": base}
        table.append(row | {"ratio": times[setting] / base, "floor_ms": floor})
    write(args, bandwidth, plain_start, start_s, table)
    if not args.no_eager:
        off, others, _ = measure(msgspec.structs.replace(lora, cuda_graphs=False), settings)
        for row, setting in zip(table, settings, strict=True):
            row |= {"graphs_off_ms": off[setting], "same_tokens": others[setting] == tokens[setting]}
        write(args, bandwidth, plain_start, start_s, table)
    for row in table:
        print("  ".join(f"{key} {round(value, 2)}" for key, value in row.items()))


def write(
    args: argparse.Namespace, bandwidth: float, plain_s: float, start_s: float, table: list[dict[str, Any]]
) -> None:  # fmt: skip
    if args.output:
        result = {
            "card": torch.cuda.get_device_name(), "torch": torch.__version__, "model": args.model, "rank": args.rank,
            "commit": args.commit, "command": " ".join(["python", *sys.argv]),
            "copy_GB_per_s": round(bandwidth / 1e9), "plain_start_s": round(plain_s, 1), "start_s": round(start_s, 1),
            "rows": table,
        }  # fmt: skip
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
