"""Tool calls as a grammar, in the form that the model writes them: for tools that are strict, required or named.

What is built are parts of xgrammar's structural tags (structured/grammar.py). Free text stays free where a call is only
allowed: the grammar sets in where a call begins.
"""

from __future__ import annotations

import json
from typing import Any, cast

from mainsail_engine.server.answer_format import AnswerFormat
from mainsail_engine.server.reasoning import Tags
from mainsail_engine.server.tools.harmony import CHANNEL, CONSTRAIN, END, MARKERS, MESSAGE, START, message_is_open
from mainsail_engine.structured.grammar import schema_node

Node = dict[str, Any]
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def calls(form: AnswerFormat, tools: list[dict[str, Any]], *, required: bool, one: bool) -> Node:
    """required: calls and nothing else; otherwise text, in which a call may begin. one: at most one of them.

    tools: OpenAI's function objects. Raises GrammarError for parameters that cannot be enforced.
    """
    if form.harmony:
        return _harmony(tools, required=required)
    if form.tool_parser == "pythonic":
        return _pythonic(tools, required=required, one=one)
    if form.tool_parser == "mistral":
        return _mistral(form, tools, required=required, one=one)
    if form.tool_parser == "llama3_json":
        tags = [_tag(f'{{"name": {json.dumps(tool["name"])}, "parameters": ', tool, "}") for tool in tools]
        return _separated(tags, "; ", one) if required else _triggered(tags, ['{"name": '], one)
    tags = [
        _tag(f'<tool_call>\n{{"name": {json.dumps(tool["name"])}, "arguments": ', tool, "}\n</tool_call>")
        for tool in tools
    ]
    return _separated(tags, "\n", one) if required else _triggered(tags, ["<tool_call>"], one)


def after_reasoning(tags: Tags, node: Node, *, opened: bool) -> Node:
    """Reasoning first, if the model wants to; if the prompt has opened it, it must be closed."""
    begin = "" if opened else tags.opening
    reasoning: Node = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": tags.closing}
    reasoning = _sequence(reasoning, {"type": "regex", "pattern": r"[\n ]{0,4}"})
    return _sequence(reasoning if opened else {"type": "optional", "content": reasoning}, node)


def final_message(node: Node, prompt_end: str) -> Node:
    """Harmony's message to the user, whose text this is; the prompt may have opened it."""
    return node if message_is_open(prompt_end) else _sequence(_text(f"{CHANNEL}final{MESSAGE}"), node)


def after_analysis(node: Node, prompt_end: str) -> Node:
    """Harmony: a message of reasoning first, if the model wants to."""
    if message_is_open(prompt_end):
        return node
    text: Node = {"type": "any_text", "excludes": list(MARKERS)}
    reasoning = _sequence(_tag_of(f"{CHANNEL}analysis{MESSAGE}", text, END), _text(f"{START}assistant"))
    begun = prompt_end.endswith(f"{START}assistant")
    rest = _sequence({"type": "optional", "content": reasoning}, node)
    return rest if begun else _sequence(_text(f"{START}assistant"), rest)


def _harmony(tools: list[dict[str, Any]], *, required: bool) -> Node:
    """One call: the token that ends it ends the answer."""
    begin = f"{CHANNEL}commentary to=functions."
    tags = [_tag(f"{begin}{tool['name']} {CONSTRAIN}json{MESSAGE}", tool, "") for tool in tools]
    return _separated(tags, "", one=True) if required else _triggered(tags, [begin], one=True)


def _mistral(form: AnswerFormat, tools: list[dict[str, Any]], *, required: bool, one: bool) -> Node:
    if form.mistral_arguments:
        tags = [_tag(f"[TOOL_CALLS]{tool['name']}[ARGS]", tool, "") for tool in tools]
        return _separated(tags, "", one) if required else _triggered(tags, ["[TOOL_CALLS]"], one)
    if not required:
        tags = [_tag(f'[TOOL_CALLS][{{"name": {json.dumps(tool["name"])}, "arguments": ', tool, "}]") for tool in tools]
        return _triggered(tags, ["[TOOL_CALLS]"], one)
    tags = [_tag(f'{{"name": {json.dumps(tool["name"])}, "arguments": ', tool, "}") for tool in tools]
    return _sequence(_text("[TOOL_CALLS]["), _separated(tags, ", ", one), _text("]"))


def _pythonic(tools: list[dict[str, Any]], *, required: bool, one: bool) -> Node:
    if required:
        tags = [
            {"type": "tag", "begin": f"{tool['name']}(", "content": _keywords(tool), "end": ")"} for tool in tools
        ]  # fmt: skip
        return _sequence(_text("["), _separated(tags, ", ", one), _text("]"))
    tags = [{"type": "tag", "begin": f"[{tool['name']}(", "content": _keywords(tool), "end": ")]"} for tool in tools]
    return _triggered(tags, [f"[{tool['name']}(" for tool in tools], one)


def _keywords(tool: dict[str, Any]) -> Node:
    """name=value for each property, required ones first; values are JSON, which the parser takes as well."""
    parameters = tool.get("parameters") or NO_ARGUMENTS
    properties: dict[str, Any] = parameters.get("properties") or {}
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    required = [str(name) for name in cast("list[Any]", parameters.get("required") or []) if name in properties]
    optional = [name for name in properties if name not in required]
    parts: list[Node] = []
    for name in required or optional[:1]:
        parts.append(_keyword(name, properties[name], shared, tool, first=not parts))
    for name in optional if required else optional[1:]:
        parts.append({"type": "optional", "content": _keyword(name, properties[name], shared, tool, first=False)})
    if not parts:
        return _text("")
    return _sequence(*parts) if required else {"type": "optional", "content": _sequence(*parts)}


def _keyword(name: str, schema: Any, shared: dict[str, Any], tool: dict[str, Any], *, first: bool) -> Node:
    described = {**cast("dict[str, Any]", schema), **shared} if isinstance(schema, dict) else schema
    return _sequence(_text(f"{'' if first else ', '}{name}="), schema_node(described, strict=bool(tool.get("strict"))))


def _tag(begin: str, tool: dict[str, Any], end: str) -> Node:
    schema = schema_node(tool.get("parameters") or NO_ARGUMENTS, strict=bool(tool.get("strict")))
    return _tag_of(begin, schema, end)


def _tag_of(begin: str, content: Node, end: str) -> Node:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _separated(tags: list[Node], separator: str, one: bool) -> Node:
    return {"type": "tags_with_separator", "tags": tags, "separator": separator, "at_least_one": True,
            "stop_after_first": one}  # fmt: skip


def _triggered(tags: list[Node], triggers: list[str], one: bool) -> Node:
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags, "at_least_one": False,
            "stop_after_first": one}  # fmt: skip


def _sequence(*elements: Node) -> Node:
    return {"type": "sequence", "elements": list(elements)}


def _text(value: str) -> Node:
    return {"type": "const_string", "value": value}
