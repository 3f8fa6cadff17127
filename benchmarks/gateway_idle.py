"""Many idle streams through one gateway: what each costs it, and what a lone request feels of them.

    python benchmarks/gateway_idle.py                10,000 streams through one process, then through two workers

Client, engines and gateway are processes of their own, so that each needs files for its own ends only: a stream has two
sockets in the gateway and one in each of the others. The client comes from several loopback addresses and the engines
are on as many, so that ports do not run out either. Each stream gets its first event and then nothing, until all are
told to end: a stream counts as kept if it then ends whole. Memory is the resident size of the gateway's process tree,
without the kernel's socket buffers (the table has those of the whole machine). Where a process may not have as many
files, the row has as many streams as fit.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from subprocess import Popen

import uvloop

from gateway import (
    END,
    api_server,
    cpu_s,
    free_port,
    lone,
    mainsail_with_keys,
    ready,
    request,
    resident_kib,
    running,
)
from mainsail_gateway.server import allow_many_files, room

ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
AT_ONCE = 50
"""Streams that are begun at the same time: what a listener's queue and one core bear without waiting."""
UNTIL_TOLD = 10_000_000
"""Milliseconds between two events of an idle stream: the engine ends it before, when it is told to (SIGUSR1)."""


@dataclass
class Figures:
    """What the table has. Times in milliseconds, memory in KiB, CPU in percent of a core."""

    workers: int
    streams: int
    begun: int
    ended_whole: int
    seconds_to_begin: float
    kib_per_stream: float
    kernel_kib_per_stream: float
    cpu_while_idle_percent: float
    ttft_alone_p50_ms: float
    ttft_beside_p50_ms: float
    ttft_beside_p99_ms: float


def kernel_kib() -> int:
    """Pages that all TCP sockets of the machine have for their buffers, in KiB."""
    lines = Path("/proc/net/sockstat").read_text().splitlines()
    words = next(line for line in lines if line.startswith("TCP:")).split()
    return 4 * int(words[words.index("mem") + 1])


async def begin(port: int, number: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    """A stream that has had its first event; None when it is refused or does not begin within a minute."""
    address = ADDRESSES[number % len(ADDRESSES)]
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0), limit=4096)
            writer.write(request(2, UNTIL_TOLD))
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " in head.split(b"\r\n")[0]:
                await reader.readuntil(b"data: ")
                return reader, writer
            writer.close()
    return None


async def begin_all(port: int, count: int) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """As many of so many streams as begin."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        async with places:
            return await begin(port, number)

    return [found for found in await asyncio.gather(*(one(n) for n in range(count))) if found is not None]


async def ends_whole(reader: asyncio.StreamReader) -> bool:
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(60):
            return b"[DONE]" in await reader.readuntil(END)
    return False


async def measure(
    port: int, gateway: Popen[bytes], engines: list[Popen[bytes]], workers: int, args: argparse.Namespace
) -> Figures:
    count = min(args.streams, int(0.99 * workers * room(allow_many_files(), workers)))
    alone = await lone(port, args.requests)
    empty, buffers = resident_kib(gateway.pid), kernel_kib()
    start = time.perf_counter()
    streams = await begin_all(port, count)
    took = time.perf_counter() - start
    kib, kernel = resident_kib(gateway.pid) - empty, kernel_kib() - buffers
    before = cpu_s(gateway.pid)
    await asyncio.sleep(args.idle_s)
    burnt = (cpu_s(gateway.pid) - before) / args.idle_s
    beside = await lone(port, args.requests)
    for engine in engines:
        engine.send_signal(signal.SIGUSR1)
    whole = await asyncio.gather(*(ends_whole(reader) for reader, _ in streams))
    for _, writer in streams:
        writer.transport.abort()
    return Figures(
        workers=workers,
        streams=count,
        begun=len(streams),
        ended_whole=sum(whole),
        seconds_to_begin=round(took, 1),
        kib_per_stream=round(kib / max(1, len(streams)), 1),
        kernel_kib_per_stream=round(kernel / max(1, len(streams)), 1),
        cpu_while_idle_percent=round(100 * burnt, 1),
        ttft_alone_p50_ms=round(statistics.median(alone), 3),
        ttft_beside_p50_ms=round(statistics.median(beside), 3),
        ttft_beside_p99_ms=round(statistics.quantiles(beside, n=100)[98], 3),
    )


@contextlib.contextmanager
def engines_on(port: int) -> Iterator[list[Popen[bytes]]]:
    """An engine on each address, all on one port, as pods of a service are."""
    script = str(Path(__file__).with_name("gateway.py"))
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(running(sys.executable, script, "--serve", str(port), address))
               for address in ADDRESSES]  # fmt: skip


async def row(workers: int, args: argparse.Namespace) -> Figures:
    engine, api, port = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory() as name, engines_on(engine) as engines:
        await ready(engine)
        control = asyncio.create_task(api_server(api, engine, ADDRESSES))
        # Who does not take a connection in time is skipped: here all of this machine may stand still for so long.
        patient = ["--workers", str(workers), "--connect-timeout-s", "60"]
        command = [*mainsail_with_keys(Path(name), port, engine, api), *patient]
        with running(*command) as gateway:
            await ready(port)
            figures = await measure(port, gateway, engines, workers, args)
        control.cancel()
    return figures


async def main(args: argparse.Namespace) -> None:
    names = [field.name for field in fields(Figures)]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names), flush=True)
    rows: list[dict[str, float]] = []
    for workers in args.workers:
        rows.append(asdict(await row(workers, args)))
        print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=10_000, help="idle streams")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes of the gateway, a row each")
    parser.add_argument("--requests", type=int, default=300, help="lone requests, before and beside the streams")
    parser.add_argument("--idle-s", type=float, default=5.0, help="how long nothing happens")
    parser.add_argument("--json", type=Path, help="write the figures there")
    uvloop.run(main(parser.parse_args()))
