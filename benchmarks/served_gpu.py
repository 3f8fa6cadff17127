"""Figures over HTTP on one GPU: `mainsail-engine serve`, and clients that stream /v1/completions from it.

    python benchmarks/served_gpu.py [--rows P7,P8,P9,P10,P11,P12] [--output FILE] [--url URL] [--serve-flags "…"]

Real shapes of Llama-3-8B, dummy weights, bf16, a byte-level tokenizer made up on the spot; prompts are random token
ids, greedy, `ignore_eos`, `min_tokens` = `max_tokens`, streaming, with usage. The clients run in processes of their own
on plain sockets and parse as little as they can: the server is what is measured. The goals and the peer's figures
(vLLM 0.26.0 with prefix caching, one API process unless said) are for an H200; what this card copies stands beside.

    P7   256 at a time, 1,024 in / 256 out           output tokens a second
    P8   64 at a time, the same                      and the time between tokens
    P9   16 streams under four prompts of 32k        time between tokens of the streams, first token of the four
    P10  100 at once, sharing 2,048 tokens or not    time to first token
    P11  50 sessions of 8 turns growing to 32k       total time, a turn's time
    P12  100 a second for 20 s, 1,024 / 128          tokens of requests that began within 5 s, refusals and their time
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol
from urllib.parse import urlparse

MODELS = Path(__file__).parent / "models"
VOCAB = 128_000
CLIENTS = 8
"""Client processes. It divides places and jobs of P7, P8 and P12: with a share that is left over, a few jobs would run
alone at the end while other processes have nothing to do (with 6 it was 4 to 6 % of P7 and P8)."""


@dataclass
class Job:
    """One request, or the turns of one session one after another (each prompt extends the last by its answer)."""

    turns: list[list[int]]
    max_tokens: int
    at_s: float = 0.0
    """When to start, after the row's start (the row's jobs are otherwise taken as places come free)."""
    tag: str = ""


@dataclass
class Answer:
    """What became of one request; times are seconds on the machine's monotonic clock."""

    tag: str
    turn: int
    status: int
    start_s: float
    event_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    end_s: float = 0.0

    @property
    def first_s(self) -> float:
        return self.event_s[0] - self.start_s if self.event_s else float("inf")

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.event_s)]


