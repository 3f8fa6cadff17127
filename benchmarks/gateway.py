"""What the gateway costs, beside a direct connection, plain uvicorn and, where installed, nginx and Rust routers.

    python benchmarks/gateway.py            about two minutes; prints one table, writes it with --json PATH
    python benchmarks/gateway.py --only mainsail_2_workers --idle 10000

One upstream streams server-sent events at a fixed pace. Every target is measured by the same client over loopback, one
after the other: lone requests on a kept connection (time to the first event, CPU per request of one event), then many
streams at once (CPU per event), then idle streams that have had one event (memory of each; the time to the first event
of a lone request beside them). CPU is user + system time of the target's process tree. The gateway runs as it does in a
cluster, with everything on: API keys with limits, admission, balance, metrics, an API server's list and watch answered
here; the upstream tells it the token ids in the side form, as engines do, so that what fail-over costs is in the
figure. The others check no keys. `direct` is the upstream itself.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

EVENT = b"data: " + json.dumps({"choices": [{"delta": {"content": "x" * 150}}]}).encode() + b"\n\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
END = b"0\r\n\r\n"
KEY = "sk-" + "benchmark" * 4
NOTED = b":ids %d 0=12345\n" % len(EVENT) + EVENT
NOTED_CHUNK = b"%x\r\n%b\r\n" % (len(NOTED), NOTED)
DONE = b"data: [DONE]\n\n"
NOTED_DONE = b":ids %d\n" % len(DONE) + DONE
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = next((int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
    return head, await reader.readexactly(length)


def allow_many_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def upstream(port: int, host: str = "127.0.0.1") -> None:
    """Answers each request with so many events, so many ms apart, as its message says: routers write bodies anew.
    SIGUSR1 ends the streams that wait for long."""
    allow_many_files()
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, told.set)

    async def pause(reader: asyncio.StreamReader, seconds: float) -> None:
        """So long; where that is long, at most until it is told to go on, and no longer than the client is there."""
        if seconds < 1:
            await asyncio.sleep(seconds)
            return
        gone, ends = asyncio.create_task(reader.read(1)), asyncio.create_task(told.wait())
        done, _ = await asyncio.wait((gone, ends), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        ends.cancel()
        if gone in done:
            raise ConnectionError("the client has gone")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head, body = await read_request(reader)
                if not head.startswith("post"):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                    continue
                count, pace_ms = map(int, json.loads(body)["messages"][0]["content"].split())
                noted = "x-mainsail-stream: ids" in head
                said = b"x-mainsail-stream: ids id=c-1 created=1\r\n\r\n"
                chunk, done = (NOTED_CHUNK, NOTED_DONE) if noted else (CHUNK, DONE)
                writer.write((HEAD[:-2] + said if noted else HEAD) + chunk)
                for _ in range(count - 1):
                    await pause(reader, pace_ms / 1000)
                    writer.write(chunk)
                writer.write(b"%x\r\n%b\r\n" % (len(done), done) + END)
        writer.close()

    async with await asyncio.start_server(serve, host, port, backlog=4096) as server:
        await server.serve_forever()


async def api_server(port: int, engine: int, addresses: Sequence[str] = ("127.0.0.1",)) -> None:
    """Lists one InferenceService with an endpoint on each address; watches stay silent."""
    meta = {"name": "m", "namespace": "default", "labels": {"mainsail.dev/service": "m"}}
    admission = {"maxConcurrency": 100000, "maxQueuedRequests": 100000, "maxQueueTime": "1000s"}
    services = [{"metadata": meta, "spec": {"model": {"uri": "file:///m"}, "admission": admission}}]
    limits = {"key": KEY, "models": "m*", "requestsPerMinute": "10000000", "tokensPerMinute": "10000000000"}
    data = {name: base64.b64encode(value.encode()).decode() for name, value in limits.items()}
    secrets = [{"metadata": {"name": "key", "namespace": "default"}, "data": data}]
    ports = [{"name": "http", "port": engine}]
    slices = [{"metadata": meta, "endpoints": [{"addresses": [address]} for address in addresses], "ports": ports}]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head, _ = await read_request(reader)
                if "watch=true" in head:
                    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                    await reader.read()
                    break
                lists = {"inferenceservices": services, "endpointslices": slices, "secrets": secrets}
                items = next((found for name, found in lists.items() if name in head), [])
                body = json.dumps({"metadata": {"resourceVersion": "1"}, "items": items}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", port) as server:
        await server.serve_forever()


def cpu_s(pid: int) -> float:
    """User and system seconds of a process and all that it started."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(cpu_s(int(child)) for child in children)


