"""/openapi.json is true: its own schemas, thrown at the server by schemathesis, never meet a server error.

A server of random weights with a context of 64 tokens, so that whatever is asked for ends soon.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case
from schemathesis.core.transport import Response
from schemathesis.specs.openapi import checks
from tests.engine.server.conftest import Engine

EXAMPLES = int(os.environ.get("MAINSAIL_SCHEMATHESIS_EXAMPLES", "40"))
"""For each operation with a body. A longer run: 5000."""


def no_server_error(_: object, response: Response, case: Case) -> None:
    """A deadline that the client set itself is none."""
    assert response.status_code < 500 or response.status_code == 504, (case.body, response.text)


CHECKS = (
    no_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
)
BODIES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize")


@pytest.fixture(scope="module")
def description(small_engine: Engine) -> Any:
    return schemathesis.openapi.from_url(f"{small_engine.url}/openapi.json")


@pytest.mark.parametrize("path", BODIES)
def test_what_the_description_allows_is_answered_as_it_says(small_engine: Engine, description: Any, path: str) -> None:
    """A body of the described form, its model mostly one that there is."""
    statuses: set[int] = set()
    cases = description[path]["POST"].as_strategy()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list[Any](HealthCheck))
    @given(case=cases, known=st.integers(0, 9))
    def ask(case: Case, known: int) -> None:
        if isinstance(case.body, dict) and known:
            case.body["model"] = small_engine.name
        response = case.call()
        statuses.add(response.status_code)
        case.validate_response(response, checks=list(CHECKS))

    ask()
    assert 200 in statuses or 400 in statuses
    assert statuses <= {200, 400, 404, 413, 504}
    assert small_engine.post("/v1/completions", model=small_engine.name, prompt="a", max_tokens=3).status_code == 200


def test_the_description_is_true(small_engine: Engine) -> None:
    document = small_engine.http.get(small_engine.url + "/openapi.json").json()
    schemas, paths = document["components"]["schemas"], document["paths"]
    assert "HTTPValidationError" not in schemas
    for path in BODIES:
        operation = paths[path]["post"]
        assert operation["requestBody"]["required"]
        assert {"200", "400", "401", "404", "413", "429", "500", "503", "504"} == set(operation["responses"]) - {"405"}
        error = operation["responses"]["429"]["content"]["application/json"]["schema"]["$ref"]
        assert error == "#/components/schemas/ErrorBody"
    for path in BODIES[:3]:
        assert "text/event-stream" in paths[path]["post"]["responses"]["200"]["content"]
    for name in ("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest", "EmbeddingRequest"):
        assert schemas[name]["additionalProperties"] is False
    assert schemas["ChatCompletionRequest"]["properties"]["store"]["enum"] == [None, False]
    assert schemas["ChatCompletionRequest"]["properties"]["guided_json"]["enum"] == [None]
    assert set(paths["/health/ready"]["get"]["responses"]) == {"200", "503"}