class Connection:
    """One HTTP/1.1 connection that is kept; an answer's chunks are scanned, not parsed."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def stream(self, body: bytes, answer: Answer) -> list[int]:
        """Send one request; note when each event came. Returns the answer's token ids."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=1 << 22)
        reader, writer = self._streams
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        answer.start_s = time.monotonic()
        writer.write(head.encode() + b"\r\n\r\n" + body)
        header = await reader.readuntil(b"\r\n\r\n")
        answer.status = int(header[9:12])
        if b"content-length:" in header.lower():
            length = int(header.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            answer.end_s = time.monotonic()
            return []
        return await self._events(reader, answer)

    async def _events(self, reader: asyncio.StreamReader, answer: Answer) -> list[int]:
        last, ids = b"", list[int]()
        while size := int(await reader.readuntil(b"\r\n"), 16):
            chunk = await reader.readexactly(size + 2)
            now = time.monotonic()
            if b'"usage":{' in chunk:
                last = chunk
            elif b'"choices":[{' in chunk:
                answer.event_s.append(now)
                at = chunk.find(b'"token_ids":[')
                if at >= 0:
                    ids += [int(n) for n in chunk[at + 13 : chunk.index(b"]", at)].split(b",") if n]
        await reader.readexactly(2)
        answer.end_s = time.monotonic()
        at = last.find(b'"completion_tokens":')
        answer.num_tokens = int(last[at + 20 :].split(b",")[0].split(b"}")[0]) if at >= 0 else 0
        return ids

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


def request_body(prompt: list[int], max_tokens: int, *, ids: bool) -> bytes:
    body: dict[str, Any] = {
        "model": "bench", "prompt": prompt, "max_tokens": max_tokens, "min_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(body | ({"return_token_ids": True} if ids else {})).encode()


async def run_job(connection: Connection, job: Job) -> list[Answer]:
    answers: list[Answer] = []
    prompt: list[int] = []
    for turn, more in enumerate(job.turns):
        prompt = prompt + more
        answer = Answer(job.tag, turn, 0, 0.0)
        body = request_body(prompt, job.max_tokens, ids=len(job.turns) > 1)
        prompt = prompt + await connection.stream(body, answer)
        answers.append(answer)
    return answers


async def run_jobs(url: str, jobs: list[Job], places: int, start_s: float) -> list[Answer]:
    """places 0: every job at its own time."""
    parsed, answers = urlparse(url), list[Answer]()
    queue = iter(jobs)

    async def one(job: Job) -> None:
        connection = Connection(parsed.hostname or "127.0.0.1", parsed.port or 80)
        await asyncio.sleep(max(0.0, start_s + job.at_s - time.monotonic()))
        answers.extend(await run_job(connection, job))
        connection.close()

    async def place() -> None:
        connection = Connection(parsed.hostname or "127.0.0.1", parsed.port or 80)
        await asyncio.sleep(max(0.0, start_s - time.monotonic()))
        for job in queue:
            answers.extend(await run_job(connection, job))
        connection.close()

    await asyncio.gather(*([place() for _ in range(places)] if places else [one(job) for job in jobs]))
    return answers


def client(url: str, jobs: list[Job], places: int, start_s: float) -> list[Answer]:
    """One client process's share of a row."""
    try:
        import uvloop

        return uvloop.run(run_jobs(url, jobs, places, start_s))
    except ImportError:
        return asyncio.run(run_jobs(url, jobs, places, start_s))


class Load:
    """A row's jobs over all client processes."""

    def __init__(self, url: str, pool: ProcessPoolExecutor) -> None:
        self.url, self._pool, self._random = url, pool, random.Random(0)

    def tokens(self, count: int) -> list[int]:
        return self._random.choices(range(1000, VOCAB), k=count)

    def run(self, jobs: list[Job], places: int = 0) -> list[Answer]:
        start_s = time.monotonic() + 0.3 + len(jobs) / 2000
        shares = [(jobs[i::CLIENTS], len(range(i, places, CLIENTS))) for i in range(CLIENTS)]
        running = [
            self._pool.submit(client, self.url, share, own, start_s)
            for share, own in shares
            if share and (own or not places)
        ]
        return [answer for future in running for answer in future.result()]


class Clients(Protocol):
    """What a row needs: of a server on a card (`Load`), or of a simulated one (served_sim.py)."""

    def tokens(self, count: int) -> list[int]: ...
    def run(self, jobs: list[Job], places: int = 0) -> list[Answer]: ...


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def throughput(answers: list[Answer]) -> float:
    """Output tokens a second, from the first request to the last token."""
    return sum(a.num_tokens for a in answers) / (max(a.end_s for a in answers) - min(a.start_s for a in answers))


def gaps(answers: list[Answer]) -> list[float]:
    return [gap for answer in answers for gap in answer.gaps_s]


Figures = dict[str, float]


def row_p7(load: Clients, concurrency: int = 256, requests: int = 768) -> Figures:
    answers = load.run([Job([load.tokens(1024)], 256) for _ in range(requests)], concurrency)
    between = gaps(answers)
    return {
        "failed": sum(a.status != 200 for a in answers),
        "tokens_per_s": throughput(answers),
        "first_token_p50_s": percentile([a.first_s for a in answers], 0.5),
        "first_token_p99_s": percentile([a.first_s for a in answers], 0.99),
        "between_tokens_p50_ms": 1e3 * percentile(between, 0.5),
        "between_tokens_p99_ms": 1e3 * percentile(between, 0.99),
        "between_tokens_max_ms": 1e3 * max(between),
    }


def row_p8(load: Clients) -> Figures:
    return row_p7(load, 64, 320)


def row_p9(load: Clients) -> Figures:
    streams = [Job([load.tokens(512)], 900, tag="stream") for _ in range(16)]
    prompts = [Job([load.tokens(32_000)], 16, at_s=1.0 + 2.0 * i, tag="long") for i in range(4)]
    answers = load.run(streams + prompts)
    long = [a for a in answers if a.tag == "long"]
    begin, end = min(a.start_s for a in long), max(a.event_s[0] for a in long)
    times = [a.event_s for a in answers if a.tag == "stream"]
    under = [
        after - before for own in times for before, after in pairwise(own)
        if after >= begin and before <= end
    ]  # fmt: skip
    return {
        "between_tokens_p50_ms": 1e3 * percentile(under, 0.5),
        "between_tokens_p99_ms": 1e3 * percentile(under, 0.99),
        "between_tokens_max_ms": 1e3 * max(under, default=float("nan")),
        "long_first_token_p50_s": percentile([a.first_s for a in long], 0.5),
        "long_first_token_max_s": max(a.first_s for a in long),
    }


def row_p10(load: Clients) -> Figures:
    shared = load.tokens(2048)
    load.run([Job([[*shared, *load.tokens(100)]], 4)])
    together = load.run([Job([[*shared, *load.tokens(100)]], 64) for _ in range(100)])
    apart = load.run([Job([load.tokens(2148)], 64) for _ in range(100)])
    return {
        "shared_first_token_p50_s": percentile([a.first_s for a in together], 0.5),
        "shared_first_token_p99_s": percentile([a.first_s for a in together], 0.99),
        "apart_first_token_p50_s": percentile([a.first_s for a in apart], 0.5),
        "apart_first_token_p99_s": percentile([a.first_s for a in apart], 0.99),
    }


def row_p11(load: Clients, sessions: int = 50, turns: int = 8, length: int = 32_000) -> Figures:
    step = length // turns
    jobs = [
        Job([load.tokens(step), *[load.tokens(step - 150) for _ in range(turns - 1)]], 150) for _ in range(sessions)
    ]
    answers = load.run(jobs)
    took = [a.end_s - a.start_s for a in answers]
    return {
        "failed": sum(a.status != 200 for a in answers),
        "total_s": max(a.end_s for a in answers) - min(a.start_s for a in answers),
        "turn_p50_s": percentile(took, 0.5),
        "turn_p95_s": percentile(took, 0.95),
        "turn_max_s": max(took),
        "turn_mean_s": fmean(took),
    }


def row_p12(load: Clients, rate: float = 100.0, seconds: float = 20.0) -> Figures:
    peak = throughput(load.run([Job([load.tokens(1024)], 128) for _ in range(512)], 256))
    answers = load.run([Job([load.tokens(1024)], 128, at_s=i / rate) for i in range(int(rate * seconds))])
    served, refused = [a for a in answers if a.status == 200], [a for a in answers if a.status != 200]
    useful = sum(a.num_tokens for a in served if a.first_s < 5.0)
    over = max(a.end_s for a in served) - min(a.start_s for a in answers)
    return {
        "peak_tokens_per_s": peak,
        "useful_tokens_per_s": useful / over,
        "useful_share": useful / over / peak,
        "served": len(served),
        "served_within_5s": sum(a.first_s < 5.0 for a in served),
        "refused": len(refused),
        "first_token_p50_s": percentile([a.first_s for a in served], 0.5),
        "first_token_max_s": max(a.first_s for a in served),
        "over_s": over,
        "refused_p50_ms": 1e3 * percentile([a.end_s - a.start_s for a in refused], 0.5),
        "refused_p99_ms": 1e3 * percentile([a.end_s - a.start_s for a in refused], 0.99),
    }


ROWS = {"P7": row_p7, "P8": row_p8, "P9": row_p9, "P10": row_p10, "P11": row_p11, "P12": row_p12}
GOALS: dict[str, dict[str, tuple[float, float]]] = {  # figure: (goal, peer) on an H200
    "P7": {"tokens_per_s": (7000, 4163)},
    "P8": {"tokens_per_s": (5500, 4467), "between_tokens_p99_ms": (40, 190)},
    "P9": {
        "between_tokens_p99_ms": (40, 185), "between_tokens_max_ms": (80, 393), "long_first_token_max_s": (1.6, 1.22),
    },
    "P10": {"shared_first_token_p50_s": (0.25, 0.53), "apart_first_token_p50_s": (2.6, 2.95)},
    "P11": {"total_s": (70, 208), "turn_p95_s": (12, 60.7)},
    "P12": {"useful_share": (0.95, 0.15), "refused_p99_ms": (50, float("nan"))},
}  # fmt: skip


def make_model(folder: Path) -> Path:
    """Llama-3-8B's shapes with room for 128k positions, and a tokenizer whose tokens are made-up words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = json.loads((MODELS / "llama-3-8b" / "config.json").read_text())
    config["max_position_embeddings"] = 131_072
    (folder / "config.json").write_text(json.dumps(config))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = random.Random(1)
    words = {letter: i for i, letter in enumerate(letters)}
    while len(words) < config["vocab_size"]:
        word = "".join(numbers.choices("abcdefghijklmnopqrstuvwxyz", k=numbers.randint(2, 9)))
        words.setdefault(("\u0120" if numbers.random() < 0.5 else "") + word, len(words))
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def serve(model: Path, flags: list[str], log: Path, port: int = 8123) -> tuple[subprocess.Popen[bytes], str, float]:
    """(the server's process, its address, seconds to the first token)."""
    command = [
        sys.executable, "-m", "mainsail_engine.cli", "serve", "--model", str(model), "--load-format", "dummy",
        "--served-model-name", "bench", "--port", str(port), *flags,
    ]  # fmt: skip
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    while True:
        if process.poll() is not None or time.monotonic() - started > 120:
            sys.exit(f"the server did not start:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=1):
                break
        except OSError:
            time.sleep(0.05)
    body = request_body([5, 6, 7], 1, ids=False)
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=30) as answer:
        answer.read()
    return process, url, time.monotonic() - started


def host_share(url: str) -> dict[str, float]:
    """Of the steps since the start: mean time, and the part in which the core did not wait for the device."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    read = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("mainsail:step_")}
    count = max(read.get("mainsail:step_time_seconds_count", 0.0), 1.0)
    names = {"step_ms": "mainsail:step_time_seconds_sum", "host_ms": "mainsail:step_host_time_seconds_sum"}
    return {"steps": count, **{short: 1e3 * read.get(name, 0.0) / count for short, name in names.items()}}


def show(name: str, figures: Figures) -> None:
    for figure, value in figures.items():
        goal, peer = GOALS[name].get(figure, (None, None))
        beside = f"   goal {goal}   peer {peer} (both H200)" if goal is not None else ""
        print(f"{name:4} {figure:28} {value:10.2f}{beside}", flush=True)


def card() -> dict[str, Any]:
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from engine_gpu import measured_bandwidth

    return {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_GB_per_s": measured_bandwidth() / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--url", help="a running server that knows the model as `bench`; default: start one")
    parser.add_argument("--serve-flags", default="--max-model-len 36000", help="for `mainsail-engine serve`")
    parser.add_argument("--commit", default=os.environ.get("COMMIT", ""), help="noted with the results")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "commit": args.commit, "rows": {}}
    if not args.url:
        with ProcessPoolExecutor(1) as once:  # a process of its own, so that the card's memory is free again
            result |= once.submit(card).result()
        print(f"{result['card']}, {result['copy_GB_per_s']:.0f} GB/s", flush=True)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(CLIENTS) as pool:
        process, url, log = None, args.url, Path(folder) / "serve.log"
        if not url:
            process, url, result["first_token_after_s"] = serve(make_model(Path(folder)), args.serve_flags.split(), log)
            print(f"first token {result['first_token_after_s']:.1f} s after the start", flush=True)
        load = Load(url, pool)
        try:
            load.run([Job([load.tokens(1024)], 32) for _ in range(64)], 64)
            for name in args.rows.split(","):
                began = time.monotonic()
                result["rows"][name] = ROWS[name](load)
                show(name, result["rows"][name])
                before = host_share(url)
                print(f"     in {time.monotonic() - began:.0f} s; steps so far: {before}", flush=True)
                if args.output:
                    args.output.write_text(json.dumps(result, indent=1) + "\n")
        finally:
            if process is not None:
                print(log.read_text()[-1500:] if log.exists() else "")
                process.kill()


if __name__ == "__main__":
    main()
