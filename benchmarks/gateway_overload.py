"""What overload does to a service with the gateway's admission, and without it.

    python benchmarks/gateway_overload.py            about three minutes; prints one table, writes it with --json PATH

An engine that only waits, over real sockets: it runs `--slots` requests at once, each for about a second, and lets
all others wait inside, first come first served, as engines do. Clients come at random (Poisson) at a multiple of what
the engine can do, and do not wait for one another. An answer is good when its first token came within `--wanted`
seconds and it was whole. In most rows the gateway is not told the number of slots: it learns from latency. In those
with `says`, the engine's metrics claim so many (the truth, and far too many), and what it has and what waits there.
Each row begins anew; its first third is warm-up and not counted.

The time of a refusal is measured twice: where the client sees it (from its request's first byte to the refusal's head,
connecting included), and in the gateway, from its histogram `mainsail:gateway_refusal_seconds`. Engine, gateway and
clients share one machine, so the client's figure has their turns at the processor in it; `lag` is how late the client's
own event loop is at its 99th percentile, which is no time of the gateway's.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import uvloop

from gateway import CHUNK, END, HEAD, free_port, mainsail, read_request, ready, running, scrape

SERVICE_S = 1.0


async def engine(port: int, slots: int, says: int) -> None:
    """Streams ten events over about a second, for `slots` requests at a time. says: how many it claims; 0: nothing."""
    free = asyncio.Semaphore(slots)
    there = 0

    def metrics() -> bytes:
        running = min(there, slots)
        text = (
            f"vllm:num_requests_running {running}\nvllm:num_requests_waiting {there - running}\n"
            f"vllm:kv_cache_usage_perc 0.1\nmainsail:max_num_seqs {says}\n"
            'vllm:cache_config_info{block_size="16",num_gpu_blocks="1000000"} 1.0\n'
        ).encode()
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal there
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head, body = await read_request(reader)
                if head.startswith("get") and says:
                    writer.write(metrics())
                elif head.startswith("post") and json.loads(body).get("slots"):
                    there += 1
                    try:
                        async with free:
                            await _stream(writer, random.uniform(0.7, 1.3) * SERVICE_S / 10)
                    finally:
                        there -= 1
                else:
                    writer.write(HEAD + CHUNK + END)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", port, backlog=4096) as server:
        await server.serve_forever()


async def _stream(writer: asyncio.StreamWriter, pace_s: float) -> None:
    for i in range(10):
        await asyncio.sleep(pace_s)
        writer.write(HEAD + CHUNK if i == 0 else CHUNK)
        await writer.drain()
    writer.write(END)


async def api_server(port: int, engine_port: int, queue_s: float) -> None:
    """Lists one InferenceService with one endpoint; watches stay silent."""
    meta = {"name": "m", "namespace": "default", "labels": {"mainsail.dev/service": "m"}}
    admission = {"maxQueueTime": f"{round(queue_s * 1000)}ms"}
    services = [{"metadata": meta, "spec": {"model": {"uri": "file:///m"}, "admission": admission}}]
    slices = [{"metadata": meta, "endpoints": [{"addresses": ["127.0.0.1"]}],
               "ports": [{"name": "http", "port": engine_port}]}]  # fmt: skip

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head, _ = await read_request(reader)
                if "watch=true" in head:
                    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                    await reader.read()
                    break
                items = services if "inferenceservices" in head else slices if "endpointslices" in head else []
                body = json.dumps({"metadata": {"resourceVersion": "1"}, "items": items}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", port) as server:
        await server.serve_forever()


@dataclass
class Seen:
    """What came of the requests of one row."""

    sent: int = 0
    good: int = 0
    late: int = 0
    refused_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    retry_after: list[int] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)
    failed: int = 0


async def one(port: int, seen: Seen, counts: bool, wanted_s: float) -> None:
    body = json.dumps({"model": "m", "stream": True, "messages": [], "slots": True}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    start = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " in head.split(b"\r\n")[0]:
            await reader.readuntil(b"data: ")
            first = time.perf_counter() - start
            await reader.readuntil(END)
            if counts:
                seen.good += first <= wanted_s
                seen.late += first > wanted_s
                seen.first_s.append(first)
        elif counts:
            seen.refused_s.append(time.perf_counter() - start)
            seen.retry_after.append(int(head.lower().split(b"retry-after: ")[1].split(b"\r\n")[0]))
        writer.close()
    except (OSError, asyncio.IncompleteReadError):
        seen.failed += counts


async def row(port: int, load: float, args: argparse.Namespace) -> Seen:
    """Requests at `load` times what the engine can do, for a while."""
    rng, seen = random.Random(1), Seen()
    began = time.perf_counter()
    at = 0.0
    watch = asyncio.create_task(watch_lag(seen.lag_s))
    async with asyncio.TaskGroup() as tasks:
        while at < args.seconds:
            at += rng.expovariate(load * args.slots / SERVICE_S)
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            counts = at > args.seconds / 3
            seen.sent += counts
            tasks.create_task(one(port, seen, counts, args.wanted))
    watch.cancel()
    return seen


async def watch_lag(lag_s: list[float]) -> None:
    """How late this process comes to do what is due."""
    while True:
        due = time.perf_counter() + 0.01
        await asyncio.sleep(0.01)
        lag_s.append(time.perf_counter() - due)


def within(before: dict[str, float], after: dict[str, float], bound: str) -> float:
    """The part of the refusals between two scrapes that the gateway had told within `bound` seconds."""
    name = "mainsail:gateway_refusal_seconds_bucket"
    counts = [
        sum(value for series, value in after.items() if series.startswith(name) and f'le="{le}"' in series)
        - sum(value for series, value in before.items() if series.startswith(name) and f'le="{le}"' in series)
        for le in (bound, "+Inf")
    ]
    return counts[0] / counts[1] if counts[1] else 1.0


@dataclass
class Figures:
    """One row of the table."""

    target: str
    says: int | None
    """Slots that the engine claims."""
    load: float
    asked_per_s: float
    good_per_s: float
    refused_per_s: float
    late: int
    failed: int
    first_token_p50_ms: float | None
    first_token_p95_ms: float | None
    refusal_p50_ms: float | None
    refusal_p99_ms: float | None
    client_lag_p99_ms: float | None
    told_within_50_ms: float | None
    """Part of the refusals, by the gateway's own clock."""
    retry_after_s: float | None

    def line(self) -> str:
        values = [f"{self.load:g}×" if name == "load" else value for name, value in asdict(self).items()]
        return "| " + " | ".join(_shown(value) for value in values) + " |"


