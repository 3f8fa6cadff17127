"""What overload does to a service with the gateway's admission, and without it.

    python benchmarks/gateway_overload.py            about three minutes; prints one table

An engine that only waits, over real sockets: it runs `--slots` requests at once, each for about a second, and lets
all others wait inside, first come first served, as engines do. Clients come at random (Poisson) at a multiple of what
the engine can do, and do not wait for one another. An answer is good when its first token came within `--wanted`
seconds and it was whole. The gateway is not told the number of slots: it learns from latency. Each row begins
anew; its first third is warm-up and not counted.
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
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from gateway import CHUNK, END, HEAD, free_port, mainsail, read_request, ready, running

SERVICE_S = 1.0


async def engine(port: int, slots: int) -> None:
    """Streams ten events over about a second, for `slots` requests at a time."""
    free = asyncio.Semaphore(slots)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head, body = await read_request(reader)
                if head.startswith("post") and json.loads(body).get("slots"):
                    await free.acquire()
                    try:
                        await _stream(writer, random.uniform(0.7, 1.3) * SERVICE_S / 10)
                    finally:
                        free.release()
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
    async with asyncio.TaskGroup() as tasks:
        while at < args.seconds:
            at += rng.expovariate(load * args.slots / SERVICE_S)
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            counts = at > args.seconds / 3
            seen.sent += counts
            tasks.create_task(one(port, seen, counts, args.wanted))
    return seen


def ms(values: list[float], part: float) -> str:
    return f"{sorted(values)[int(part * (len(values) - 1))] * 1000:.0f}" if values else "–"


async def measure(target: str, load: float, args: argparse.Namespace) -> float:
    """One row of the table; its goodput."""
    port, api = free_port(), free_port()
    command = [sys.executable, __file__, "--engine", str(port), "--slots", str(args.slots)]
    with running(*command), tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as more:
        await ready(port)
        control = asyncio.create_task(api_server(api, port, args.wanted / 2))
        entry = port
        if target == "gateway":
            entry = free_port()
            more.enter_context(running(*mainsail(Path(name), entry, port, api)))
            await ready(entry)
        seen = await row(entry, load, args)
        control.cancel()
    span = args.seconds * 2 / 3
    goodput = seen.good / span
    retry = statistics.mean(seen.retry_after) if seen.retry_after else 0
    print(
        f"| {target} | {load:g}× | {seen.sent / span:.0f} | {goodput:.1f} | {len(seen.refused_s) / span:.0f} "
        f"| {seen.late} | {ms(seen.first_s, 0.5)} | {ms(seen.first_s, 0.95)} | {ms(seen.refused_s, 0.5)} "
        f"| {ms(seen.refused_s, 0.99)} | {retry:.1f} | {seen.failed} |",
        flush=True,
    )
    return goodput


async def main(args: argparse.Namespace) -> None:
    print(
        f"{args.slots} slots of {SERVICE_S:g} s; good: first token within {args.wanted:g} s; {args.seconds:g} s a row\n"
    )
    columns = "load | asked/s | good/s | refused/s | late | first token p50 ms | p95 | refusal p50 ms | p99"
    print(f"| | {columns} | Retry-After s | failed |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for load in args.direct:
        await measure("engine alone", load, args)
    goodput = {load: await measure("gateway", load, args) for load in args.loads}
    print(
        f"\ngoodput at {args.loads[-1]:g}×: {100 * goodput[args.loads[-1]] / max(goodput.values()):.0f} % of the peak"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slots", type=int, default=32, help="requests that the engine runs at once")
    parser.add_argument("--seconds", type=float, default=24, help="length of a row")
    parser.add_argument("--wanted", type=float, default=2.0, help="seconds to the first token that are good")
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.8, 1, 2, 4], help="multiples of the engine's capacity"
    )
    parser.add_argument("--direct", type=float, nargs="*", default=[1, 4], help="the same, without the gateway")
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    uvloop.run(engine(arguments.engine, arguments.slots) if arguments.engine else main(arguments))