def resident_kib(pid: int) -> int:
    """Memory of a process and all that it started."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    own = next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(resident_kib(int(child)) for child in children)


def free_port() -> int:
    """Not one of those that the kernel gives to whoever connects meanwhile."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, lowest if lowest > 20_000 else 65_536)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def request(n: int, pace_ms: int) -> bytes:
    messages = [{"role": "user", "content": f"{n} {pace_ms}"}]
    body = json.dumps({"model": "m", "stream": True, "messages": messages}).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    return head % (KEY.encode(), len(body)) + body


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> float:
    """One request to its end; the seconds until the first event."""
    start = time.perf_counter()
    writer.write(data)
    got = await reader.readuntil(b"data: ")
    first = time.perf_counter() - start
    if b"200" not in got.split(b"\r\n")[0]:
        raise RuntimeError(f"not answered: {got[:300]!r}")
    await reader.readuntil(END)
    return first


Target = Callable[[Path, int, int, int], list[str]]
"""A folder for its files, its port, the upstream's and the API server's → its command."""


@dataclass
class Figures:
    """One row of the table. Times in milliseconds, CPU in microseconds, memory in KiB."""

    target: str
    ttft_p50_ms: float
    ttft_p99_ms: float
    cpu_per_request_us: float
    cpu_per_event_us: float
    kib_per_idle_stream: float
    ttft_beside_idle_ms: float


async def lone(port: int, count: int) -> list[float]:
    """Milliseconds to the first event, one request after the other on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(50):
        await exchange(reader, writer, request(1, 0))
    times = [await exchange(reader, writer, request(1, 0)) * 1000 for _ in range(count)]
    writer.close()
    return times


async def flowing(port: int, pid: int, args: argparse.Namespace) -> float:
    """CPU seconds of the target while many streams flow."""
    pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(args.streams)]
    before = cpu_s(pid)
    await asyncio.gather(*(exchange(*pair, request(args.events, args.pace_ms)) for pair in pairs))
    total = cpu_s(pid) - before
    for _, writer in pairs:
        writer.close()
    return total


async def idle(port: int, pid: int, count: int) -> tuple[float, float]:
    """KiB for each of so many streams that have had their first event; TTFT in ms of a lone request beside them."""
    empty = resident_kib(pid)
    writers: list[asyncio.StreamWriter] = []
    for begun in range(0, count, 100):  # a hundred at a time, as a listener's queue bears
        found = await asyncio.gather(*(_begun(port) for _ in range(min(100, count - begun))))
        writers += found
    held = resident_kib(pid) - empty
    beside = statistics.median(await lone(port, 20))
    for writer in writers:
        writer.transport.abort()
    return held / count, beside


async def _begun(port: int) -> asyncio.StreamWriter:
    """A stream that has had its first event, and gets no other for ten minutes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(2, 600_000))
    await asyncio.wait_for(reader.readuntil(b"data: "), 60)
    return writer


async def measure(target: str, port: int, pid: int, args: argparse.Namespace) -> Figures:
    await lone(port, 50)
    before = cpu_s(pid)
    times = await lone(port, args.requests)
    per_request = (cpu_s(pid) - before) / (args.requests + 50)
    per_event = (await flowing(port, pid, args) - per_request * args.streams) / (args.streams * args.events)
    memory, beside = await idle(port, pid, args.idle) if args.idle else (0.0, 0.0)
    return Figures(
        target=target,
        ttft_p50_ms=round(statistics.median(times), 3),
        ttft_p99_ms=round(statistics.quantiles(times, n=100)[98], 3),
        cpu_per_request_us=round(per_request * 1e6),
        cpu_per_event_us=round(per_event * 1e6, 1),
        kib_per_idle_stream=round(memory, 1),
        ttft_beside_idle_ms=round(beside, 3),
    )


async def ready(port: int) -> None:
    """Until a whole exchange works."""
    async with asyncio.timeout(120):
        while True:
            with contextlib.suppress(OSError, RuntimeError, asyncio.IncompleteReadError, TimeoutError):
                async with asyncio.timeout(10):
                    await exchange(*await asyncio.open_connection("127.0.0.1", port), request(1, 0))
                return
            await asyncio.sleep(0.1)


