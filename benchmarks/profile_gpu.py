"""Where the time of a step goes, on one GPU: by kind of kernel, by section of the host's work, each beside its floor.

    python benchmarks/profile_gpu.py [--model NAME] SITUATION … [--output FILE]

    decode:128@1024          steady steps of 128 decodes at a context of 1,024
    mixed:200@1100+850       … of 200 decodes and 850 tokens of prompts of 1,024
    prefill:8192             … of so many tokens of such prompts
    run:P3                   a whole load offline, its steps by kind: P3, P4, P7, P8, P10, P11 (RUNS)
    run:P11@1800             … its steps behind the first 1,800, by kernel
    …:eager                  the same steps kernel by kernel in their own shapes: what graphs and their padding cost
    decode:256@272:seed      with a sampling setting, as engine_gpu.py names them

Real shapes, dummy weights, greedy, random token ids, the engine core in this process. First steps run untouched, under
a clock around the host's sections; then a few more under the profiler, which tells the device's side (device_trace.py)
and slows the host down: compare the two times of a step. Situations in a row with the same decodes go on with those, so
that contexts grow by some fifty tokens each time. A floor is the larger of bytes over the card's copy rate and
operations over the rate of a large matrix product, both measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from device_trace import Share, read, shares
from engine_gpu import MODELS, PEER, SETTINGS, Load, Widths, engine_config, measured_bandwidth, mlp_weights

from mainsail_engine.chunking import ChunkController, attention_pairs
from mainsail_engine.core import EngineCore, build
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.protocol import Add
from mainsail_engine.request import SamplingParams
from mainsail_engine.runner import cuda_graphs, model_runner
from mainsail_engine.step import StepPlan

PROMPT = 1024
ENOUGH = 800
"""Tokens that a decode may go on for: some situations."""
LATENCY_S = 0.04
"""Target between tokens of the loads that are served (P7 and on): the server's default."""


@dataclass(frozen=True)
class Card:
    bytes_per_s: float
    flops_per_s: float
    """Of bfloat16."""
    fp8_flops_per_s: float = 0.0
    """0: not measured, as it is not needed."""


