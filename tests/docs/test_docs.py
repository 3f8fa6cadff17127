"""What the documentation names is there: links, files, flags, fields, metrics, settings of the chart, results."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.docs import metrics_page

from mainsail_engine import cli as engine
from mainsail_fetch import cli as fetch
from mainsail_gateway import settings as gateway
from mainsail_operator import cli as operator
from mainsail_operator.crd import INFERENCE_SERVICE, MODEL_ROUTE, openapi
from mainsail_operator.settings import VARIABLES
from mainsail_operator.types import InferenceService
from mainsail_operator.types.route import ModelRoute

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *ROOT.glob("benchmarks/**/*.md"),
]
ROOMS = ("operator", "engine", "kernels", "benchmarks", "e2e", "tests", "docs")
FILES = [path for room in ROOMS for path in (ROOT / room).rglob("*.*")]
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))
NOT_OURS = {
    *("--create-namespace", "--set", "--wait", "--for", "--overwrite", "--from-literal"),  # helm, kubectl
    *("--backend", "--data", "--constraint", "--tokenizer"),  # guidellm
    *("--url", "--endpoint-type", "--streaming", "--synthetic-input-tokens-mean", "--output-tokens-mean"),  # aiperf
    *("--concurrency", "--request-count", "--ui"),
    *("--json", "--runner"),  # curl, vLLM
}
OF_A_MODEL = {
    "adapter_config.json",
    "1_Pooling/config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config.json",
}
"""Files of a model's folder, which pages name as well."""
NO_FILES = {"/openapi.json", "structured_outputs.json"}
"""A path of the server, and a field."""


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=ids)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)
        else:
            yield action


@cache
def commands() -> dict[str, argparse.ArgumentParser]:
    return {
        "mainsail-engine": engine.build_parser(),
        "mainsail-gateway": gateway.build_parser(),
        "mainsail-operator": operator.parser("mainsail-operator"),
        "mainsail-fetch": fetch.build_parser(),
    }


@cache
def flags() -> set[str]:
    ours = {flag for parser in commands().values() for action in options(parser) for flag in action.option_strings}
    scripts = (path.read_text() for path in ROOT.glob("benchmarks/*.py"))
    return ours | {flag for text in scripts for flag in re.findall(r'"(--[a-z][a-z0-9-]*)"', text)}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_the_readme_leads_to_every_page() -> None:
    seen, next_ = set[Path](), [ROOT / "README.md"]
    while next_:
        page = next_.pop()
        seen.add(page)
        links = (page.parent / link for link in re.findall(r"\]\(([^)#:]+\.md)", page.read_text()))
        next_ += [link.resolve() for link in links if link.resolve() not in seen]
    assert set(PAGES) - seen == set()


@each_page
def test_flags_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text()))
    assert named - flags() - NOT_OURS == set()


@each_page
def test_files_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name in set(re.findall(r"`([\w./-]+\.(?:py|c|json|yaml|lua))`", text)) - OF_A_MODEL - NO_FILES:
        found = (ROOT / name).exists() or any(path.as_posix().endswith(f"/{name}") for path in FILES)
        assert found, name


@each_page
def test_metrics_exist(page: Path) -> None:
    text, known = page.read_text(), metrics_page.names()
    for name in set(re.findall(r"(?:vllm|mainsail):[a-z_]+[a-z]", text)) - {"vllm:gpu_prefix_cache_queries_total"}:
        bare = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in known or bare in known, name
    for end in set(re.findall(r"`…(_[a-z_]+)", text)) - {"_bucket", "_sum", "_count"}:
        assert any(name.endswith(end) for name in known), end


def test_the_page_of_metrics_is_up_to_date() -> None:
    run = "run `python -m tests.docs.metrics_page`"
    assert metrics_page.PAGE.read_text() == metrics_page.render(), run


def fields(schema: dict[str, Any], path: list[str]) -> bool:
    """Whether the schema has such a field, or takes whatever is there."""
    if not path or schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema:
        return True
    schema = schema.get("items", schema)
    return path[0] in schema.get("properties", {}) and fields(schema["properties"][path[0]], path[1:])


