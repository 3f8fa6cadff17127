"""The routes, and how errors look. Each handler checks, hands over, and shapes the answer; the work is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from mainsail_engine.errors import RequestError
from mainsail_engine.server import schemas
from mainsail_engine.server.chat import as_template_messages, chat_completion
from mainsail_engine.server.completions import completion
from mainsail_engine.server.deadline import timed
from mainsail_engine.server.description import describe
from mainsail_engine.server.embeddings import embeddings
from mainsail_engine.server.errors import error_response, from_validation
from mainsail_engine.server.handover import ResumedBody
from mainsail_engine.server.health import Verdict, body
from mainsail_engine.server.middleware import ApiKey, BodyLimit, HttpMetrics, InProgress, RequestId
from mainsail_engine.server.response_schemas import ModelResponse, ResponsesRequest
from mainsail_engine.server.responses import create_response
from mainsail_engine.server.serving import Serving
from mainsail_engine.server.tracing import Tracing
from mainsail_engine.version import version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ERRORS: dict[int | str, dict[str, Any]] = {400: {"model": schemas.ErrorBody}}
"""Named once for its schema to be there: description.py puts it where it belongs."""
PROBE: dict[int | str, dict[str, Any]] = {200: {"model": schemas.ProbeState}, 503: {"model": schemas.ProbeState}}
EXPOSITION: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def build_app(
    serving: Serving,
    *,
    look: Callable[[str], Verdict | None],
    drain: Callable[[], None],
    api_key: str | None,
    traces: TracerProvider | None = None,
) -> ASGIApp:
    app = FastAPI(title="Mainsail engine", version=version(), docs_url=None, redoc_url=None)
    _add_error_handlers(app)
    _add_generation(app, serving)
    _add_adapters(app, serving)
    _add_text(app, serving)
    _add_operations(app, serving, look, drain)
    app.openapi = cache(lambda: describe(app, needs_key=api_key is not None))
    limited = BodyLimit(InProgress(ResumedBody(app), serving.board))
    inner = limited if traces is None else Tracing(limited, traces)
    return RequestId(HttpMetrics(ApiKey(inner, api_key) if api_key else inner, serving.metrics))


def _add_error_handlers(app: FastAPI) -> None:
    async def request_error(_: Request, error: Exception) -> Response:
        return error_response(error if isinstance(error, RequestError) else RequestError(str(error)))

    async def validation_error(_: Request, error: Exception) -> Response:
        problems: Sequence[Any] = error.errors() if isinstance(error, RequestValidationError) else []
        return error_response(from_validation(problems))

    async def http_error(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        message = str(error.detail) if isinstance(error, HTTPException) else "internal error"
        return error_response(RequestError(message, status=status))

    async def unexpected(_: Request, error: Exception) -> Response:
        message = f"internal error ({type(error).__name__}); the server's log has more"
        return error_response(RequestError(message, status=500, code="internal_error"))

    app.add_exception_handler(RequestError, request_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)


def _add_generation(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/chat/completions", responses={200: {"model": schemas.ChatCompletion}, **ERRORS})
    async def create_chat_completion(body: schemas.ChatCompletionRequest, request: Request) -> Response:
        return await chat_completion(serving, timed(body, request), request)

    @app.post("/v1/completions", responses={200: {"model": schemas.Completion}, **ERRORS})
    async def create_completion(body: schemas.CompletionRequest, request: Request) -> Response:
        return await completion(serving, timed(body, request), request)

    @app.post("/v1/responses", responses={200: {"model": ModelResponse}, **ERRORS})
    async def create_model_response(body: ResponsesRequest, request: Request) -> Response:
        return await create_response(serving, timed(body, request), request)

    @app.post("/v1/embeddings", responses={200: {"model": schemas.EmbeddingList}, **ERRORS})
    async def create_embeddings(body: schemas.EmbeddingRequest, request: Request) -> Response:
        return await embeddings(serving, timed(body, request), request)

    @app.get("/v1/models")
    async def list_models() -> schemas.ModelList:
        names = (*serving.model_names, *serving.client.adapters)
        return schemas.ModelList(data=[_card(serving, name) for name in names])

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def get_model(name: str) -> schemas.ModelCard:
        serving.check_model(name)
        return _card(serving, name)

    del create_chat_completion, create_completion, create_embeddings, create_model_response, list_models, get_model


def _card(serving: Serving, name: str) -> schemas.ModelCard:
    path = serving.client.adapters.get(name)
    return schemas.ModelCard(
        id=name,
        created=serving.created_s,
        root=path or serving.model_path,
        parent=serving.model_names[0] if path else None,
        max_model_len=serving.max_model_len,
    )


def _add_adapters(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/load_lora_adapter", responses=ERRORS)
    async def load_lora_adapter(body: schemas.LoadAdapterRequest) -> PlainTextResponse:
        await serving.load_adapter(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", responses=ERRORS)
    async def unload_lora_adapter(body: schemas.UnloadAdapterRequest) -> PlainTextResponse:
        await serving.client.unload_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    del load_lora_adapter, unload_lora_adapter


def _add_text(app: FastAPI, serving: Serving) -> None:
    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(body: schemas.TokenizeRequest) -> schemas.TokenizeResponse:
        serving.check_model(body.model)
        ids = await _tokenize(serving, body)
        strings = [serving.text().token_string(token) for token in ids] if body.return_token_strs else None
        return schemas.TokenizeResponse(
            count=len(ids), max_model_len=serving.max_model_len, tokens=ids, token_strs=strings
        )

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(body: schemas.DetokenizeRequest) -> schemas.DetokenizeResponse:
        serving.check_model(body.model)
        if max(body.tokens, default=0) >= serving.ready.vocab_size:
            raise RequestError("a token id is not in the vocabulary", param="tokens")
        return schemas.DetokenizeResponse(prompt=serving.text().decode(body.tokens))

    del tokenize, detokenize


async def _tokenize(serving: Serving, body: schemas.TokenizeRequest) -> list[int]:
    if body.messages is not None:
        return await serving.encode_chat(
            as_template_messages(body.messages), add_generation_prompt=body.add_generation_prompt, variables=None
        )
    special = body.add_special_tokens is not False
    return await serving.encode(body.prompt or "", add_special_tokens=special, param="prompt")


def _add_operations(
    app: FastAPI, serving: Serving, look: Callable[[str], Verdict | None], drain: Callable[[], None]
) -> None:
    @app.get("/health", responses=PROBE)
    @app.get("/health/live", responses=PROBE)
    @app.get("/health/ready", responses=PROBE)
    @app.get("/health/startup", responses=PROBE)
    async def health(request: Request) -> Response:
        verdict = look(request.url.path) or Verdict(False, "no such probe")
        return Response(body(verdict), status_code=200 if verdict.ok else 503, media_type="application/json")

    @app.get("/metrics", responses=EXPOSITION, response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(serving.metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version()}

    @app.post("/drain", status_code=202)
    async def begin_drain() -> dict[str, str]:
        if not serving.draining:
            drain()
        return {"status": "draining"}

    @app.post("/sleep", responses=ERRORS)
    async def sleep(level: str = "1") -> schemas.SleepState:
        check_level(level)
        await serving.sleep()
        return schemas.SleepState(is_sleeping=True)

    @app.post("/wake_up", responses=ERRORS)
    async def wake_up() -> schemas.SleepState:
        await serving.wake_up()
        return schemas.SleepState(is_sleeping=False)

    @app.get("/is_sleeping")
    async def is_sleeping() -> schemas.SleepState:
        return schemas.SleepState(is_sleeping=serving.is_asleep)

    del health, metrics, show_version, begin_drain, sleep, wake_up, is_sleeping


def check_level(level: str) -> None:
    """Level 2 would forget the weights: they could only come from disk again."""
    if level != "1":
        raise RequestError("only level 1 is supported (weights to the host, KV dropped)", param="level")