async def scrape(port: int) -> dict[str, float]:
    """What the gateway's health port says: series with their labels as they are written, and values."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    lines = (line.rpartition(" ") for line in text.splitlines() if line.startswith("mainsail:"))
    return {series: float(value) for series, _, value in lines}


def mainsail(folder: Path, port: int, engine: int, api: int, health: int | None = None) -> list[str]:
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": f"http://127.0.0.1:{api}"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    (folder / "kubeconfig").write_text(json.dumps(config))
    return [
        sys.executable, "-m", "mainsail_gateway", "--host", "127.0.0.1", "--port", str(port),
        "--health-port", str(health or free_port()), "--kubeconfig", str(folder / "kubeconfig"), "--drain-delay-s", "0",
    ]  # fmt: skip


def mainsail_with_keys(folder: Path, port: int, engine: int, api: int) -> list[str]:
    return [*mainsail(folder, port, engine, api), "--auth", "keys", "--keys-namespace", "default"]


def mainsail_2_workers(folder: Path, port: int, engine: int, api: int) -> list[str]:
    return [*mainsail_with_keys(folder, port, engine, api), "--workers", "2"]


def nginx(folder: Path, port: int, engine: int, api: int) -> list[str]:
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/log; worker_processes 1;"
        f" events {{ worker_connections 16384; }}"
        f" http {{ access_log off; upstream u {{ server 127.0.0.1:{engine}; keepalive 256; }} server {{"
        f" listen 127.0.0.1:{port}; keepalive_requests 1000000;"
        " location / { proxy_pass http://u; proxy_http_version 1.1;"
        ' proxy_set_header Connection ""; proxy_buffering off; } } }'
    )
    return ["nginx", "-c", str(folder / "nginx.conf")]


def vllm_router(folder: Path, port: int, engine: int, api: int) -> list[str]:
    return [
        "vllm-router", "--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://127.0.0.1:{engine}",
        "--prometheus-port", str(free_port()),
    ]  # fmt: skip


def sglang_router(folder: Path, port: int, engine: int, api: int) -> list[str]:
    return [
        "sglang-router", "launch", "--host", "127.0.0.1", "--port", str(port),
        "--worker-urls", f"http://127.0.0.1:{engine}", "--prometheus-port", str(free_port()),
    ]  # fmt: skip


def uvicorn_alone(folder: Path, port: int, engine: int, api: int) -> list[str]:
    return [sys.executable, __file__, "--pass-through", str(port), str(engine)]


def pass_through(port: int, engine: int) -> None:
    """The least that an ASGI application can do: no routing, no policy, one open connection a request to the engine."""
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        reader, writer = await asyncio.open_connection("127.0.0.1", engine)
        head = f"POST {scope['path']} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await reader.readuntil(b"\r\n\r\n")
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while size := int(await reader.readline(), 16):
            data = await reader.readexactly(size + 2)
            await send({"type": "http.response.body", "body": data[:-2], "more_body": True})
        writer.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    config = uvicorn.Config(app, port=port, loop="uvloop", http="httptools", lifespan="off", access_log=False)
    uvicorn.Server(config).run()


COLUMNS = (
    "| | TTFT p50 ms | added | TTFT p99 ms | added | CPU µs/request | CPU µs/event | requests/s a core "
    "| streams a core at 50 events/s | KiB/idle stream | TTFT ms beside them |"
)


def line(row: Figures, direct: Figures) -> str:
    return (
        f"| {row.target} | {row.ttft_p50_ms:.2f} | {row.ttft_p50_ms - direct.ttft_p50_ms:.2f} "
        f"| {row.ttft_p99_ms:.2f} | {row.ttft_p99_ms - direct.ttft_p99_ms:.2f} "
        f"| {row.cpu_per_request_us:.0f} | {row.cpu_per_event_us:.0f} "
        f"| {1e6 / max(row.cpu_per_request_us, 1):.0f} | {1e6 / max(row.cpu_per_event_us, 0.1) / 50:.0f} "
        f"| {row.kib_per_idle_stream:.0f} | {row.ttft_beside_idle_ms:.2f} |"
    )


async def beside(target: Target, folder: Path, engine: int, api: int, args: argparse.Namespace) -> Figures | None:
    """A target's figures; None, said, where it is not there."""
    port = free_port()
    command = target(folder, port, engine, api)
    if shutil.which(command[0]) is None:
        print(f"{target.__name__}: not installed, left out")
        return None
    with running(*command) as process:
        try:
            await ready(port)
        except TimeoutError:
            print(f"{target.__name__}: did not start, left out")
            return None
        return await measure(target.__name__, port, process.pid, args)


async def main(args: argparse.Namespace) -> None:
    allow_many_files()
    engine, api = free_port(), free_port()
    setting = {name: getattr(args, name) for name in ("requests", "streams", "events", "pace_ms", "idle")}
    print(setting, COLUMNS, "|---" * 11 + "|", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as name, running(sys.executable, __file__, "--serve", str(engine)) as process:
        await ready(engine)
        rows = [await measure("direct", engine, process.pid, args)]
        print(line(rows[0], rows[0]), flush=True)
        control = asyncio.create_task(api_server(api, engine))
        for target in (mainsail_with_keys, mainsail_2_workers, uvicorn_alone, nginx, vllm_router, sglang_router):
            row = await beside(target, Path(name), engine, api, args) if args.only in ("", target.__name__) else None
            if row is not None:
                rows.append(row)
                print(line(row, rows[0]), flush=True)
        control.cancel()
    if args.json:
        result = {"setting": setting, "cores": os.cpu_count(), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1000, help="lone requests")
    parser.add_argument("--streams", type=int, default=100, help="streams at once")
    parser.add_argument("--events", type=int, default=200, help="events of a stream")
    parser.add_argument("--pace-ms", type=int, default=20, help="between two events of a stream")
    parser.add_argument("--idle", type=int, default=1000, help="streams that have had one event; 0: not measured")
    parser.add_argument("--only", default="", help="one target by its name")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--pass-through", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pass_through:
        pass_through(*arguments.pass_through)
    else:
        uvloop.run(upstream(int(arguments.serve[0]), *arguments.serve[1:]) if arguments.serve else main(arguments))