@each_page
def test_fields_exist(page: Path) -> None:
    schemas = [openapi(INFERENCE_SERVICE), openapi(MODEL_ROUTE)]
    for name in set(re.findall(r"\b((?:spec|status)(?:\.[a-z][A-Za-z0-9]*(?:\[\])?)+)(?<!\.py)\b", page.read_text())):
        path = name.replace("[]", "").split(".")
        assert any(fields(schema, path) for schema in schemas), name


def test_messages_and_docstrings_name_flags_fields_and_pages_that_exist() -> None:
    """An error that says what to do is of no use when that is not there."""
    known, schemas = flags() | {"--as-needed", "--check"}, [openapi(INFERENCE_SERVICE), openapi(MODEL_ROUTE)]
    for source in (path for room in ("operator", "engine", "kernels") for path in (ROOT / room).rglob("*.py")):
        nodes = ast.walk(ast.parse(source.read_text()))
        for text in (n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) <= known, (source, text)
            for name in re.findall(r"\b((?:spec|status)(?:\.[a-z][A-Za-z0-9]+)+)(?<!\.py)\b", text):
                assert any(fields(schema, name.split(".")) for schema in schemas), (source, name)
            for name in re.findall(r"(?<![\w./])(?:docs/[\w-]+|README|CONTRIBUTING)\.md", text):
                assert (ROOT / name).exists(), (source, name)


@each_page
def test_settings_of_the_chart_exist(page: Path) -> None:
    values = yaml.safe_load((ROOT / "charts/mainsail/values.yaml").read_text())
    spec = openapi(INFERENCE_SERVICE)["properties"]["spec"]
    for name in set(
        re.findall(
            r"`((?:gateway|networkPolicy|operator|crds|engine)(?:\.[a-z][A-Za-z]+)+)(?<!\.json)`", page.read_text()
        )
    ):
        node: Any = values
        for part in name.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        assert node is not None or fields(spec, name.split(".")), name


def resources(page: Path) -> Iterator[dict[str, Any]]:
    """The YAML of ours on a page: whole resources, and pieces of an InferenceService."""
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        pieces = [line for line in block.splitlines() if line.startswith("model: {")] or [block]
        for piece in map(yaml.safe_load, pieces):
            if "model" in piece:
                piece = {"spec": piece}
            if "kind" not in piece and "spec" in piece:
                piece = {"kind": "InferenceService", "spec": {"model": {"uri": "pvc://claim/model"}} | piece["spec"]}
            yield piece


@each_page
def test_examples_are_what_the_resources_take(page: Path) -> None:
    for piece in resources(page):
        kind = {"InferenceService": InferenceService, "ModelRoute": ModelRoute}.get(piece.get("kind", ""))
        if kind is not None:
            kind.model_validate({"spec": piece["spec"]})


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_flag_says_what_it_is_and_its_default(command: str) -> None:
    for action in options(commands()[command]):
        name = "/".join(action.option_strings) or action.dest
        text = (action.help or "") % {**vars(action), "prog": ""}
        assert text, f"{name}: no help"
        told = "default" in text or "without it" in text or "accepted for compatibility" in text
        shown = command == "mainsail-engine" and action.default not in (None, argparse.SUPPRESS)
        free = action.required or not action.option_strings or name in ("-h/--help", "--version")
        assert told or shown or free or "repeat for more" in text, f"{name}: no default in {text!r}"


def test_every_variable_of_the_operator_is_told() -> None:
    source = (ROOT / "operator/mainsail_operator/settings.py").read_text()
    read = set(re.findall(r'environment(?:\.get\(|, )"(MAINSAIL_[A-Z_]+)"', source))
    assert len(read) > 10
    assert set(re.findall(r"^    (MAINSAIL_[A-Z_]+)", VARIABLES, re.MULTILINE)) == read
    chart = (ROOT / "charts/mainsail/templates/operator.yaml").read_text()
    assert set(re.findall(r"name: (MAINSAIL_[A-Z_]+)", chart)) <= read


@pytest.mark.parametrize("result", RESULTS, ids=lambda path: path.name)
def test_results_are_told_of(result: Path) -> None:
    """A figure that no page names is one that nobody can find, or that is out of date."""
    assert any(result.name in page.read_text() for page in PAGES), (
        "name it in benchmarks/results/README.md, or delete it"
    )
