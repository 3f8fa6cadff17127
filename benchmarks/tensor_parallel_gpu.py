"""Tensor parallelism on the GPUs of one host: the same tokens as on one, lost ranks, sums, and decode steps.

    python benchmarks/tensor_parallel_gpu.py [--size 2] [--parts PART,…] [--models NAME[:fp8],…] [--output FILE]

    tokens   small models with random weights (Llama, Qwen3, a mixture of experts) on one GPU and on all: greedy answers
             in float32, with CUDA graphs; and how far log-probabilities in bf16 are from float32's, on one and on all
    sums     one sum of hidden states in a CUDA graph: ours as it is, NCCL, and each kernel over symmetric memory: in
             one shot (with its own copy, and with one beside it), in two (and in place)
    served   `mainsail-engine serve` over HTTP: the same answer from one GPU and all, before and after a sleep; then a
             rank killed, and one stopped, in the middle of a stream: when the stream ends, when the process does, how
    steps    dummy weights, context 1k, beside one GPU (where the model fits) and beside the floor: bytes of weights and
             KV over the copy bandwidth of all GPUs together

The parts take turns, every measurement in processes of its own; tokens and sums share theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import psutil
import torch
import torch.distributed as dist
from engine_gpu import MODELS, Load, Widths, decode_step_ms, measured_bandwidth, step_bytes
from several_gpus import DEVICE, FAMILIES, Results, Row, Task, end_task, make_tiny, tell

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.core import build
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.model.parallel import SINGLE, Parallel
from mainsail_engine.protocol import Add
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner.distributed import RankParallel, join, listen
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.runner.peer_sums import PeerSums, peer_sums
from mainsail_engine.step import Chunk, StepPlan

SUM_ROWS = (1, 8, 32, 64, 128, 256, 512, 2048)
SUM_COLUMNS = 4096
NUM_PROMPTS, NUM_TOKENS = 8, 48
GREEDY = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)


# -- tokens ------------------------------------------------------------------------------------------------------


def prompt_of(index: int) -> list[int]:
    return [(7 * index + 3 * i) % 1000 + 3 for i in range(20 + 17 * index)]


def answers(config: EngineConfig, params: Sequence[SamplingParams]) -> list[list[int]]:
    """Token ids by such an engine, one answer for each of params, to prompts of growing length."""
    core, _ = build(config)
    found: dict[str, list[int]] = {}
    for index, each in enumerate(params):
        core.handle(Add(f"{index:02}", prompt_of(index), each), 0.0)
        found[f"{index:02}"] = []
    while core.has_work:
        outputs = core.step(time.monotonic())
        for output in outputs.outputs if outputs else ():
            found[output.request_id] += output.token_ids
    return [found[key] for key in sorted(found)]


def runner_of(folder: Path, dtype: str, parallel: Parallel) -> ModelRunner:
    config = EngineConfig(
        model=ModelConfig(path=str(folder), dtype=dtype, max_model_len=512), cache=CacheConfig(num_blocks=512),
        scheduler=SchedulerConfig(max_num_seqs=16), tensor_parallel_size=parallel.size, device=DEVICE,
    )  # fmt: skip
    return ModelRunner(config, parallel)


def greedy(runner: ModelRunner) -> list[list[int]]:
    """The answers, by the same steps on every rank: all prompts in one, then all decodes together."""
    requests = [
        Request(str(i), prompt_of(i), GREEDY, 0.0, slot=i, block_ids=list(range(16 * i, 16 * i + 16)))
        for i in range(NUM_PROMPTS)
    ]
    begins = [0] * NUM_PROMPTS
    for step in range(NUM_TOKENS):
        chunks = [
            Chunk(each, start, each.num_tokens - start, samples=True, slot=each.slot, block_ids=each.block_ids)
            for each, start in zip(requests, begins, strict=True)
        ]
        begins = [request.num_tokens for request in requests]
        result = runner.launch(StepPlan(chunks, num_decodes=NUM_PROMPTS if step else 0)).result()  # pyright: ignore[reportAttributeAccessIssue]
        for request, token in zip(requests, result.token_ids, strict=True):
            request.output_token_ids.append(token)
    return [request.output_token_ids for request in requests]


def logprobs(runner: ModelRunner) -> list[float]:
    """Of every token of the longest prompt but the first."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    request = Request("p", prompt_of(NUM_PROMPTS), params, 0.0, slot=0, block_ids=list(range(16)))
    chunk = Chunk(request, 0, request.num_tokens, samples=True, slot=0, block_ids=request.block_ids)
    result = runner.launch(StepPlan([chunk])).result()
    return [each.logprobs[0] for each in result.extras[0].prompt_logprobs or ()]


