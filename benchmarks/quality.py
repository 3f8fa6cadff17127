"""What quantizing costs in quality: perplexity and agreement on real text, each form against the model as it is.

    python benchmarks/quality.py [--model FILE.gguf or folder] [--tokens 2048] [--output FILE]

The text is English prose that every installation has: the licence files of installed packages, then docstrings of
Python's standard library. Each window of the text is one prompt; the log-probabilities of its tokens come from the
engine's forward pass, in float32 on the CPU, where quantized weights are emulated number for number. Reported are
perplexity, how often the best next token is the same as unquantized, and the mean Kullback-Leibler divergence of the
distributions. The reference is the model as its file has it (for SmolLM2 Q4_1 dequantized: what is quantized again here
has lost something before, which both sides share).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.model.attention import Attention
from mainsail_engine.model.attention_cpu import CpuAttention
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.text.tokenizer import load_tokenizer

MODEL = Path.home() / ".cache/mainsail/models/SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 256
FORMS: dict[str, dict[str, str]] = {
    "as it is, float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "FP8 weights": {"quantization": "fp8"},
    "FP8 KV cache": {"kv_cache_dtype": "fp8"},
    "FP8 weights and KV cache": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
    "INT4 weights": {"quantization": "int4"},
    "GGUF types kept": {"quantization": "gguf"},
}
MODULES = ("argparse", "asyncio", "collections", "datetime", "decimal", "json", "logging", "pathlib", "random", "re")


@dataclass(frozen=True)
class Result:
    form: str
    perplexity: float
    same_best: float
    """Share of positions whose best next token is the reference's."""
    divergence: float
    """Mean Kullback-Leibler divergence from the reference, nats."""
    seconds: float


def text() -> str:
    """Prose that comes with every installation."""
    packages = Path(torch.__file__).parents[1]
    licences = sorted(packages.glob("torch-*/licenses/LICENSE"))[:1]
    docs = [inspect.getdoc(importlib.import_module(name)) or "" for name in MODULES]
    docs += [inspect.getdoc(getattr(argparse, name)) or "" for name in dir(argparse) if name[0].isupper()]
    return "\n\n".join([*(path.read_text()[:6000] for path in licences), *docs])


def runner_of(model: Path, form: dict[str, str]) -> ModelRunner:
    return ModelRunner(
        EngineConfig(
            model=ModelConfig(
                path=str(model), max_model_len=WINDOW, dtype=form.get("dtype", "float32"),
                quantization=form.get("quantization", "auto"),
            ),
            cache=CacheConfig(num_blocks=WINDOW // 16 + 2, dtype=form.get("kv_cache_dtype", "auto")),
            scheduler=SchedulerConfig(max_num_seqs=1),
            device="cpu",
        )
    )  # fmt: skip


@torch.inference_mode()
def distributions(runner: ModelRunner, windows: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities [tokens - 1, vocab_size] float32 of what follows each token of each window."""
    model = cast(Any, runner)._model
    found: list[torch.Tensor] = []
    for tokens in windows:
        n = len(tokens)
        attention: Attention = CpuAttention(
            positions=torch.arange(n), slot_mapping=torch.arange(n),
            block_tables=torch.arange(-(-n // 16), dtype=torch.int32)[None],
            chunk_start=torch.tensor([0, n], dtype=torch.int32), seq_lens=torch.tensor([n], dtype=torch.int32),
            num_decodes=0, max_query_len=n,
        )  # fmt: skip
        hidden = model.forward(torch.tensor(tokens), attention, runner.kv_cache)
        found.append(model.logits(hidden[:-1]).float().log_softmax(-1))
    return found


def compare(
    form: str, ours: list[torch.Tensor], truth: list[torch.Tensor], windows: list[list[int]], seconds: float
) -> Result:
    total, same, divergence, count = 0.0, 0, 0.0, 0
    for mine, theirs, tokens in zip(ours, truth, windows, strict=True):
        total += float(mine.gather(1, torch.tensor(tokens[1:])[:, None]).sum())
        same += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        divergence += float((theirs.exp() * (theirs - mine)).sum())
        count += len(tokens) - 1
    return Result(form, math.exp(-total / count), same / count, divergence / count, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    if tokenizer is None:
        raise SystemExit(f"{args.model} has no tokenizer")
    tokens = tokenizer.encode(text())[: args.tokens]
    windows = [tokens[i : i + WINDOW] for i in range(0, len(tokens) - WINDOW + 1, WINDOW)]
    truth: list[torch.Tensor] = []
    results: list[Result] = []
    for name, form in FORMS.items():
        if form.get("quantization") == "gguf" and args.model.suffix != ".gguf":
            continue
        started = time.perf_counter()
        ours = distributions(runner_of(args.model, form), windows)
        truth = truth or ours
        results.append(compare(name, ours, truth, windows, time.perf_counter() - started))
        r = results[-1]
        print(f"{name:26} perplexity {r.perplexity:8.3f}  same best {r.same_best:7.2%}  "
              f"divergence {r.divergence:.5f}  {r.seconds:5.1f} s", flush=True)  # fmt: skip
    if args.output:
        result = {
            "model": args.model.name, "tokens": sum(map(len, windows)), "window": WINDOW, "torch": torch.__version__,
            "rows": [{"form": r.form, "perplexity": round(r.perplexity, 4), "same_best": round(r.same_best, 4),
                      "divergence": round(r.divergence, 6)} for r in results],
        }  # fmt: skip
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
