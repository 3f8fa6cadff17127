"""/v1/embeddings: one vector for each input, from the loaded model's last hidden states.

Which states, and whether the vector gets length 1, an embedding model's files say (text/embedding.py). A language model
was not trained for this; the mean over the prompt's tokens, of length 1, is the useful default.
"""

from __future__ import annotations

import base64
import math
import sys
from array import array
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mainsail_engine.request import Pooling, SamplingParams
from mainsail_engine.server.answers import Answer, collect
from mainsail_engine.server.completions import split_prompts
from mainsail_engine.server.middleware import arrival_s
from mainsail_engine.server.schemas import EmbeddingRequest
from mainsail_engine.server.serving import Job, Serving
from mainsail_engine.server.streaming import unless_disconnected


async def embeddings(serving: Serving, body: EmbeddingRequest, request: Request) -> Response:
    arrived_s = arrival_s(request.scope)
    serving.check_model(body.model)
    serving.embedding_form.check_dimensions(body.dimensions, serving.ready.hidden_size)
    serving.check_open()
    serving.check_room()
    jobs = [await _job(serving, body, given) for given in split_prompts(body.input)]
    serving.admit(jobs, 1)
    return await unless_disconnected(request, _answer(serving, body, jobs, arrived_s))


async def _job(serving: Serving, body: EmbeddingRequest, given: str | list[int]) -> Job:
    special = body.add_special_tokens is not False
    ids = given if isinstance(given, list) else await serving.encode(given, add_special_tokens=special, param="input")
    if body.truncate_prompt_tokens is not None:
        ids = ids[-body.truncate_prompt_tokens :]
    serving.check_prompt(ids, param="input")
    pooling = Pooling(body.pooling) if body.pooling else serving.embedding_form.pooling
    params = SamplingParams(max_tokens=1, temperature=0.0, pooling=pooling)
    return Job(
        prompt_token_ids=ids,
        params=params,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        user=body.user or "",
        adapter=serving.adapter_of(body.model),
        timeout_s=body.timeout,
    )


async def _answer(serving: Serving, body: EmbeddingRequest, jobs: list[Job], arrived_s: float) -> Response:
    answers = await collect(serving, jobs, arrived_s)
    normalize = serving.embedding_form.normalize if body.normalize is None else body.normalize
    vectors = [vector_of(answer, normalize=normalize, dimensions=body.dimensions) for answer in answers]
    num_tokens = sum(len(job.prompt_token_ids) for job in jobs)
    shown: dict[str, Any] = {
        "object": "list",
        "model": body.model,
        "data": [
            {"object": "embedding", "index": index, "embedding": encoded(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return Response(msgspec.json.encode(shown), media_type="application/json")


def vector_of(answer: Answer, *, normalize: bool, dimensions: int | None = None) -> array[float]:
    """The answer's embedding, or its beginning, as float32. Without NumPy, which the API process does not need else."""
    vector = array("f", answer.embedding or b"")[:dimensions]
    if not normalize:
        return vector
    length = max(math.hypot(*vector), 1e-12)
    return array("f", (value / length for value in vector))


def encoded(vector: array[float], encoding_format: str | None) -> str | list[float]:
    """base64 of little-endian float32, as OpenAI's clients ask for, or numbers."""
    if encoding_format == "base64":
        ordered = array("f", vector)
        if sys.byteorder == "big":
            ordered.byteswap()
        return base64.b64encode(ordered.tobytes()).decode()
    return vector.tolist()
