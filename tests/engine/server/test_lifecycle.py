"""Start, drain, death: exit codes, reasons, and what clients see of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

LONG: dict[str, Any] = {"model": "smol", "prompt": "Once upon a time", "ignore_eos": True, "stream": True}


@pytest.mark.parametrize(
    ("arguments", "reason", "said"),
    [
        (["--model", "/nowhere/at/all"], "ModelNotFound", "/nowhere/at/all"),
        (["--model", "/etc"], "ModelNotFound", "config.json"),
        (["--model", "/etc/hostname"], "UnsupportedModel", ".gguf"),
        (["--model", "/etc", "--dtype", "int3"], "InvalidConfiguration", "--dtype"),
        (["--model", "/etc", "--max-num-seqs", "0"], "InvalidConfiguration", "--max-num-seqs"),
        (["--model", "/etc", "--gpu-memory-utilization", "1.5"], "InvalidConfiguration", "--gpu-memory-utilization"),
        (["--model", "/etc", "--no-such-flag"], "InvalidConfiguration", "--no-such-flag"),
        ([], "InvalidConfiguration", "--model"),
    ],
)
def test_start_up_failures(launch_engine: Callable[..., Any], arguments: list[str], reason: str, said: str) -> None:
    engine = launch_engine(*arguments)
    assert engine.wait() == 1
    lines = engine.log.read_text().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: {reason}: ")
    assert said in lines[0]
    told = json.loads(engine.termination_log.read_text())
    assert told["reason"] == reason
    assert said in told["message"]


def test_a_damaged_model_is_named_by_the_core_or_the_tokenizer(
    launch_engine: Callable[..., Any], smollm2: Path, tmp_path: Path
) -> None:
    model = tmp_path / "cut.gguf"
    with smollm2.open("rb") as file:
        model.write_bytes(file.read(3000))
    engine = launch_engine("--model", str(model))
    assert engine.wait() == 1
    assert str(model) in json.loads(engine.termination_log.read_text())["message"]


def test_a_taken_port_is_said_at_once(launch_engine: Callable[..., Any], engine: Any, smollm2: Path) -> None:
    port = engine.url.rpartition(":")[2]
    second = launch_engine("--model", str(smollm2), "--port", port)
    assert second.wait() == 1
    assert f"--port {port}" in second.log.read_text()


def test_nothing_heavy_is_imported() -> None:
    modules = "mainsail_engine.server.run, mainsail_engine.cli"
    script = (
        f"import sys, {modules}; print([m for m in ('torch', 'triton', 'transformers', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root / "engine")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Stream(threading.Thread):
    """A client that reads one stream to its end."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.events: list[Any] = []
        self.begun = threading.Event()
        self._url, self._body = url + "/v1/completions", {**LONG, "max_tokens": max_tokens}
        self.start()

    def run(self) -> None:
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.Client(timeout=120) as http,
            http.stream("POST", self._url, json=self._body) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line[6:] if "[DONE]" in line else json.loads(line[6:]))
                    self.begun.set()

    def finished(self) -> list[Any]:
        self.join(timeout=500)
        assert not self.is_alive()
        return self.events


@pytest.mark.model
def test_sigterm_drains(own_engine: Callable[..., Any], waiting: Callable[..., None]) -> None:
    engine = own_engine("--drain-timeout", "600")
    stream = Stream(engine.url, 500)
    assert stream.begun.wait(240)
    os.kill(engine.core_pid(), signal.SIGSTOP)  # so that the stream does not end while we look
    engine.terminate()
    waiting(lambda: engine.http.get(engine.url + "/health/ready").status_code == 503, "readiness to fail")
    assert engine.http.get(engine.url + "/health/live").status_code == 200
    refused = engine.post("/v1/completions", model="smol", prompt="x", max_tokens=1)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    os.kill(engine.core_pid(), signal.SIGCONT)
    events = stream.finished()
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert engine.wait() == 0


@pytest.mark.model
def test_what_does_not_finish_in_time_is_told(own_engine: Callable[..., Any]) -> None:
    engine = own_engine("--drain-timeout", "0.2")
    stream = Stream(engine.url, 3000)
    assert stream.begun.wait(240)
    assert engine.post("/drain").status_code == 202
    events = stream.finished()
    assert events[-2]["error"]["code"] == "shutting_down"
    assert engine.wait() == 0


@pytest.mark.model
def test_the_cores_death_is_an_error_and_an_exit(own_engine: Callable[..., Any]) -> None:
    engine = own_engine()
    stream = Stream(engine.url, 3000)
    assert stream.begun.wait(240)
    os.kill(engine.core_pid(), signal.SIGKILL)
    events = stream.finished()
    assert events[-2]["error"]["code"] == "engine_failed"
    assert engine.wait() == 1
    assert "error: EngineFailed: " in engine.log.read_text()
    assert json.loads(engine.termination_log.read_text())["reason"] == "EngineFailed"


@pytest.mark.model
def test_a_hung_step_fails_liveness_and_the_core_goes_with_its_parent(
    own_engine: Callable[..., Any], waiting: Callable[..., None]
) -> None:
    engine = own_engine("--live-limit", "1", "--health-port", "0")
    core = engine.core_pid()
    stream = Stream(engine.url, 3000)
    assert stream.begun.wait(240)
    process = psutil.Process(engine.process.pid)
    listeners = [each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    assert len(listeners) == 2

    def live() -> set[int]:
        """As the listener of its own thread says, and the API's."""
        return {engine.http.get(f"http://127.0.0.1:{port}/health/live").status_code for port in listeners}

    waiting(lambda: live() == {200}, "steps to be made within a second each")
    os.kill(core, signal.SIGSTOP)
    waiting(lambda: live() == {503}, "liveness to fail")
    os.kill(core, signal.SIGCONT)
    waiting(lambda: live() == {200}, "liveness to come back")
    engine.process.kill()
    waiting(lambda: not Path(f"/proc/{core}").exists() or _is_zombie(core), "the core to end with its parent")


def _is_zombie(pid: int) -> bool:
    return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.model
def test_key_and_overload(own_engine: Callable[..., Any]) -> None:
    engine = own_engine(
        "--api-key", "secret", "--max-num-queued-reqs", "1", "--max-num-seqs", "1", "--enable-log-requests"
    )
    body = {"model": "smol", "prompt": "x", "max_tokens": 1}
    assert engine.post("/v1/completions", **body).status_code == 401
    assert engine.http.get(engine.url + "/metrics").status_code == 200
    engine.http.headers["authorization"] = "Bearer wrong"
    assert engine.post("/v1/completions", **body).json()["error"]["type"] == "authentication_error"
    engine.http.headers["authorization"] = "Bearer secret"
    assert engine.post("/v1/completions", **body).status_code == 200
    prompts = ["y " * 50 for _ in range(8)]
    with engine.http.stream(
        "POST", engine.url + "/v1/completions", json={**LONG, "prompt": prompts, "max_tokens": 60}
    ) as s:
        lines = s.iter_lines()  # kept: letting go of it would close the stream
        assert next(lines)
        os.kill(engine.core_pid(), signal.SIGSTOP)  # so that it is still busy
        refused = engine.post("/v1/completions", **body)
        os.kill(engine.core_pid(), signal.SIGCONT)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert engine.metric("vllm:admission_rejections_total", reason="max_num_queued_reqs") == 1
    log = engine.log.read_text()
    assert "1 generated" in log
    assert not any(said in log for said in ("secret", "wrong", "y y y"))
