"""Spans of requests, in the trace that a gateway or a client began (W3C Trace Context), sent over OTLP.

    POST /v1/chat/completions      from the request's head to the answer's last byte; parent: `traceparent`, if it came
    └─ llm_request                 each generation of it: queue, first token, tokens, why it ended; vLLM's attributes

Only with `--otlp-traces-endpoint`, which needs the optional part (`mainsail[tracing]`), imported only then; without it
a request costs one look-up of a context variable. A parent's decision whether to sample is followed; who comes without
one is traced. Names, counts and times, never what was said.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mainsail_engine.errors import StartupError
from mainsail_engine.metrics import RequestTimes

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_current: ContextVar[Traced | None] = ContextVar("mainsail.span", default=None)
_CARRIED = (b"traceparent", b"tracestate")


def provider_for(endpoint: str, exporter: SpanExporter | None = None) -> TracerProvider:
    """Where spans go. Raises StartupError without the optional part."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        needed = "an optional part: pip install '.[tracing]' in Mainsail's repository"
        message = f"--otlp-traces-endpoint needs {needed} ({error})"
        raise StartupError(message) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "mainsail-engine"}))
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Traced:
    """One HTTP request's span, and those under it."""

    def __init__(self, provider: TracerProvider, scope: Scope) -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        self._tracer = provider.get_tracer("mainsail_engine")
        carried = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CARRIED}
        name = f"{scope['method']} {scope['path'][:100]}"
        self._span = self._tracer.start_span(name, context=extract(carried), kind=SpanKind.SERVER)
        self._span.set_attributes({"http.request.method": scope["method"], "url.path": scope["path"][:200]})
        self._status = 0

    def saw(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]

    def end(self) -> None:
        from opentelemetry.trace import StatusCode

        if self._status:
            self._span.set_attribute("http.response.status_code", self._status)
        if self._status >= 500 or not self._status:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def generation(self) -> Span:
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span("llm_request", context=set_span_in_context(self._span))


class Tracing:
    """ASGI middleware: a span for each POST to the API."""

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self._app = app
        self._provider = provider

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        traced = Traced(self._provider, scope)

        async def seen(message: Message) -> None:
            traced.saw(message)
            await send(message)

        token = _current.set(traced)
        try:
            await self._app(scope, receive, seen)
        finally:
            _current.reset(token)
            traced.end()


def generation_span() -> Span | None:
    """A new span for a generation of the present request; None where none is traced."""
    traced = _current.get()
    return None if traced is None else traced.generation()


def end_generation(span: Span, times: RequestTimes, reason: str) -> None:
    """What became of it. Attributes as vLLM names them, ours under `mainsail.`."""
    span.set_attributes(
        {
            "gen_ai.usage.prompt_tokens": times.num_prompt_tokens,
            "gen_ai.usage.completion_tokens": times.num_tokens,
            "gen_ai.request.max_tokens": times.max_tokens,
            "mainsail.cached_tokens": times.num_cached_tokens,
            "mainsail.preemptions": times.num_preemptions,
            "gen_ai.response.finish_reason": reason,
        }
    )
    known = {
        "gen_ai.latency.time_in_queue": times.queue_time_s,
        "gen_ai.latency.time_to_first_token": times.since_arrival(times.first_token_s),
        "gen_ai.latency.e2e": times.since_arrival(times.last_token_s),
    }
    span.set_attributes({name: value for name, value in known.items() if value is not None})
    span.end()