def _shown(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def ms(values: list[float], part: float) -> float | None:
    return round(sorted(values)[int(part * (len(values) - 1))] * 1000, 1) if values else None


async def measure(target: str, load: float, says: int, args: argparse.Namespace) -> Figures:
    port, api, health = free_port(), free_port(), free_port()
    command = [sys.executable, __file__, "--engine", str(port), "--slots", str(args.slots), "--says", str(says)]
    told = None
    with running(*command), tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as more:
        await ready(port)
        control = asyncio.create_task(api_server(api, port, args.wanted / 2))
        entry = port
        if target == "gateway":
            entry = free_port()
            more.enter_context(running(*mainsail(Path(name), entry, port, api, health)))
            await ready(entry)
        warm = asyncio.create_task(_scraped_at(args.seconds / 3, health)) if target == "gateway" else None
        seen = await row(entry, load, args)
        if warm is not None:
            told = round(within(await warm, await scrape(health), "0.05"), 4)
        control.cancel()
    return figures(target, load, says, seen, told, args.seconds * 2 / 3)


async def _scraped_at(after_s: float, port: int) -> dict[str, float]:
    await asyncio.sleep(after_s)
    return await scrape(port)


def figures(target: str, load: float, says: int, seen: Seen, told: float | None, span_s: float) -> Figures:
    return Figures(
        target=target,
        says=says or None,
        load=load,
        asked_per_s=round(seen.sent / span_s, 1),
        good_per_s=round(seen.good / span_s, 1),
        refused_per_s=round(len(seen.refused_s) / span_s, 1),
        late=seen.late,
        failed=seen.failed,
        first_token_p50_ms=ms(seen.first_s, 0.5),
        first_token_p95_ms=ms(seen.first_s, 0.95),
        refusal_p50_ms=ms(seen.refused_s, 0.5),
        refusal_p99_ms=ms(seen.refused_s, 0.99),
        client_lag_p99_ms=ms(seen.lag_s, 0.99),
        told_within_50_ms=told if seen.refused_s else None,
        retry_after_s=round(statistics.mean(seen.retry_after), 1) if seen.retry_after else None,
    )


async def main(args: argparse.Namespace) -> None:
    print(
        f"{args.slots} slots of {SERVICE_S:g} s; good: first token within {args.wanted:g} s; {args.seconds:g} s a row\n"
    )
    names = [each.name for each in fields(Figures)]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    rows: list[Figures] = []
    wanted = [("engine alone", load, 0) for load in args.direct] + [("gateway", load, 0) for load in args.loads]
    wanted += [("gateway", max(args.loads), says) for says in args.says if says]
    for target, load, says in wanted:
        rows.append(await measure(target, load, says, args))
        print(rows[-1].line(), flush=True)
    ours = [row for row in rows if row.target == "gateway"]
    peak = max(row.good_per_s for row in ours)
    kept = {str(row.says): round(row.good_per_s / peak, 3) for row in ours if row.load == max(args.loads)}
    print(f"\ngoodput at {max(args.loads):g}×, as a part of the peak, by what the engine says: {kept}")
    if args.json:
        setting = {name: getattr(args, name) for name in ("slots", "seconds", "wanted")}
        result = {"setting": setting, "goodput_kept": kept, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slots", type=int, default=32, help="requests that the engine runs at once")
    parser.add_argument("--seconds", type=float, default=24, help="length of a row")
    parser.add_argument("--wanted", type=float, default=2.0, help="seconds to the first token that are good")
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.8, 1, 2, 4], help="multiples of the engine's capacity"
    )
    parser.add_argument("--direct", type=float, nargs="*", default=[1, 4], help="the same, without the gateway")
    parser.add_argument(
        "--says", type=int, nargs="*", default=[32, 256], help="slots that the engine claims, a row of overload each"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        uvloop.run(engine(arguments.engine, arguments.slots, *arguments.says))
    else:
        uvloop.run(main(arguments))
