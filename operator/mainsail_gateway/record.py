"""What is told of each request: a line in the access log, a span of its trace. Both are off unless asked for.

Nothing of a request's content is ever told, nor its key: names, sizes, times and what became of it.

Traces follow W3C Trace Context. With `--otlp-endpoint`, the gateway's own span joins the client's trace, or begins
one, and the engine's requests carry it on (`traceparent`); without it, what the client sent goes on unchanged. The
SDK is an optional part (`mainsail[tracing]`), imported only then.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from mainsail_gateway.asgi import Headers, Scope

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

    from mainsail_gateway.chain import Asked
    from mainsail_gateway.relay import Call

access_log = logging.getLogger("mainsail.access")
_CARRIED = (b"traceparent", b"tracestate")


@dataclass(slots=True)
class Record:
    """One request, as it will be told."""

    method: str
    path: str
    request_id: str
    began: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)
    asked: Asked | None = None
    call: Call | None = None
    """The last call that was made for it."""
    admitted: float | None = None
    """When it was let in, after waiting or at once."""
    first_s: float | None = None
    span: Span | None = None

    def onto(self, headers: Headers) -> Headers:
        """The headers with this span as the parent of what an engine does."""
        if self.span is None:
            return headers
        from opentelemetry.propagate import inject
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        inject(carrier, set_span_in_context(self.span))
        kept = [header for header in headers if header[0] not in _CARRIED]
        return kept + [(name.encode(), value.encode()) for name, value in carrier.items()]

    def facts(self, status: int, now: float) -> dict[str, Any]:
        """What became of it, by the names of the log's fields."""
        asked, call = self.asked, self.call
        found: dict[str, Any] = {
            "method": self.method,
            "path": self.path[:200],
            "request_id": self.request_id,
            "status": status,
            "duration_ms": round((now - self.began) * 1000, 1),
        }
        if asked is not None:
            found |= {"model": asked.parsed.model[:200], "stream": asked.parsed.stream, "bytes": len(asked.body)}
            if asked.key is not None:
                found["key"] = asked.key.name
        if call is not None:
            found |= {"namespace": call.service.namespace, "service": call.service.name, **call.where()}
        if self.admitted is not None:
            found["waited_ms"] = round((self.admitted - self.began) * 1000, 1)
        if self.first_s is not None:
            found["first_token_ms"] = round(self.first_s * 1000, 1)
        return found


class Recorder:
    """Begins and ends records. With neither log nor traces it makes none."""

    def __init__(self, *, access_log: bool = False, provider: TracerProvider | None = None) -> None:
        self._access = access_log
        self._provider = provider
        self._tracer: Tracer | None = provider.get_tracer("mainsail_gateway") if provider else None

    def begin(self, scope: Scope, request_id: bytes) -> Record | None:
        if not self._access and self._tracer is None:
            return None
        record = Record(scope["method"], scope["path"], request_id.decode())
        if self._tracer is not None:
            from opentelemetry.propagate import extract
            from opentelemetry.trace import SpanKind

            carried = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CARRIED}
            name = f"{record.method} {record.path[:100]}"
            record.span = self._tracer.start_span(name, context=extract(carried), kind=SpanKind.SERVER)
        return record

    def end(self, record: Record, status: int) -> None:
        facts = record.facts(status, time.monotonic())
        if self._access:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.began_at))
            access_log.info(msgspec.json.encode({"time": stamp, **facts}).decode())
        if record.span is not None:
            from opentelemetry.trace import StatusCode

            record.span.set_attributes({_SPAN_NAMES.get(name, f"mainsail.{name}"): v for name, v in facts.items()})
            if status >= 500:
                record.span.set_status(StatusCode.ERROR)
            record.span.end()

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


_SPAN_NAMES = {
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
    "bytes": "http.request.body.size",
    "model": "gen_ai.request.model",
    "pod": "k8s.pod.name",
    "namespace": "k8s.namespace.name",
}
"""OpenTelemetry's names, where it has one."""


def tracing(endpoint: str, ratio: float, exporter: SpanExporter | None = None) -> TracerProvider:
    """Where spans go. ratio: the part of the traces that begin here; others' decisions are followed.

    Raises ImportError without the optional part."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(ratio), resource=Resource.create({"service.name": "mainsail-gateway"})
    )
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
    return provider