def tell_tokens(root: Path, parallel: Parallel) -> None:
    """A row for each family; of several ranks the first one's."""
    kept: list[ModelRunner] = []
    for family in FAMILIES:
        kept += [runner_of(root / family, dtype, parallel) for dtype in ("float32", "bfloat16")]
        exact, rounded = kept[-2:]
        row: Row = {"family": family, "tokens": greedy(exact), "float32": logprobs(exact)}
        row["bfloat16"] = logprobs(rounded)
        if parallel.rank == 0:
            tell(row)


def distance(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def compared(alone: Row, together: Row) -> Row:
    same = sum(a == b for a, b in zip(alone["tokens"], together["tokens"], strict=True))
    truth = alone["float32"]
    return {
        "family": alone["family"],
        "same_answers": f"{same} of {NUM_PROMPTS}",
        "float32_apart": distance(together["float32"], truth),
        "bf16_off_on_one": distance(alone["bfloat16"], truth),
        "bf16_off_on_all": distance(together["bfloat16"], truth),
    }


# -- sums --------------------------------------------------------------------------------------------------------


def graph_us(run: Callable[[torch.Tensor], object], x: torch.Tensor, repeats: int = 50) -> float:
    """Microseconds of one `run(x)` inside a CUDA graph of many; without a GPU, of one."""
    if DEVICE == "cpu":
        started = time.perf_counter()
        run(x)
        return (time.perf_counter() - started) * 1e6
    run(x.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
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


def one_shot(sums: PeerSums, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.symm_mem.one_shot_all_reduce_copy(_laid(sums, x), x, "sum", sums.group)


def one_shot_and_copy(sums: PeerSums, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.symm_mem.one_shot_all_reduce(_laid(sums, x).copy_(x), "sum", sums.group)


def two_shots(sums: PeerSums, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    return torch.ops.symm_mem.two_shot_all_reduce_out(_laid(sums, x).copy_(x), "sum", sums.group, out)


def two_shots_in_place(sums: PeerSums, x: torch.Tensor) -> torch.Tensor:
    """It leaves the sum where the next one will be."""
    return torch.ops.symm_mem.two_shot_all_reduce_(_laid(sums, x).copy_(x), "sum", sums.group)


def _laid(sums: PeerSums, x: torch.Tensor) -> torch.Tensor:
    return sums.buffer[: x.nbytes].view(x.dtype).view(x.shape)


DESIGNS = (one_shot, one_shot_and_copy, two_shots, two_shots_in_place)


def tell_sums(parallel: RankParallel) -> None:
    group = dist.group.WORLD
    assert group is not None
    largest = 2 * SUM_ROWS[-1] * SUM_COLUMNS
    sums = peer_sums(parallel.device, group, largest) if DEVICE == "cuda" else None
    for rows in SUM_ROWS:
        x = torch.randn(rows, SUM_COLUMNS, device=parallel.device, dtype=torch.bfloat16)
        apart = [torch.empty_like(x) for _ in range(parallel.size)]
        dist.all_gather(apart, x)
        truth = torch.stack(apart).double().sum(0)
        error = float((parallel.sum(x.clone()).double() - truth).norm() / truth.norm())
        still = x * 0  # NCCL sums in place, and many sums of anything else overflow
        row: Row = {"sum_of_rows": rows, "bytes": x.nbytes, "error": error, "ours_us": graph_us(parallel.sum, still),
                    "nccl_us": graph_us(dist.all_reduce, still)}  # fmt: skip
        if sums is not None:
            row |= {f"{design.__name__}_us": graph_us(partial(design, sums), x) for design in DESIGNS}
        if parallel.rank == 0:
            tell(row)


def ranks(args: argparse.Namespace) -> None:
    """This rank of `size`; the first starts the others."""
    store: Any = args.port
    if not args.rank:
        store = listen(args.size)
        for rank in range(1, args.size):
            command = [sys.executable, __file__, "--task", "ranks", "--rank", str(rank), "--size", str(args.size),
                       "--port", str(store.port), "--folder", str(args.folder), "--parts", args.parts]  # fmt: skip
            subprocess.Popen(command, stdout=subprocess.DEVNULL)
    device = torch.device(DEVICE, args.rank) if DEVICE == "cuda" else torch.device("cpu")
    parallel = join(args.rank, args.size, device, store)
    if not args.rank:
        tell({"gpus": args.size, "peer_sums": parallel.peers is not None})
    if "tokens" in args.parts:
        tell_tokens(args.folder, parallel)
    if "sums" in args.parts:
        tell_sums(parallel)


# -- served ------------------------------------------------------------------------------------------------------


class Server:
    """`mainsail-engine serve` of the small model."""

    def __init__(self, model: Path, size: int, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._log = model.parent / f"serve-{port}.log"
        command = [
            sys.executable, "-m", "mainsail_engine.cli", "serve", "--model", str(model), "--served-model-name", "tiny",
            "--port", str(port), "--tensor-parallel-size", str(size), "--device", DEVICE, "--dtype", "float32",
            "--max-num-seqs", "16", "--kv-cache-blocks", "512",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=self._log.open("wb"), stderr=subprocess.STDOUT)

    def wait_ready(self) -> None:
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{self._log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"{self._url}/health/ready", timeout=2).close()
                return
            except OSError:
                time.sleep(0.1)

    def _open(self, **body: Any) -> Any:
        told = {"model": "tiny", "prompt": prompt_of(5), "temperature": 0, "ignore_eos": True, **body}
        request = urllib.request.Request(
            f"{self._url}/v1/completions", json.dumps(told).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=30)

    def sleep_and_wake(self) -> Row:
        """Seconds of both together, and what the server answers if it cannot."""
        started = time.monotonic()
        try:
            for path in ("sleep", "wake_up"):
                request = urllib.request.Request(f"{self._url}/{path}", b"", method="POST")
                urllib.request.urlopen(request, timeout=60).close()
        except HTTPError as error:
            return {"failed": error.url, "how": error.read().decode()[:300], "log": self._log.read_text()[-1500:]}
        return {"after_s": time.monotonic() - started}

    def answer(self) -> str:
        with self._open(max_tokens=64) as response:
            return json.load(response)["choices"][0]["text"]

    def stream_until_lost(self, number: signal.Signals) -> Row:
        """Begin to stream, send rank 1 the signal, and see how that ends."""
        rank = next(c for c in psutil.Process(self.process.pid).children(True) if "tp_worker" in " ".join(c.cmdline()))
        error = b""
        with self._open(max_tokens=1800, stream=True) as response:
            response.readline()
            sent = time.monotonic()
            rank.send_signal(number)
            try:
                for line in response:
                    error = line.strip() if b'"error"' in line else error
            except (OSError, HTTPException) as broken:
                error = f"the stream broke off: {broken!r}".encode()
            ended = time.monotonic() - sent
        code = self.process.wait(timeout=20)
        gone = time.monotonic() - sent
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
        return {"signal": number.name, "stream_ended_s": ended, "process_ended_s": gone, "exit_code": code,
                "error": error.decode()[:200]}  # fmt: skip

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def served(args: argparse.Namespace) -> None:
    """One GPU, and all of them twice, started at once."""
    model = args.folder / "llama"
    servers = [Server(model, size, args.port + i) for i, size in enumerate((1, args.size, args.size))]
    started = time.monotonic()
    try:
        for server in servers:
            server.wait_ready()
        tell({"served": "ready", "after_s": time.monotonic() - started})
        texts = [server.answer() for server in servers]
        tell({"served": "answers", "same_as_one": texts[1] == texts[2] == texts[0], "words": len(texts[0].split())})
        slept = servers[1].sleep_and_wake()
        same = "failed" not in slept and servers[1].answer() == texts[0]
        tell({"served": "slept and woken", "same": same, **slept})
        numbers = (signal.SIGKILL, signal.SIGSTOP)
        with ThreadPoolExecutor() as pool:
            for row in pool.map(Server.stream_until_lost, servers[1:], numbers):
                tell(row)
        tell({"served": "one GPU still answers the same", "same": servers[0].answer() == texts[0]})
    finally:
        for server in servers:
            server.stop()


# -- steps -------------------------------------------------------------------------------------------------------


def steps(args: argparse.Namespace) -> None:
    name, _, quantization = args.model.partition(":")
    bandwidth = measured_bandwidth() if DEVICE == "cuda" else float("nan")
    torch.cuda.empty_cache()
    config = EngineConfig(
        model=ModelConfig(
            path=str(MODELS / name), load_format="dummy", max_model_len=2048, quantization=quantization or "auto"
        ),
        cache=CacheConfig(enable_prefix_caching=False, num_blocks=None if DEVICE == "cuda" else 1024),
        scheduler=SchedulerConfig(max_num_seqs=128, max_inter_token_latency_ms=0),
        tensor_parallel_size=args.size, device=DEVICE,
    )  # fmt: skip
    started = time.perf_counter()
    core, ready = build(config)
    about = {"model": args.model, "gpus": args.size}
    tell(
        {
            **about,
            "start_s": time.perf_counter() - started,
            "blocks": ready.num_blocks,
            "copy_GB_per_s": bandwidth / 1e9,
        }
    )
    architecture, width = read_architecture(MODELS / name), 1.0 if quantization == "fp8" else 2.0
    load = Load(core, ready.vocab_size)
    load.add(1000, 8)
    load.drain()
    for batch in map(int, args.batches.split(",")):
        floor_ms = step_bytes(architecture, batch, 1024, Widths(width, 2.0, width)) / bandwidth / args.size * 1e3
        tell({**about, "batch": batch, "ms": decode_step_ms(load, batch), "floor_ms": floor_ms})
    if args.prefill:
        for _ in range(64):
            load.add(1024, 1)
        _, seconds = load.drain()
        tell({**about, "prefill_tok_per_s": 64 * 1024 / seconds})


# -- all of it ---------------------------------------------------------------------------------------------------


def run_together(args: argparse.Namespace, results: Results) -> None:
    """Tokens and sums: one GPU's answers are made beside, before the sums are measured."""
    common = ("--folder", str(args.folder), "--parts", args.parts)
    apart = Task(__file__, "alone", *common, limit_s=90) if "tokens" in args.parts else None
    together = Task(__file__, "ranks", *common, "--size", str(args.size), limit_s=120)
    alone: dict[str, Row] = {row["family"]: row for row in apart.rows()} if apart else {}
    for row in together.rows():
        family = row.get("family")
        if family is None or family in alone:
            results.add(compared(alone[family], row) if family else row)
    for task in (apart, together):
        if task and task.trouble:
            results.add({"failed": task.name, "how": task.trouble})


def run_steps(args: argparse.Namespace, results: Results) -> None:
    models = args.models.split(",")
    for model in models:
        sizes = (args.size,) if model in args.only_together.split(",") else (1, args.size)
        for size in sizes:
            more = ("--prefill",) if args.prefill else ()
            results.take(
                Task(__file__, "steps", "--model", model, "--size", str(size), "--batches", args.batches, *more,
                     limit_s=90)
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--parts", default="tokens,sums,served,steps")
    parser.add_argument("--models", default="llama-3-8b", help="of the steps: folders of benchmarks/models, …:fp8")
    parser.add_argument("--only-together", default="llama-3-70b:fp8", help="of these, those that do not fit one GPU")
    parser.add_argument("--batches", default="1,32,128")
    parser.add_argument("--prefill", action="store_true", help="and 64 prompts of 1,024 tokens")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--port", type=int, default=8140, help="the first of three")
    parser.add_argument("--task", choices=("alone", "ranks", "served", "steps"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        tasks: dict[str, Callable[[], None]] = {
            "alone": lambda: tell_tokens(args.folder, SINGLE),
            "ranks": lambda: ranks(args),
            "served": lambda: served(args),
            "steps": lambda: steps(args),
        }
        tasks[args.task]()
        end_task()
    results = Results(args.output, gpus=args.size)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for family in FAMILIES:
            make_tiny(args.folder / family, family)
        if "tokens" in args.parts or "sums" in args.parts:
            run_together(args, results)
        if "served" in args.parts:
            task = ("--folder", folder, "--size", str(args.size), "--port", str(args.port))
            results.take(Task(__file__, "served", *task, limit_s=90))
    if "steps" in args.parts:
        run_steps(args, results)


if __name__ == "__main__":
    main()
