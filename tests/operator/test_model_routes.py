"""A ModelRoute's status: whether everybody exists whom it names."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mainsail_operator.model_routes import status_of
from mainsail_operator.types.route import ModelRouteSpec

SPEC = {
    "rules": [
        {"when": {"minPromptTokens": 1000}, "to": [{"service": "big"}]},
        {"to": [{"service": "small"}], "fallback": [{"external": {"url": "https://x/v1", "model": "y"}}]},
    ]
}


def told(services: set[tuple[str, str]], **more):
    return status_of(("ns", "smart"), ModelRouteSpec.model_validate(SPEC | more), 3, services, [], 0.0)


def test_ready_when_everybody_exists() -> None:
    status = told({("ns", "big"), ("ns", "small")})
    assert (status.observed_generation, status.names) == (3, ["smart"])
    assert [(c.type, c.status, c.reason) for c in status.conditions] == [("Ready", "True", "Resolved")]
    assert told(set(), names=["a", "b", "a"]).names == ["a", "b"]


def test_a_missing_service_is_named_and_one_of_another_namespace_is_no_help() -> None:
    (condition,) = told({("ns", "small"), ("other", "big")}).conditions
    assert (condition.status, condition.reason) == ("False", "ServiceNotFound")
    assert "big" in condition.message


@pytest.mark.parametrize("spec", [{}, {"rules": []}, {"rules": [{"to": []}]}, {"rules": [{"to": [{"sevice": "x"}]}]}])
def test_what_is_no_route(spec) -> None:
    with pytest.raises(ValidationError):
        ModelRouteSpec.model_validate(spec)
