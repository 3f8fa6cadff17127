"""What serving itself costs, on a model of random weights whose steps take a millisecond or two.

    python -m benchmarks.serving_cpu --output-json benchmarks/results/serving_cpu.json

logging: with --enable-log-requests over without, medians of pairs: throughput in turn, and the CPU time of all the
server's processes while both answer the same requests side by side (what the neighbours do then hits both). refusals:
how long a client waits for its 429 while the queue is full, and what Retry-After says. metrics: the server's own times
over what clients measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.engine.server.streams import watch
from tests.engine.tiny import make_tiny_model

from mainsail_engine.bench import Load, run

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("time_to_first_token", "inter_token_latency", "e2e_request_latency")


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    pid: int

    def cpu_s(self) -> float:
        """CPU time of all threads of all its processes so far, to the microsecond."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        threads = [path for pid in (self.pid, *children) for path in Path(f"/proc/{pid}/task").iterdir()]
        return sum(int((path / "schedstat").read_text().split()[0]) for path in threads) / 1e9


@contextmanager
def served(model: Path, *flags: str) -> Iterator[Server]:
    """A server with these flags."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "mainsail_engine.cli", "serve", "--model", str(model), "--host", "127.0.0.1"]
    with tempfile.NamedTemporaryFile("w+") as log:
        fixed = ["--served-model-name", "tiny", "--port", "0", "--kv-cache-blocks", "4096"]
        process = subprocess.Popen([*command, *fixed, *flags], env=environment, stderr=log, stdout=log)
        try:
            while not (found := re.search(r"ready: (http://[^/]+)/v1", Path(log.name).read_text())):
                if process.poll() is not None:
                    raise RuntimeError(Path(log.name).read_text())
                time.sleep(0.05)
            yield Server(found.group(1), process.pid)
        finally:
            process.terminate()
            process.wait()


@dataclass(frozen=True, slots=True)
class Round:
    requests_per_s: float
    cpu_s: float


async def round_of(server: Server, requests: int) -> Round:
    """Short requests, 32 at a time: logging costs by the request, so this is where it shows most."""
    before_s = server.cpu_s()
    figures = await run(Load(server.url, "tiny", requests, 32, 16, 32, 0.0, 200))
    if figures["failed"]:
        raise RuntimeError(figures["errors"])
    return Round(requests / figures["duration_s"], server.cpu_s() - before_s)


def median_of(ratios: list[float]) -> dict[str, float]:
    """The median, and what it lies between in 95 of 100 such runs (by order statistics)."""
    ordered, half = sorted(ratios), len(ratios) / 2
    margin = 0.98 * len(ratios) ** 0.5
    low, high = max(0, math.floor(half - margin)), min(len(ratios) - 1, math.ceil(half + margin))
    return {
        "median": round(statistics.median(ratios), 4),
        "from": round(ordered[low], 4),
        "to": round(ordered[high], 4),
    }


async def logging_cost(model: Path, rounds: int, requests: int) -> dict[str, Any]:
    turns, beside = list[tuple[Round, Round]](), list[tuple[Round, Round]]()
    with served(model) as plain, served(model, "--enable-log-requests") as logged:
        for server in (plain, logged):
            await round_of(server, requests)
        for number in range(rounds):
            if number % 2:
                turns.append((await round_of(plain, requests), await round_of(logged, requests)))
            else:
                first = await round_of(logged, requests)
                turns.append((await round_of(plain, requests), first))
            beside.append(await asyncio.gather(round_of(plain, requests), round_of(logged, requests)))
    return {
        "rounds": rounds,
        "requests_a_round": requests,
        "requests_per_s_without": round(statistics.median(without.requests_per_s for without, _ in turns), 1),
        "cpu_ms_a_request_without": round(1000 * statistics.median(o.cpu_s / requests for o, _ in turns), 3),
        "throughput_with_over_without": median_of([w.requests_per_s / o.requests_per_s for o, w in turns]),
        "cpu_with_over_without_side_by_side": median_of([w.cpu_s / o.cpu_s for o, w in beside]),
    }


async def refusals(model: Path, count: int) -> dict[str, Any]:
    """A full queue, and clients that come one after another."""
    body = {"model": "tiny", "prompt": [5] * 64, "max_tokens": 1500, "ignore_eos": True}
    content = json.dumps({**body, "max_tokens": 1}).encode()
    with served(model, "--max-num-seqs", "8", "--max-num-queued-reqs", "8") as server:
        url = server.url
        busy = [asyncio.create_task(watch(url, "/v1/completions", body)) for _ in range(8)]
        await until(url, "vllm:num_requests_running", 8)
        busy += [asyncio.create_task(watch(url, "/v1/completions", body)) for _ in range(8)]
        await until(url, "mainsail:queued_requests", 8)
        waits_s, said, statuses = list[float](), list[str](), list[int]()
        for _ in range(count):
            status, retry_after, wait_s = await asyncio.to_thread(refused, url, content)
            statuses.append(status)
            said.append(retry_after)
            waits_s.append(wait_s)
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
    ordered = sorted(waits_s)
    return {
        "requests": count,
        "refused": statuses.count(429),
        "with_retry_after": sum(bool(value) for value in said),
        "retry_after_s": sorted({int(value) for value in said if value}),
        "ms": {f"p{p}": round(1000 * ordered[min(count - 1, count * p // 100)], 2) for p in (50, 90, 99)},
        "max_ms": round(1000 * ordered[-1], 2),
    }


async def until(url: str, name: str, value: float) -> None:
    """Wait for a gauge."""
    for _ in range(200):
        text = await asyncio.to_thread(exposition, url)
        if re.search(rf"^{name}{{.*}} {value:.1f}$", text, re.M):
            return
        await asyncio.sleep(0.02)
    raise RuntimeError(f"{name} did not become {value}")


def exposition(url: str) -> str:
    return urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()


def refused(url: str, content: bytes) -> tuple[int, str, float]:
    """(status, Retry-After, seconds from connecting to the answer)."""
    host, _, port = url.removeprefix("http://").partition(":")
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    began_s = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        answer = connection.recv(65536).decode()
    found = re.search(r"retry-after: (\d+)", answer)
    return int(answer.split()[1]), found.group(1) if found else "", time.monotonic() - began_s


def scrape(url: str) -> dict[str, float]:
    text = exposition(url)
    return {
        name: float(re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.M).group(1))  # type: ignore[union-attr]
        for name in (f"{each}_seconds_{kind}" for each in NAMES for kind in ("sum", "count"))
    }


async def metrics_over_clients(model: Path) -> dict[str, Any]:
    """Sums of 32 streams: the server's times over the clients'."""
    with served(model) as server:
        url = server.url
        await watch(url, "/v1/completions", {"model": "tiny", "prompt": [9] * 50, "max_tokens": 5})
        before = scrape(url)
        bodies = (
            {"model": "tiny", "prompt": [5 + i] * 1500, "max_tokens": 100, "ignore_eos": True, "return_token_ids": True}
            for i in range(32)
        )
        seen = await asyncio.gather(*(watch(url, "/v1/completions", body) for body in bodies))
        grown = {name: value - before[name] for name, value in scrape(url).items()}
    arrivals = [stream.arrivals_s() for stream in seen]
    clients = {
        NAMES[0]: [times[0] - stream.sent_s for stream, times in zip(seen, arrivals, strict=True)],
        NAMES[1]: [b - a for times in arrivals for a, b in pairwise(times)],
        NAMES[2]: [times[-1] - stream.sent_s for stream, times in zip(seen, arrivals, strict=True)],
    }
    return {
        name: {
            "clients_mean_ms": round(1000 * statistics.fmean(values), 3),
            "metric_over_clients": round(grown[f"{name}_seconds_sum"] / sum(values), 4),
            "counts_equal": grown[f"{name}_seconds_count"] == len(values),
        }
        for name, values in clients.items()
    }


PARTS = ("metrics", "refusals", "logging")


async def measure(parts: Sequence[str], rounds: int, requests: int, count: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"cpus": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model")
        if "metrics" in parts:
            figures["metrics"] = await metrics_over_clients(model)
        if "refusals" in parts:
            figures["refusals"] = await refusals(model, count)
        if "logging" in parts:
            figures["logging"] = await logging_cost(model, rounds, requests)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the rest of the file stays")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--requests", type=int, default=64, help="of each round")
    parser.add_argument("--refusals", type=int, default=300)
    parser.add_argument("--output-json", type=Path)
    flags = parser.parse_args()
    figures = asyncio.run(measure(flags.only, flags.rounds, flags.requests, flags.refusals))
    print(json.dumps(figures, indent=1))
    out: Path | None = flags.output_json
    if out is not None:
        before = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps({**before, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
