"""Speculative decoding by batch size: all guesses right, none right, random text, edited code; beside none at all.

    python benchmarks/speculation.py --device cpu --model MODEL.gguf --batches 1 4 8 --prompt 128 --answer 96
    python benchmarks/speculation.py --device cuda --model benchmarks/models/llama-3-8b --load-format dummy

    all right    guesses are what comes; `fixed`: so many in every step, `adaptive`: as many as the policy finds to pay
    none right   guesses are something else, and the policy believes in them at first
    random text  n-gram guesses for text that does not repeat itself, sampled at temperature 1
    editing      n-gram guesses for answers that repeat the prompt's Python code, in which one line in six is changed
                 and one in twelve is new

What is generated is laid down beforehand: the device computes and samples every step as ever, then the sampled tokens
are replaced (`Dictated`), so that a model of random weights edits code too. A figure is tokens per second between the
moment when the whole batch decodes and the first end of an answer, over the same without speculation, measured before
and after in the same process. Every case is run once before it is measured, by the same policy: it has learnt by then
what steps take, as that of a server has.

`--kernels` shows instead where a step with `--fixed` right guesses spends its time: the device's by kernel, and the
host's between the tokens of a step and the launch of the next, when the device has nothing to do.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SpeculativeConfig
from mainsail_engine.core import EngineCore, pipeline_depth
from mainsail_engine.protocol import Add
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.scheduler import Scheduler
from mainsail_engine.speculative.policy import HitRates
from mainsail_engine.speculative.speculator import Source, Speculator
from mainsail_engine.step import PendingLogits, PendingStep, Runner, StepPlan, StepResult

Answers = Mapping[str, Sequence[int]]
"""By request id."""


class Replay:
    """See speculator.Source: what comes next in known answers, each guess right with some chance, else another."""

    level_s = last_s = 0.0

    def __init__(self, answers: Answers, *, right: float, vocab_size: int, seed: int = 0) -> None:
        self.answers, self._right, self._vocab_size = answers, right, vocab_size
        self._numbers = random.Random(seed)
        self._rates = HitRates((0.9, 0.9, 0.9))
        self._verified: list[tuple[int, int]] = []

    def saw(self, request: Request, tokens: Sequence[int]) -> None:
        """Nothing to learn: the answer is known."""

    def chances(self, request: Request, most: int) -> list[float]:
        left = len(self.answers[request.request_id]) - len(request.output_token_ids)
        return self._rates.chances(0, min(most, left)) if left > 0 else []

    def has_guesses(self, request: Request, count: int) -> bool:
        return len(self.answers[request.request_id]) > len(request.output_token_ids)

    def guess(self, wanted: list[tuple[Request, int]]) -> list[list[int]]:
        return [self._guesses(request, count) for request, count in wanted]

    def _guesses(self, request: Request, count: int) -> list[int]:
        start = len(request.output_token_ids)
        right = self.answers[request.request_id][start : start + count]
        if self._right == 1.0:
            return list(right)
        return [token if self._numbers.random() < self._right else (token + 1) % self._vocab_size for token in right]

    def verified(self, request: Request, num_guesses: int, num_right: int) -> None:
        self._verified.append((num_guesses, num_right))

    def settle(self) -> None:
        for num_guesses, num_right in self._verified:
            for position in range(min(num_right + 1, num_guesses)):
                self._rates.note(position, position < num_right)
        self._verified.clear()

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


def always(source: Source, most: int = 16) -> Speculator:
    """Guesses wherever there are any, whatever they cost."""
    return Speculator(SpeculativeConfig(method="ngram", num_speculative_tokens=most, adaptive=False), source)


class Dictated:
    """step.Runner: computes what the other computes, and then says what the answers say."""

    num_host_blocks = 0

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.num_blocks, self.max_model_len = runner.num_blocks, runner.max_model_len
        self.eos_token_ids, self.vocab_size = runner.eos_token_ids, runner.vocab_size
        self.answers: Answers = {}
        self.moments: list[tuple[str, float]] = []
        """When a launch began and ended, and tokens came."""

    def launch(self, plan: StepPlan) -> PendingStep | PendingLogits:
        self.moments.append(("launching", time.perf_counter()))
        pending = self._runner.launch(plan)
        self.moments.append(("launched", time.perf_counter()))
        tokens = [token for chunk in plan.chunks for token in self._tokens(chunk)]
        return _DictatedStep(pending, tokens, self.moments)

    def _tokens(self, chunk: Any) -> list[int]:
        if not chunk.samples:
            return []
        answer, rows = self.answers[chunk.request.request_id], 1 + len(chunk.guesses)
        first = chunk.start + chunk.num_tokens - rows + 1 - len(chunk.request.prompt_token_ids)
        return [answer[min(first + row, len(answer) - 1)] for row in range(rows)]


@dataclass
class _DictatedStep:
    pending: PendingStep
    tokens: list[int]
    moments: list[tuple[str, float]]

    def result(self) -> StepResult:
        computed = self.pending.result()
        self.moments.append(("there", time.perf_counter()))
        assert len(computed.token_ids) == len(self.tokens)
        return StepResult(self.tokens, computed.extras, computed.num_loaded)


@dataclass(frozen=True)
class Text:
    """What a batch is asked and what it answers."""

    prompts: list[list[int]]
    answers: list[list[int]]
    temperature: float


def random_text(batch: int, args: argparse.Namespace, vocab: int, temperature: float) -> Text:
    numbers = np.random.default_rng(0)
    rows = cast("list[list[int]]", numbers.integers(3, vocab, (2 * batch, max(args.prompt, args.answer))).tolist())
    return Text([row[: args.prompt] for row in rows[:batch]], [row[: args.answer] for row in rows[batch:]], temperature)


def edited_code(batch: int, args: argparse.Namespace, vocab: int, temperature: float) -> Text:
    """Stretches of the standard library, a token for each word, run of spaces and sign; answers change some lines."""
    numbers = random.Random(0)
    modules = (argparse, inspect, json.decoder, random, re)
    words: dict[str, int] = {}

    def tokens(line: str) -> list[int]:
        return [3 + words.setdefault(word, len(words)) % (vocab - 3) for word in re.findall(r"\w+|\s+|[^\w\s]", line)]

    lines = [tokens(line) for module in modules for line in inspect.getsource(module).splitlines(keepends=True)]
    prompts, answers = list[list[int]](), list[list[int]]()
    for _ in range(batch):
        first = numbers.randrange(len(lines) - args.prompt)
        prompt, answer = list[int](), list[int]()
        for line in lines[first:]:
            prompt += line
            if len(prompt) >= args.prompt:
                break
        while len(answer) < args.answer:  # again from the top, where the code is shorter than the answer
            for line in lines[first:]:
                if numbers.random() < 1 / 12:
                    answer += numbers.choice(lines)
                changed = list(line)
                if numbers.random() < 1 / 6:
                    changed[numbers.randrange(len(changed))] = numbers.randrange(3, vocab)
                answer += changed
                if len(answer) >= args.prompt:
                    break
        prompts.append(prompt[: args.prompt])
        answers.append(answer[: args.answer])
    return Text(prompts, answers, temperature)


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        from mainsail_engine.runner.model_runner import ModelRunner

        batch = max(args.batches)
        blocks = batch * (-(-(args.prompt + args.answer + 17) // 16) + 1)
        self._args, self._num_runs = args, 0
        self._config = EngineConfig(
            model=ModelConfig(path=args.model, load_format=args.load_format, max_model_len=args.max_model_len),
            cache=CacheConfig(enable_prefix_caching=False, num_blocks=blocks),
            scheduler=SchedulerConfig(max_num_seqs=max(batch, 8), max_num_batched_tokens=args.budget),
            speculative=SpeculativeConfig(method="ngram"),
            device=args.device,
        )
        runner = ModelRunner(self._config)
        self.device, self._depth = str(runner.device), pipeline_depth(self._config, str(runner.device))
        self._runner = Dictated(runner)
        self.vocab_size = runner.vocab_size

    def speculator(self, most: int, source: Source | None = None, *, adaptive: bool = True) -> Speculator:
        config = SpeculativeConfig(method="ngram", num_speculative_tokens=most, adaptive=adaptive)
        return Speculator(config, source, cuda=self.device.startswith("cuda"), overlap=self._depth > 1)

    def rate(self, text: Text, speculator: Speculator | None) -> tuple[float, float]:
        """(tokens per second, tokens of a request in a step) while the whole batch decodes."""
        return self._measure(self._begin(text, speculator), len(text.prompts))

    def _begin(self, text: Text, speculator: Speculator | None) -> EngineCore:
        """A core that has been asked everything and has computed nothing."""
        self._num_runs += 1
        names = [f"{self._num_runs}-{index}" for index in range(len(text.prompts))]
        self._runner.answers = dict(zip(names, text.answers, strict=True))
        if speculator is not None and isinstance(speculator.source, Replay):
            speculator.source.answers = self._runner.answers
        scheduler = Scheduler(
            self._config, self._runner.num_blocks, self._runner.max_model_len, (),
            max_num_batched_tokens=self._args.budget, speculator=speculator,
        )  # fmt: skip
        core = EngineCore(scheduler, self._runner, depth=self._depth)
        for index, (name, prompt) in enumerate(zip(names, text.prompts, strict=True)):
            most = SamplingParams(
                max_tokens=len(text.answers[index]), temperature=text.temperature, seed=index, ignore_eos=True
            )
            core.handle(Add(name, prompt, most), time.monotonic())
        return core

    def kernels(self, text: Text, speculator: Speculator, steps: int = 8) -> None:
        """Print where steps with guesses spend their time."""
        import torch

        core, batch = self._begin(text, speculator), len(text.prompts)
        begun: set[str] = set()
        while len(begun) < batch:
            outputs = core.step(time.monotonic())
            begun |= {output.request_id for output in outputs.outputs} if outputs else set()
        for _ in range(6):
            core.step(time.monotonic())
        moments = self._runner.moments
        moments.clear()
        started = time.perf_counter()
        for _ in range(steps):
            core.step(time.monotonic())
        wall_ms = (time.perf_counter() - started) / steps * 1e3
        between = {(a, b): list[float]() for a, b in (("there", "launching"), ("launching", "launched"))}
        for (before, first_s), (after, then_s) in pairwise(moments):
            between.get((before, after), []).append((then_s - first_s) * 1e3)
        idle, launching = (sum(each) / max(1, len(each)) for each in between.values())
        print(
            f"batch {batch:4}  {wall_ms:6.2f} ms a step: from tokens to the next launch {idle:5.2f}, "
            f"launching {launching:5.2f}", flush=True,
        )  # fmt: skip
        if self.device.startswith("cuda"):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(steps):
                    core.step(time.monotonic())
                torch.cuda.synchronize()
            found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
            times = [(event.self_device_time_total / steps / 1e3, event.count / steps, event.key) for event in found]
            print(f"    {sum(ms for ms, _, _ in times):8.3f} ms of the device", flush=True)
            for ms, count, name in times[:12]:
                print(f"    {ms:8.3f} ms {count:6.0f} x {name[:100]}", flush=True)
        while core.has_work:
            core.step(time.monotonic())

    def _measure(self, core: EngineCore, batch: int) -> tuple[float, float]:
        begun: set[str] = set()
        started, ended, tokens, steps = 0.0, 0.0, 0, 0
        while core.has_work:
            step = core.step(time.monotonic())
            outputs = step.outputs if step else []
            if started and not ended:
                tokens, steps = tokens + sum(len(output.token_ids) for output in outputs), steps + 1
            begun |= {output.request_id for output in outputs}
            if not started and len(begun) == batch:
                started = time.perf_counter()
            if started and not ended and any(output.finish_reason for output in outputs):
                ended = time.perf_counter()
        return tokens / (ended - started), tokens / steps / batch


def cases(bench: Bench, fixed: int) -> list[tuple[str, Callable[..., Text], float, Callable[[], Speculator]]]:
    """(name, text, temperature, what guesses)."""

    def replay(right: float) -> Replay:
        return Replay({}, right=right, vocab_size=bench.vocab_size)

    return [
        (f"all right, {fixed} fixed", random_text, 0.0, lambda: bench.speculator(fixed, replay(1.0), adaptive=False)),
        ("all right, adaptive", random_text, 0.0, lambda: bench.speculator(16, replay(1.0))),
        (f"none right, {fixed} fixed", random_text, 0.0, lambda: bench.speculator(fixed, replay(0.0), adaptive=False)),
        ("none right, adaptive", random_text, 0.0, lambda: bench.speculator(16, replay(0.0))),
        ("random text, n-gram", random_text, 1.0, lambda: bench.speculator(16)),
        ("editing, n-gram", edited_code, 0.0, lambda: bench.speculator(16)),
    ]


def rows(bench: Bench, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for batch in args.batches:
        bench.rate(random_text(batch, args, bench.vocab_size, 0.0), None)
        chosen = cases(bench, args.fixed)
        for name, make_text, temperature, make_speculator in (chosen[index] for index in args.cases):
            text, speculator = make_text(batch, args, bench.vocab_size, temperature), make_speculator()
            bench.rate(text, speculator)
            rates: dict[bool, list[float]] = {False: [], True: []}
            per_step = 0.0
            for guessing in (False, True) * args.rounds + (False,):
                rate, tokens = bench.rate(text, speculator if guessing else None)
                rates[guessing].append(rate)
                per_step = tokens if guessing else per_step
            plain, with_guesses = (sum(rates[key]) / len(rates[key]) for key in (False, True))
            row = {"batch": batch, "case": name, "tokens_per_s": round(with_guesses, 1)}
            row |= {"without": round(plain, 1), "speed_up": round(with_guesses / plain, 3)}
            print(
                f"batch {batch:4}  {name:22} {plain:9.1f} -> {with_guesses:9.1f} tokens/s  "
                f"{with_guesses / plain:6.2f} x  {per_step:5.2f} tokens a step", flush=True,
            )  # fmt: skip
            yield row | {"tokens_per_step": round(per_step, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--answer", type=int, default=256, help="tokens")
    parser.add_argument("--fixed", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(6)), help="which, in the order above")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--commit", default=os.environ.get("COMMIT", ""), help="noted with the results")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    import torch

    bench = Bench(args)
    if args.kernels:
        for batch in args.batches:
            _, make_text, temperature, make_speculator = cases(bench, args.fixed)[0]
            text = make_text(batch, args, bench.vocab_size, temperature)
            bench.rate(text, make_speculator())
            bench.kernels(text, make_speculator())
        return
    cuda = bench.device.startswith("cuda")
    card = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    result: dict[str, Any] = {"card": card, "torch": torch.__version__, "model": Path(args.model).name}
    result |= {"command": " ".join(["python", *sys.argv]), "commit": args.commit}
    result |= {"prompt": args.prompt, "answer": args.answer, "rows": []}
    for row in rows(bench, args):
        result["rows"].append(row)
        if args.output:
            args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
