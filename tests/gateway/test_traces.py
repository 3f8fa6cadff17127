"""One trace from the client through the gateway to a real engine, sent over OTLP to a real collector's socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.engine.server.conftest import Engine, start
from tests.engine.tiny import make_tiny_model

from mainsail_gateway.record import tracing
from mainsail_gateway.routes import Endpoint

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes what exporters send."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                for part in ExportTraceServiceRequest.FromString(body).resource_spans:
                    named = {a.key: a.value.string_value for a in part.resource.attributes}
                    for scope in part.scope_spans:
                        collector.spans += [(named["service.name"], span) for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def engine(collector: Collector, tmp_path: Path) -> Iterator[Engine]:
    model = make_tiny_model(tmp_path / "model")
    made = start(tmp_path, model, "--kv-cache-blocks", "300", "--otlp-traces-endpoint", collector.url)
    yield made
    made.close()


async def test_the_engines_spans_join_the_clients_trace(kit, collector: Collector, engine: Engine) -> None:
    end = Endpoint("e", "127.0.0.1", urlsplit(engine.url).port or 0, "pod")
    provider = tracing(collector.url, 0.0)
    async with (
        kit.gateway(kit.service(end, name="smol"), traces=provider) as gw,
        httpx.AsyncClient(timeout=60) as client,
    ):
        for sampled in ("00", "01"):
            answer = await client.post(
                gw.url + "/v1/chat/completions",
                json={"model": "smol", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3,
                      "ignore_eos": True, "stream": sampled == "01"},
                headers={"traceparent": f"00-{TRACE}-{PARENT}-{sampled}"},
            )  # fmt: skip
            assert answer.status_code == 200, answer.text
    provider.shutdown()
    engine.terminate()
    engine.wait()
    spans = {(service, span.name): span for service, span in collector.spans}
    assert len(collector.spans) == 3, "who is not to be sampled is not"
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    name = "POST /v1/chat/completions"
    front, back = spans["mainsail-gateway", name], spans["mainsail-engine", name]
    generation = spans["mainsail-engine", "llm_request"]
    parents = [span.parent_span_id.hex() for span in (front, back, generation)]
    assert parents == [PARENT, front.span_id.hex(), back.span_id.hex()]
    said = {a.key: a.value for a in generation.attributes}
    assert said["gen_ai.usage.completion_tokens"].int_value == 3
    assert said["gen_ai.usage.prompt_tokens"].int_value > 0
    assert said["gen_ai.response.finish_reason"].string_value == "length"
    assert said["gen_ai.latency.time_in_queue"].double_value >= 0
    first, whole = (said[f"gen_ai.latency.{n}"].double_value for n in ("time_to_first_token", "e2e"))
    assert 0 < first <= whole
    assert {a.key: a.value.int_value for a in back.attributes}["http.response.status_code"] == 200
