"""The committed CRD is what the types say, and it is a schema that the API server can take."""

from __future__ import annotations

from typing import Any

from mainsail_operator.crd import FILES, custom_resource_definition, openapi, render


def test_committed_files_are_up_to_date() -> None:
    for path in FILES:
        assert path.read_text() == render(), f"{path} differs: run `python -m mainsail_operator.crd`"


def nodes(schema: dict[str, Any], path: str = ""):
    yield path, schema
    for name, node in schema.get("properties", {}).items():
        yield from nodes(node, f"{path}.{name}")
    if isinstance(schema.get("items"), dict):
        yield from nodes(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


def test_every_node_is_structural() -> None:
    for path, node in nodes(openapi()):
        typed = (
            "type" in node or node.get("x-kubernetes-int-or-string") or "x-kubernetes-preserve-unknown-fields" in node
        )
        assert typed, path
        assert "$ref" not in node, path
        assert "title" not in node, path
        if node.get("type") == "array":
            assert "items" in node, path


def test_every_field_of_the_spec_is_documented() -> None:
    for path, node in nodes(openapi()["properties"]["spec"], "spec"):
        if not path.endswith(("[]", "{}")) and "containers" not in path.lower():
            assert len(node.get("description", "")) > 10, path


def test_rules_say_what_to_do() -> None:
    rules = [rule for _, node in nodes(openapi()) for rule in node.get("x-kubernetes-validations", [])]
    assert len(rules) >= 12
    assert all(len(rule.get("message") or rule["messageExpression"]) > 8 for rule in rules)


def test_names_columns_and_subresources() -> None:
    spec = custom_resource_definition()["spec"]
    assert spec["names"]["shortNames"] == ["mis"]
    version = spec["versions"][0]
    assert version["subresources"]["scale"]["specReplicasPath"] == ".spec.replicas"
    assert "status" in version["subresources"]
    assert {"Ready", "Serving", "Revision"} <= {column["name"] for column in version["additionalPrinterColumns"]}
