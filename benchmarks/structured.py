"""What structured output costs: masks by batch size on the CPU, and with a GPU the decode step beside a free one.

    python benchmarks/structured.py                     masks only: fills and acceptances of a step, per batch size
    python benchmarks/structured.py --device cuda       … and decode steps of JSON against free steps, in turn

Masks are filled for JSON in the middle of its text, by xgrammar over a vocabulary of the given size that is made here
(single bytes, and words as tokenizers have them). Steps use real shapes with dummy weights, greedy, prompts of random
token ids; every row is constrained by the same schema, each at a place of its own. A step's ratio is the median over
rounds that alternate between free and JSON. Peer, on an H200: 5.9 times slower steps at batch 256, 3.0 at 64.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import statistics
import string
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mainsail_engine.protocol import Abort, Add
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.structured import bindings
from mainsail_engine.structured import grammar as g
from mainsail_engine.structured.compiler import Compiler
from mainsail_engine.structured.constraint import Constraint
from mainsail_engine.structured.masks import MaskFiller, Row
from mainsail_engine.structured.vocabulary import Vocabulary

MODELS = Path(__file__).parent / "models"
BATCHES = (1, 8, 64, 256)
STOP = 0
TEXT = {"type": "string"}
SCHEMA = {
    "type": "array", "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": TEXT, "quantity": {"type": "integer"}, "unit_price": {"type": "number"},
            "category": {"enum": ["hardware", "software", "service"]}, "tags": {"type": "array", "items": TEXT},
        },
        "required": ["name", "quantity", "unit_price", "category", "tags"],
    },
}  # fmt: skip
GRAMMAR = g.json_schema(SCHEMA, strict=True)


def made_vocabulary(size: int) -> Vocabulary:
    """The stop token, the 256 bytes, punctuation in pairs, and random words with and without a space before them."""
    numbers = random.Random(0)
    marks = [a + b for a in ' "{}[],:' for b in '"{}[],:']
    tokens = [b"", *(bytes([byte]) for byte in range(256)), *(mark.encode() for mark in marks)]
    known = set(tokens)
    while len(tokens) < size:
        word = "".join(numbers.choices(string.ascii_lowercase + "_", k=numbers.randint(2, 9)))
        token = (numbers.choice(["", " "]) + numbers.choice([word, word.title()])).encode()
        if token not in known:
            known.add(token)
            tokens.append(token)
    ids = {token: number for number, token in enumerate(tokens) if token}
    longest = max(map(len, tokens))

    def encode(text: str) -> list[int]:
        """The longest token that fits, over and over."""
        data, found, at = text.encode(), list[int](), 0
        while at < len(data):
            stop = next(end for end in range(min(len(data), at + longest), at, -1) if data[at:end] in ids)
            found.append(ids[data[at:stop]])
            at = stop
        return found

    return Vocabulary(tokens, (STOP,), encode)


def compiled(vocabulary: Vocabulary, *, jump_forward: bool) -> Compiler:
    compiler = Compiler(lambda: vocabulary, jump_forward=jump_forward)
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    compiler.submit(GRAMMAR, answers.put)
    error = answers.get()
    if error is not None:
        raise SystemExit(error)
    return compiler


def in_the_middle(compiler: Compiler, vocabulary: Vocabulary, numbers: random.Random) -> Constraint:
    """A constraint some random tokens into its text."""
    constraint = compiler.constraint(GRAMMAR, jump_forward=False)
    if constraint is None:
        raise SystemExit("the grammar is not in the cache")
    mask = np.zeros((1, bindings.mask_words(len(vocabulary.tokens))), np.int32)
    for _ in range(numbers.randint(5, 60)):
        constraint.matcher.fill_next_token_bitmask(mask, 0, False)
        constraint.accept(int(numbers.choice(bindings.allowed_tokens(mask[0], len(vocabulary.tokens)))))
    return constraint


def median_ms(work: Any, rounds: int = 200) -> float:
    times: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def mask_rows(vocab_size: int, threads: list[int]) -> list[dict[str, Any]]:
    """Milliseconds a step: all masks of a batch; one token accepted by each row."""
    vocabulary = made_vocabulary(vocab_size)
    compiler = compiled(vocabulary, jump_forward=False)
    numbers, table = random.Random(1), list[dict[str, Any]]()
    request = Request("", [0], SamplingParams(max_tokens=1), 0.0)
    for batch in BATCHES:
        constraints = [in_the_middle(compiler, vocabulary, numbers) for _ in range(batch)]
        rows = [Row(index, request, constraint) for index, constraint in enumerate(constraints)]
        masks = np.zeros((batch, bindings.mask_words(vocab_size)), np.int32)
        row: dict[str, Any] = {"vocab": vocab_size, "batch": batch}
        for count in threads:
            filler = MaskFiller(count)
            row[f"fill_ms_{count}_threads"] = median_ms(lambda f=filler, r=rows, m=masks: f.fill(r, m))
        tokens = [int(bindings.allowed_tokens(mask, vocab_size)[0]) for mask in masks]

        def accept(constraints: list[Constraint] = constraints, tokens: list[int] = tokens) -> None:
            for constraint, token in zip(constraints, tokens, strict=True):
                constraint.accept(token)
            for constraint in constraints:
                constraint.matcher.rollback(1)

        row["accept_ms"] = median_ms(accept, 50)
        table.append(row)
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    return table


class Steps:
    """Decode steps of one batch, free or JSON, on one core."""

    def __init__(self, core: Any, vocab_size: int, context: int) -> None:
        self.core, self.vocab_size, self.context = core, vocab_size, context
        self.numbers, self.count = random.Random(0), 0

    def measure(self, batch: int, grammar: g.Grammar | None, steps: int = 24) -> tuple[float, float]:
        """(median milliseconds of a step, tokens a second) once all of the batch decodes."""
        for _ in range(batch):
            self.count += 1
            prompt = [self.numbers.randrange(1, self.vocab_size) for _ in range(self.context)]
            params = SamplingParams(max_tokens=2048, temperature=0.0, ignore_eos=True)
            self.core.handle(Add(str(self.count), prompt, params, grammar=grammar), time.monotonic())
        names = [str(self.count - i) for i in range(batch)]
        started: set[str] = set()
        while len(started) < batch:
            started |= {output.request_id for output in self._step()[1]}
        for _ in range(6):
            self._step()
        times, tokens = list[float](), 0
        began = time.perf_counter()
        for _ in range(steps):
            took, outputs = self._step()
            times.append(took)
            tokens += sum(len(output.token_ids) for output in outputs)
        elapsed = time.perf_counter() - began
        self.core.handle(Abort(names), time.monotonic())
        while self.core.has_work:
            self.core.step(time.monotonic())
        return statistics.median(times) * 1e3, tokens / elapsed

    def _step(self) -> tuple[float, list[Any]]:
        started = time.perf_counter()
        outputs = self.core.step(time.monotonic())
        return time.perf_counter() - started, outputs.outputs if outputs else []


def step_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """JSON against free, by batch size, without and with jump-forward."""
    from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
    from mainsail_engine.core import build

    config = EngineConfig(
        model=ModelConfig(path=str(MODELS / args.model), load_format="dummy", max_model_len=4096),
        cache=CacheConfig(enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=max(args.batches)),
        device=args.device,
        overlap=not args.no_overlap,
    )
    core, ready = build(config)
    vocabulary = made_vocabulary(ready.vocab_size)
    steps = Steps(core, ready.vocab_size, args.context)
    for jump_forward in (False, True):
        core.compiler = compiled(vocabulary, jump_forward=jump_forward)
        for batch in args.batches:
            free, constrained = list[tuple[float, float]](), list[tuple[float, float]]()
            for _ in range(args.rounds):
                free.append(steps.measure(batch, None))
                constrained.append(steps.measure(batch, GRAMMAR))
            free_ms, json_ms = (statistics.median(ms for ms, _ in rounds) for rounds in (free, constrained))
            free_rate, json_rate = (statistics.median(rate for _, rate in rounds) for rounds in (free, constrained))
            row: dict[str, Any] = {"model": args.model, "batch": batch, "jump_forward": jump_forward}
            row |= {"free_ms": free_ms, "json_ms": json_ms, "step_ratio": json_ms / free_ms}
            row |= {"free_tokens_per_s": free_rate, "json_tokens_per_s": json_rate}
            print(
                f"{args.model} batch {batch:3} jump-forward {'on ' if jump_forward else 'off'} free {free_ms:7.2f} ms  "
                f"JSON {json_ms:7.2f} ms  ratio {json_ms / free_ms:5.2f}  "
                f"{free_rate:8.0f} -> {json_rate:8.0f} tokens/s", flush=True,
            )  # fmt: skip
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("none", "cpu", "cuda"), default="none", help="where to measure steps")
    parser.add_argument("--model", default="qwen3-0.6b", help="a folder of benchmarks/models")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vocab", type=int, nargs="*", default=[151_936], help="for the masks; none: no masks")
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--commit", default=os.environ.get("COMMIT", ""), help="noted with the results")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    cpus = len(os.sched_getaffinity(0))
    threads = sorted({1, min(8, max(1, cpus // 2)), min(8, cpus)})
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "commit": args.commit, "cpus": cpus}
    result["masks"] = [row for size in args.vocab for row in mask_rows(size, threads)]
    if args.device == "cuda":
        import torch

        result |= {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["steps"] = list[dict[str, Any]]()
    for row in step_rows(args) if args.device != "none" else ():
        result["steps"].append(row)
        if args.output:
            args.output.write_text(json.dumps(result, indent=2) + "\n")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