def matrix_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of an 8192-cubed product in bfloat16 or float8_e4m3fn, random data."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda").to(dtype) for _ in range(2))
    one = torch.ones((), device="cuda")
    times: list[float] = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        if dtype == torch.bfloat16:
            torch.mm(a, b)
        else:
            torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
                a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / sorted(times)[len(times) // 2]


@dataclass(frozen=True)
class Step:
    """What one step computed, and when."""

    decodes: int
    decode_context: int
    prefill_tokens: int
    prefill_pairs: int
    sampled: int
    shape: int
    """Rows of the graph that it was padded to; 0: kernel by kernel."""
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        return self.decodes + self.prefill_tokens

    @property
    def kind(self) -> str:
        if not self.prefill_tokens:
            return f"decode, graph of {self.shape}" if self.shape else "decode, kernel by kernel"
        if self.shape:
            return f"mixed, graph of {self.shape}"
        least = 1 << (self.rows - 1).bit_length() >> 1
        return f"{'mixed' if self.decodes else 'prefill'}, kernel by kernel, {least + 1} to {2 * least}"


def floors(a: Architecture, step: Step, card: Card, widths: Widths) -> dict[str, float]:
    """Milliseconds that each group of kernels needs at least, by the names of device_trace."""
    n, hidden = step.rows, a.hidden_size
    heads, kv_heads = a.num_heads * a.head_dim, 2 * a.num_kv_heads * a.head_dim

    def product(weights: float, used: float, width: float, rows: int = n) -> float:
        rate = card.fp8_flops_per_s if width == 1.0 else card.flops_per_s
        return max(weights * width / card.bytes_per_s, 2 * rows * used / rate)

    layer = {
        "linear qkv": product((heads + kv_heads) * hidden, (heads + kv_heads) * hidden, widths.weight),
        "linear output": product(heads * hidden, heads * hidden, widths.weight),
    }
    if a.experts is None:
        half = hidden * a.intermediate_size
        layer["linear gate_up"] = product(2 * half, 2 * half, widths.weight)
        layer["linear down"] = product(half, half, widths.weight)
        layer["activation"] = 2 * n * 3 * a.intermediate_size / card.bytes_per_s
    else:
        each = 3 * hidden * a.experts.intermediate_size
        layer["experts"] = product(mlp_weights(a, n), each * a.experts.experts_per_token, widths.expert)
    mean = step.decode_context / max(step.decodes, 1)
    seen = sum(min(mean, a.window(i) or mean) for i in range(a.num_layers)) / a.num_layers
    layer["decode attention"] = step.decodes * seen * kv_heads * widths.kv / card.bytes_per_s
    layer["prefill attention"] = 4 * step.prefill_pairs * heads / card.flops_per_s
    layer["norm"] = 2 * 2 * n * 4 * hidden / card.bytes_per_s
    layer["rotation, KV write"] = 2 * n * 2 * (heads + kv_heads) / card.bytes_per_s
    whole = {name: a.num_layers * seconds for name, seconds in layer.items()}
    whole["linear head"] = product(hidden * a.vocab_size, hidden * a.vocab_size, 2.0, step.sampled)
    whole["sampling"] = 2 * step.sampled * a.vocab_size / card.bytes_per_s
    return {name: 1e3 * seconds for name, seconds in whole.items()}


class Watch:
    """Clocks around the host's sections of a step, and notes of what each step computed."""

    def __init__(self, core: EngineCore) -> None:
        self.core: Any = core
        self.runner: Any = self.core._runner
        while hasattr(self.runner, "_runner"):
            self.runner = self.runner._runner
        self.scheduler: Any = self.core._scheduler
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps: list[Step] = []
        self.launches: list[Step] = []
        self._launched: deque[tuple[StepPlan, int]] = deque()
        self._shape, self._ended_s = 0, 0.0
        self._inner = 0.0
        self._wrap(self.scheduler, "schedule", "schedule")
        self._wrap(self.core._runner, "launch", "launch", self._note_launch)
        self._wrap(model_runner, "build", "arrays")
        self._wrap(cuda_graphs, "pack", "pack")
        self._wrap(model_runner.PendingTokens, "result", "wait")
        self._wrap(self.scheduler, "commit", "commit", self._note_commit)
        padded = self.runner._padded
        if padded is not None:
            self._wrap(padded, "launch", "replay", self._note_shape)

    def _wrap(self, owner: Any, name: str, section: str, note: Callable[..., None] | None = None) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            outside, self._inner = self._inner, 0.0
            started = time.perf_counter()
            result = inner(*args, **kwargs)
            took = time.perf_counter() - started
            self.seconds[section] += took - self._inner  # without the sections within
            self._inner = outside + took
            if note is not None:
                note(*args)
            return result

        setattr(owner, name, timed)

    def _note_shape(self, shape: Any, arrays: Any) -> None:
        del arrays
        self._shape = shape.tokens

    def _note_launch(self, plan: StepPlan) -> None:
        self._launched.append((plan, self._shape))
        self.launches.append(step_of(plan, self._shape))
        self._shape = 0

    def _note_commit(self, plan: StepPlan, result: Any, now: float) -> None:
        del result
        launched, shape = self._launched.popleft()
        began, self._ended_s = max(plan.planned_s, self._ended_s), now
        if launched is plan and plan.chunks:
            self.steps.append(step_of(plan, shape, now - began))

    def start(self) -> None:
        """Forget what was before."""
        self.seconds.clear()
        self.steps.clear()
        self.launches.clear()

    def milliseconds(self, steps: int) -> dict[str, float]:
        """Of a step, by section, the largest first."""
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        return {name: 1e3 * seconds / steps for name, seconds in ordered}


def step_of(plan: StepPlan, shape: int, seconds: float = 0.0) -> Step:
    prompts = plan.chunks[plan.num_decodes :]
    return Step(
        decodes=plan.num_decodes,
        decode_context=sum(chunk.start + 1 for chunk in plan.chunks[: plan.num_decodes]),
        prefill_tokens=sum(chunk.num_tokens for chunk in prompts),
        prefill_pairs=sum(attention_pairs(chunk.start, chunk.num_tokens) for chunk in prompts),
        sampled=sum(chunk.samples for chunk in plan.chunks),
        shape=shape,
        seconds=seconds,
    )


@dataclass
class Situation:
    """Steady steps of so many decodes at a context and so many tokens of prompts; or a whole load by name."""

    text: str
    decodes: int = 0
    context: int = PROMPT
    prompt_tokens: int = 0
    run: str = ""
    after: int = 0
    """Steps of a run that are not looked at; then some are, by kernel. 0: all are, by kind."""
    mode: str = ""
    """eager, or a sampling setting."""

    @classmethod
    def of(cls, text: str) -> Situation:
        kind, _, rest = text.partition(":")
        rest, _, mode = rest.partition(":")
        if mode not in ("", "eager", *SETTINGS):
            raise SystemExit(f"{text}: {mode} is neither eager nor one of {', '.join(SETTINGS)}")
        self = cls(text, mode=mode)
        if kind == "run":
            self.run, _, after = rest.partition("@")
            self.after = int(after or 0)
        elif kind == "prefill":
            self.prompt_tokens = int(rest)
        else:
            decodes, _, more = rest.partition("@")
            context, _, prompts = more.partition("+")
            self.decodes, self.context, self.prompt_tokens = int(decodes), int(context), int(prompts or 0)
        return self

    @property
    def is_eager(self) -> bool:
        return self.mode == "eager"

    @property
    def held(self) -> tuple[int, int, str]:
        """What decodes are like: those of one situation may serve the next."""
        return self.decodes, self.context, "" if self.is_eager else self.mode

    @property
    def counts(self) -> tuple[int, int, int]:
        """Steps to settle, under the clock, under the profiler."""
        return (2, 6, 2) if self.prompt_tokens >= 4096 else (6, 32, 8)


@dataclass
class Profile:
    """A situation's figures; times are milliseconds of a step."""

    situation: str
    step_ms: float = 0.0
    profiled_step_ms: float = 0.0
    floor_ms: float = 0.0
    rows: float = 0.0
    shape: int = 0
    host_ms: dict[str, float] = field(default_factory=dict[str, float])
    kernels: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    gap_ms: float = 0.0
    kinds: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    tokens_per_s: float = 0.0
    total_s: float = 0.0


class Profiler:
    def __init__(self, core: EngineCore, vocab: int, a: Architecture, card: Card, widths: Widths) -> None:
        self.core, self.architecture, self.card, self.widths = core, a, card, widths
        self.watch, self.load = Watch(core), Load(core, vocab)
        self._held = 0, 0, ""
        """Decodes that go on from one situation to the next, and the context that they had at first."""

    def profile(self, situation: Situation) -> Profile:
        padded = self.watch.runner._padded
        if situation.is_eager:
            self.watch.runner._padded = None
        try:
            return self._run(situation) if situation.run else self._steady(situation)
        finally:
            self.watch.runner._padded = padded

    # -- steady steps --------------------------------------------------------------------------------------------

    def _steady(self, situation: Situation) -> Profile:
        settle, timed, profiled = situation.counts
        if situation.held != self._held:
            self._decodes(situation)
        first = self.load.count
        budget, self.watch.scheduler._budget = self.watch.scheduler._budget, situation.decodes + situation.prompt_tokens
        prompts = (settle + timed + profiled + 6) * situation.prompt_tokens // PROMPT + 2
        for _ in range(prompts if situation.prompt_tokens else 0):
            self.load.add(PROMPT, 1)
        self._steps(settle)
        result = self._looked_at(situation.text, timed, profiled)
        self.watch.scheduler._budget = budget
        self.load.abort(first)
        return result

    def _looked_at(self, text: str, timed: int, profiled: int) -> Profile:
        """So many steps from here on under the clock, and so many more under the profiler."""
        torch.cuda.synchronize()
        self.watch.start()
        started = time.perf_counter()
        self._steps(timed)
        torch.cuda.synchronize()
        result = Profile(text, step_ms=(time.perf_counter() - started) / timed * 1e3)
        total = sum(self.watch.seconds.values())
        result.host_ms = self.watch.milliseconds(timed)
        result.host_ms["the rest"] = max(0.0, result.step_ms - total / timed * 1e3)
        self._trace(result, profiled)
        return result

    def _decodes(self, situation: Situation) -> None:
        self._end_all()
        self._held = situation.held
        for _ in range(situation.decodes):
            self.load.add(situation.context - 16, ENOUGH, **SETTINGS.get(situation.mode, {}))
        decoding = 0
        while decoding < situation.decodes:
            outputs = self.core.step(time.monotonic())
            decoding = sum(len(output.token_ids) for output in outputs.outputs) if outputs else 0

    def _end_all(self) -> None:
        self._held = 0, 0, ""
        self.load.abort(0)
        self.load.drain()

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.core.step(time.monotonic())

    def _trace(self, result: Profile, count: int) -> None:
        self.watch.start()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self._steps(count)
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            kernels = read(path)
        steps = self.watch.launches
        result.rows, result.shape = sum(step.rows for step in steps) / len(steps), steps[-1].shape
        floor = defaultdict[str, float](float)
        for step in steps:
            for name, ms in floors(self.architecture, step, self.card, self.widths).items():
                floor[name] += ms
        result.floor_ms = sum(floor.values()) / len(steps)
        span_us = max(kernel.end_us for kernel in kernels) - kernels[0].start_us
        result.profiled_step_ms = span_us / len(steps) / 1e3
        table = shares(kernels)
        result.gap_ms = sum(share.gap_us for share in table.values()) / len(steps) / 1e3
        result.kernels = [
            kernel_row(name, share, len(steps), floor[name] / len(steps)) for name, share in table.items()
        ]
        result.kernels.sort(key=lambda row: -row["own_ms"])

    # -- whole loads ---------------------------------------------------------------------------------------------

    def _run(self, situation: Situation) -> Profile:
        self._end_all()
        jobs, places, served = RUNS[situation.run]
        self.watch.scheduler.chunking = ChunkController(LATENCY_S) if served else None
        self.watch.start()
        started = time.perf_counter()
        tokens = closed_loop(self.load, list(jobs(random.Random(0))), places, situation.after or math.inf)
        total = time.perf_counter() - started
        middle = self._looked_at(situation.text, 24, 12) if situation.after else None
        self._end_all()
        self.watch.scheduler.chunking = None
        if middle is not None:
            return middle
        result = Profile(situation.text, tokens_per_s=tokens / total, total_s=total)
        by_kind: dict[str, list[Step]] = {}
        for step in self.watch.steps:
            by_kind.setdefault(step.kind, []).append(step)
        result.kinds = sorted(map(self._kind_row, by_kind.items()), key=lambda row: -row["total_s"])
        count = max(len(self.watch.steps), 1)
        result.floor_ms = sum(row["floor_s"] for row in result.kinds) * 1e3 / count
        result.step_ms = total * 1e3 / count
        result.host_ms = self.watch.milliseconds(count)
        return result

    def _kind_row(self, item: tuple[str, list[Step]]) -> dict[str, Any]:
        kind, steps = item
        bounds = [sum(floors(self.architecture, s, self.card, self.widths).values()) / 1e3 for s in steps]
        seconds, count = sum(s.seconds for s in steps), len(steps)
        return {
            "kind": kind, "steps": count, "total_s": seconds, "floor_s": sum(bounds), "ms": 1e3 * seconds / count,
            "rows": sum(s.rows for s in steps) / count, "decodes": sum(s.decodes for s in steps) / count,
            "prompt_tokens": sum(s.prefill_tokens for s in steps) / count,
            "context": sum(s.decode_context for s in steps) / max(sum(s.decodes for s in steps), 1),
        }  # fmt: skip


def kernel_row(name: str, share: Share, steps: int, floor: float) -> dict[str, Any]:
    return {
        "group": name, "launches": share.launches / steps, "own_ms": share.own_us / steps / 1e3, "floor_ms": floor,
        "duration_ms": share.duration_us / steps / 1e3, "gap_before_ms": share.gap_us / steps / 1e3,
        "main_kernel": share.main_kernel,
    }  # fmt: skip


Job = tuple[list[int], int]
"""(new prompt tokens of each turn, output tokens of each)."""


def _p3(numbers: random.Random) -> Iterator[Job]:
    yield from (([numbers.randint(100, 1024)], numbers.randint(100, 1024)) for _ in range(256))


def _same(count: int, *turns: int, out: int) -> Callable[[random.Random], Iterator[Job]]:
    return lambda numbers: ((list(turns), out) for _ in range(count))


RUNS: dict[str, tuple[Callable[[random.Random], Iterator[Job]], int, bool]] = {
    "P3": (_p3, 256, False),
    "P4": (_same(512, 1000, out=1000), 512, False),
    "P7": (_same(768, 1024, out=256), 256, True),
    "P8": (_same(320, 1024, out=256), 64, True),
    "P10": (_same(100, 2148, out=64), 100, True),
    "P11": (_same(50, 4000, *[3850] * 7, out=150), 50, True),
}
"""Jobs, how many at once, whether chunks follow the target between tokens."""


def closed_loop(load: Load, jobs: list[Job], places: int, most_steps: float = math.inf) -> int:
    """Run all jobs, so many at a time, each one's turns one after another. Returns the tokens that came out.

    most_steps: after so many they are left as they are."""
    waiting, running, tokens = deque(jobs), dict[str, tuple[list[int], deque[int], int]](), 0

    def ask(history: list[int], turns: deque[int], out: int) -> None:
        history += [load.numbers.randrange(load.vocab) for _ in range(turns.popleft())]
        load.count += 1
        params = SamplingParams(max_tokens=out, temperature=0.0, ignore_eos=True)
        load.core.handle(Add(str(load.count), list(history), params), time.monotonic())
        running[str(load.count)] = history, turns, out

    steps = 0
    while (waiting or running) and steps < most_steps:
        steps += 1
        while waiting and len(running) < places:
            turns, out = waiting.popleft()
            ask([], deque(turns), out)
        outputs = load.core.step(time.monotonic())
        for output in outputs.outputs if outputs else ():
            tokens += len(output.token_ids)
            history, turns, out = running[output.request_id]
            history += output.token_ids
            if output.finish_reason is not None:
                del running[output.request_id]
                if turns:
                    ask(history, turns, out)
    return tokens


def show(p: Profile) -> None:
    if p.kinds:
        print(f"\n{p.situation}: {p.total_s:.2f} s, {p.tokens_per_s:,.0f} tokens/s, host a step (ms):", host_line(p))
        for row in p.kinds:
            print(
                f"  {row['kind']:44} {row['steps']:5} steps {row['total_s']:7.2f} s {row['ms']:8.2f} ms"
                f" ({row['total_s'] / max(row['floor_s'], 1e-9):5.2f} x floor)  rows {row['rows']:7.0f}"
                f" decodes {row['decodes']:5.0f} at {row['context']:6.0f} prompts {row['prompt_tokens']:6.0f}"
            )
        return
    print(
        f"\n{p.situation}: {p.step_ms:.2f} ms a step ({p.profiled_step_ms:.2f} under the profiler), floor "
        f"{p.floor_ms:.2f}; {p.rows:.0f} rows in a graph of {p.shape}; gaps {p.gap_ms:.3f}; host:", host_line(p)
    )  # fmt: skip
    for row in p.kernels:
        over = f"{row['own_ms'] / row['floor_ms']:5.2f} x {row['floor_ms']:7.3f}" if row["floor_ms"] else " " * 15
        print(
            f"  {row['group']:20} {row['own_ms']:8.3f} ms {over} dur {row['duration_ms']:8.3f} gap"
            f" {row['gap_before_ms']:6.3f} {row['launches']:6.1f} x {row['main_kernel'][:70]}"
        )


def host_line(p: Profile) -> str:
    return ", ".join(f"{name} {ms:.2f}" for name, ms in p.host_ms.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("situations", nargs="+", help="see above")
    parser.add_argument("--model", default="llama-3-8b", choices=sorted(name for name in PEER if " " not in name))
    parser.add_argument("--quantization", default="auto", choices=("auto", "fp8", "int4"))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"))
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument(
        "--kv-offloading-size", type=float, default=0.0, help="GiB of host memory for KV, which P4 and P11 want"
    )
    parser.add_argument("--prefix-caching", action="store_true", help="which P10 and P11 want")
    parser.add_argument("--commit", default=os.environ.get("COMMIT", ""), help="noted with the results")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    situations = [Situation.of(text) for text in args.situations]
    fp8 = matrix_rate(torch.float8_e4m3fn) if args.quantization == "fp8" else 0.0
    card = Card(measured_bandwidth(), matrix_rate(), fp8)
    torch.cuda.empty_cache()
    rates = f"{card.flops_per_s / 1e12:.0f} TFLOP/s" + f", {fp8 / 1e12:.0f} in FP8" * bool(fp8)
    print(f"{card.bytes_per_s / 1e9:.0f} GB/s, {rates}", flush=True)
    config = engine_config(args, prefix_caching=args.prefix_caching)
    core, ready = build(config)
    architecture = read_architecture(MODELS / args.model)
    widths = Widths.of(args.model, args.quantization, args.kv_cache_dtype)
    profiler = Profiler(core, ready.vocab_size, architecture, card, widths)
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "model": args.model,
        "quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype, "commit": args.commit,
        "command": " ".join(["python", *sys.argv]), "copy_GB_per_s": round(card.bytes_per_s / 1e9),
        "matrix_TFLOP_per_s": round(card.flops_per_s / 1e12), "fp8_TFLOP_per_s": round(fp8 / 1e12), "profiles": [],
    }  # fmt: skip
    for situation in situations:
        profile = profiler.profile(situation)
        show(profile)
        sys.stdout.flush()
        result["profiles"].append({name: value for name, value in asdict(profile).items() if value})
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
