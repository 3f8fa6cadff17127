"""The committed CRD is what the types say, and it is a schema that the API server can take."""

from __future__ import annotations

from typing import Any

import pytest

from mainsail_operator.crd import (
    FILES,
    INFERENCE_SERVICE,
    MODEL_ROUTE,
    Resource,
    custom_resource_definition,
    openapi,
    render,
)

RESOURCES = (INFERENCE_SERVICE, MODEL_ROUTE)


def test_committed_files_are_up_to_date() -> None:
    for path, resource in FILES.items():
        assert path.read_text() == render(resource), f"{path} differs: run `python -m mainsail_operator.crd`"


def nodes(schema: dict[str, Any], path: str = ""):
    yield path, schema
    for name, node in schema.get("properties", {}).items():
        yield from nodes(node, f"{path}.{name}")
    if isinstance(schema.get("items"), dict):
        yield from nodes(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource.kind)
def test_every_node_is_structural(resource: Resource) -> None:
    for path, node in nodes(openapi(resource)):
        typed = (
            "type" in node or node.get("x-kubernetes-int-or-string") or "x-kubernetes-preserve-unknown-fields" in node
        )
        assert typed, path
        assert "$ref" not in node, path
        assert "title" not in node, path
        if node.get("type") == "array":
            assert "items" in node, path


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource.kind)
def test_every_field_is_documented(resource: Resource) -> None:
    """What `kubectl explain` prints; the three that are not here have Kubernetes' own words there."""
    for path, node in nodes(openapi(resource)):
        if path and not path.endswith(("[]", "{}")) and path not in (".apiVersion", ".kind", ".metadata"):
            description = node.get("description", "")
            assert len(description) > 10, path
            assert description[-1] in ".)…", f"{path}: no whole sentence"


def test_rules_say_what_to_do() -> None:
    schemas = [openapi(resource) for resource in RESOURCES]
    rules = [
        rule for schema in schemas for _, node in nodes(schema) for rule in node.get("x-kubernetes-validations", [])
    ]
    assert len(rules) >= 12
    assert all(len(rule.get("message") or rule["messageExpression"]) > 8 for rule in rules)


def test_names_columns_and_subresources() -> None:
    spec = custom_resource_definition()["spec"]
    assert spec["names"]["shortNames"] == ["mis"]
    version = spec["versions"][0]
    assert version["subresources"]["scale"]["specReplicasPath"] == ".spec.replicas"
    assert "status" in version["subresources"]
    assert {"Ready", "Serving", "Revision"} <= {column["name"] for column in version["additionalPrinterColumns"]}
