"""A real engine: `mainsail-engine serve` as a process on free loopback ports, shared by a whole session of tests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from tests.engine.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[3]
START_S = 240.0
PATIENT = ("--max-queue-wait", "0")
"""Nobody is refused because this machine is slow."""


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:.0f} s for: {what}")
        time.sleep(0.02)


@dataclass
class Engine:
    """One running server."""

    process: subprocess.Popen[bytes]
    log: Path
    termination_log: Path
    url: str = ""
    name: str = "smol"
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=120))

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(self.url + path, json=body)

    def chat(self, **body: object) -> httpx.Response:
        return self.post("/v1/chat/completions", model=self.name, **body)

    def metric(self, name: str, **labels: str) -> float:
        total = 0.0
        for line in self.http.get(self.url + "/metrics").text.splitlines():
            if re.match(rf"{re.escape(name)}({{| )", line) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total

    def idle(self) -> bool:
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        return all(self.metric(gauge) == 0 for gauge in gauges)

    def memory_kib(self) -> int:
        """What API processes and core hold together."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        status = [Path(f"/proc/{pid}/status").read_text() for pid in (self.process.pid, *children)]
        return sum(int(re.search(r"VmRSS:\s+(\d+)", text).group(1)) for text in status)  # type: ignore[union-attr]

    def core_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        return next(pid for pid, command in commands.items() if b"mainsail_engine.core" in command)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(timeout=240)

    def close(self) -> None:
        """Ends also what a test has stopped."""
        self.http.close()
        if self.process.poll() is None:
            below = psutil.Process(self.process.pid).children(recursive=True)
            for process in (self.process, *below):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()


def launch(folder: Path, *arguments: str) -> Engine:
    """Start the command; do not wait for it."""
    log, termination_log = folder / "log", folder / "termination-log"
    termination_log.touch()
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}",
        "MAINSAIL_TERMINATION_LOG": str(termination_log),
    }
    command = [sys.executable, "-m", "mainsail_engine.cli", "serve", "--host", "127.0.0.1", "--port", "0", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    return Engine(process, log, termination_log)


def start(folder: Path, model: Path, *arguments: str) -> Engine:
    """Start a server for the model and wait until it is ready. In float32, where near ties are rare enough to compare
    texts of different batches."""
    named = ("--served-model-name", "smol", "other", "--dtype", "float32")
    engine = launch(folder, "--model", str(model), *named, *arguments)

    def announced() -> bool:
        if engine.process.poll() is not None:
            pytest.fail(f"the server ended: {engine.log.read_text()}")
        found = re.search(r"ready: (http://[^/]+)/v1", engine.log.read_text())
        engine.url = found.group(1) if found else ""
        return bool(found)

    wait_for(announced, "the server's start", START_S)
    return engine


@pytest.fixture(scope="session")
def engine(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    running = start(tmp_path_factory.mktemp("engine"), smollm2, "--kv-cache-blocks", "1024", "--max-num-seqs", "32")
    yield running
    running.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A server of random weights that answers in milliseconds, with two API processes."""
    folder = tmp_path_factory.mktemp("tiny-engine")
    arguments = ("--kv-cache-blocks", "2048", "--max-num-seqs", "64", "--api-server-count", "2")
    running = start(folder, tiny_model, *arguments, "--max-num-queued-reqs", "4096", *PATIENT)
    yield running
    running.close()


@pytest.fixture(scope="session")
def small_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same with a context of 64 tokens: whatever is asked for ends soon."""
    model = make_tiny_model(tmp_path_factory.mktemp("small") / "model", max_len=64)
    folder = tmp_path_factory.mktemp("small-engine")
    arguments = ("--kv-cache-blocks", "512", "--max-num-seqs", "64", "--api-server-count", "2")
    running = start(folder, model, *arguments, *PATIENT)
    yield running
    running.close()


@pytest.fixture
def launch_engine(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Starts the command with any arguments, and cleans up."""
    launched: list[Engine] = []

    def run(*arguments: str) -> Engine:
        launched.append(launch(tmp_path, *arguments))
        return launched[-1]

    yield run
    for item in launched:
        item.close()


@pytest.fixture
def own_engine(smollm2: Path, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Starts a server that the test may kill."""
    started: list[Engine] = []

    def run(*arguments: str) -> Engine:
        started.append(start(tmp_path, smollm2, "--kv-cache-blocks", "256", *arguments))
        return started[-1]

    yield run
    for item in started:
        item.close()


@pytest.fixture
def waiting() -> Callable[..., None]:
    """Wait until a condition holds."""
    return wait_for
