"""`mainsail-engine run-batch`: a file of OpenAI requests through the engine, without HTTP.

Every line of the input is {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}; every line of the
output {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}, in the input's order. The
requests go through the server's own application, so that what a line may say, and what its answer looks like, is what
it is over HTTP; a bad line fails alone.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from pathlib import Path
from typing import Any, cast

from starlette.types import ASGIApp, Message

from mainsail_engine.config import EngineConfig, ServerConfig
from mainsail_engine.core_process import start_core
from mainsail_engine.errors import InvalidConfigurationError
from mainsail_engine.server.api import ApiServer
from mainsail_engine.server.app import build_app
from mainsail_engine.server.health import Verdict

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


def run_batch(engine: EngineConfig, server: ServerConfig, *, input_path: Path, output_path: Path) -> None:
    """Blocks until all lines are answered. Raises StartupError."""
    if not input_path.is_file():
        raise InvalidConfigurationError(f"--input-file {input_path} does not exist")
    lines = input_path.read_text(encoding="utf-8").splitlines()
    answers = asyncio.run(_run(engine, server, lines))
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    output_path.write_text(text, encoding="utf-8")
    failed = sum(1 for answer in answers if answer["error"] or answer["response"]["status_code"] != 200)
    print(f"{len(answers)} requests answered, {failed} of them with an error: {output_path}", file=sys.stderr)


async def _run(engine: EngineConfig, server: ServerConfig, lines: list[str]) -> list[dict[str, Any]]:
    api = ApiServer(engine, server, start_core(engine), process=0)
    try:
        ready = await api.client.start()
        serving = api.build_serving(ready, api.load_tokenizer())
        app = build_app(serving, look=lambda _: Verdict(True, "ready"), drain=lambda: None, api_key=None)
        return await answer_lines(app, lines, at_once=4 * engine.scheduler.max_num_seqs)
    finally:
        await api.client.close()


async def answer_lines(app: ASGIApp, lines: list[str], *, at_once: int) -> list[dict[str, Any]]:
    """The output's lines. Empty lines are skipped."""
    turns = asyncio.Semaphore(at_once)

    async def one(line: str) -> dict[str, Any]:
        async with turns:
            return await _answer(app, line)

    return await asyncio.gather(*(one(line) for line in lines if line.strip()))


async def _answer(app: ASGIApp, line: str) -> dict[str, Any]:
    try:
        request = _checked(json.loads(line))
    except (ValueError, TypeError) as error:
        wrong = {"code": "invalid_line", "message": str(error)}
        return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": _custom_id(line), "response": None, "error": wrong}
    status, body = await _call(app, request["url"], json.dumps(request["body"]).encode())
    response = {"status_code": status, "request_id": body.get("id") or uuid.uuid4().hex, "body": body}
    answer_id = f"batch_req_{uuid.uuid4().hex}"
    return {"id": answer_id, "custom_id": request["custom_id"], "response": response, "error": None}


def _custom_id(line: str) -> str | None:
    try:
        return cast("dict[str, Any]", json.loads(line)).get("custom_id")
    except (ValueError, AttributeError):
        return None


def _checked(request: Any) -> dict[str, Any]:
    """Raises ValueError that says what the line lacks."""
    if not isinstance(request, dict):
        raise ValueError("a line must be a JSON object")
    fields = cast("dict[str, Any]", request)
    if not isinstance(fields.get("custom_id"), str):
        raise ValueError("custom_id: a text is required")
    if fields.get("method", "POST") != "POST":
        raise ValueError("method: only POST is supported")
    if fields.get("url") not in URLS:
        raise ValueError(f"url: must be one of {', '.join(URLS)}")
    if not isinstance(fields.get("body"), dict):
        raise ValueError("body: a JSON object is required")
    if fields["body"].get("stream"):
        raise ValueError("body.stream: a batch cannot stream")
    return fields


async def _call(app: ASGIApp, path: str, content: bytes) -> tuple[int, dict[str, Any]]:
    """One POST to an ASGI application: (status, body)."""
    parts: list[bytes] = []
    status, received = 500, iter([{"type": "http.request", "body": content, "more_body": False}])
    forever = asyncio.Event()

    async def receive() -> Message:
        message = next(received, None)
        if message is None:
            await forever.wait()  # nobody disconnects
        return message or {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    await app(_scope(path, content), receive, send)
    return status, json.loads(b"".join(parts) or b"{}")


def _scope(path: str, content: bytes) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0),
    }  # fmt: skip
