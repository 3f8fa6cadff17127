"""What serving itself costs, on a model of random weights whose steps take a millisecond or two.

    python -m benchmarks.serving_cpu --output-json benchmarks/results/serving_cpu.json

logging: tokens/s with --enable-log-requests over without, rounds of both in turn. refusals: how long a client waits for
its 429 while the queue is full, and what Retry-After says. metrics: the server's own times over what clients measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.engine.server.streams import watch
from tests.engine.tiny import make_tiny_model

from mainsail_engine.bench import Load, run

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("time_to_first_token", "inter_token_latency", "e2e_request_latency")


@contextmanager
def served(model: Path, *flags: str) -> Iterator[str]:
    """A server with these flags; its address."""
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
            yield found.group(1)
        finally:
            process.terminate()
            process.wait()


async def throughput(url: str, requests: int) -> float:
    """Tokens per second, of short requests: logging costs by the request."""
    figures = await run(Load(url, "tiny", requests, 32, 16, 32, 0.0, 200))
    if figures["failed"]:
        raise RuntimeError(figures["errors"])
    return float(figures["output_tokens_per_s"])


async def logging_cost(model: Path, rounds: int, requests: int) -> dict[str, Any]:
    with served(model) as plain, served(model, "--enable-log-requests") as logged:
        for url in (plain, logged):
            await throughput(url, requests // 2)
        ratios, rates = list[float](), list[float]()
        for number in range(rounds):
            order = (plain, logged) if number % 2 else (logged, plain)
            rate = {url: await throughput(url, requests) for url in order}
            ratios.append(rate[logged] / rate[plain])
            rates.append(rate[plain])
    return {
        "tokens_per_s_without": round(statistics.median(rates), 1),
        "with_over_without_median": round(statistics.median(ratios), 4),
        "with_over_without": [round(ratio, 4) for ratio in ratios],
    }


async def refusals(model: Path, count: int) -> dict[str, Any]:
    """A full queue, and clients that come one after another."""
    body = {"model": "tiny", "prompt": [5] * 64, "max_tokens": 1500, "ignore_eos": True}
    content = json.dumps({**body, "max_tokens": 1}).encode()
    with served(model, "--max-num-seqs", "8", "--max-num-queued-reqs", "8") as url:
        busy = [asyncio.create_task(watch(url, "/v1/completions", body)) for _ in range(16)]
        await asyncio.sleep(1.0)
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
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    return {
        name: float(re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.M).group(1))  # type: ignore[union-attr]
        for name in (f"{each}_seconds_{kind}" for each in NAMES for kind in ("sum", "count"))
    }


async def metrics_over_clients(model: Path) -> dict[str, Any]:
    """Sums of 32 streams: the server's times over the clients'."""
    with served(model) as url:
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


async def measure(rounds: int, requests: int, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model")
        return {
            "cpus": len(os.sched_getaffinity(0)),
            "metrics": await metrics_over_clients(model),
            "refusals": await refusals(model, count),
            "logging": await logging_cost(model, rounds, requests),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, default=400, help="of each round")
    parser.add_argument("--refusals", type=int, default=300)
    parser.add_argument("--output-json", type=Path)
    flags = parser.parse_args()
    figures = asyncio.run(measure(flags.rounds, flags.requests, flags.refusals))
    text = json.dumps(figures, indent=1)
    print(text)
    if flags.output_json is not None:
        flags.output_json.write_text(text + "\n")


if __name__ == "__main__":
    main()
