"""What a request says its answer must look like, as one grammar; and whether that grammar is one.

response_format and structured_outputs describe content, tools describe calls; with both, the answer is either. A model
that reasons may do so first. Raises RequestError with the field to blame.
"""

from __future__ import annotations

from typing import Any

from mainsail_engine.errors import RequestError
from mainsail_engine.server.answer_format import AnswerFormat
from mainsail_engine.server.schemas import (
    AllowedChoice,
    GenerationRequest,
    JsonSchemaFormat,
    NamedChoice,
    StructuralTagFormat,
    StructuredOutputs,
    TextFormat,
    Tool,
    ToolChoice,
)
from mainsail_engine.server.tools import grammar as tool_grammar
from mainsail_engine.structured import grammar as g
from mainsail_engine.structured.grammar import Grammar, GrammarError


def content_grammar(body: GenerationRequest) -> tuple[Grammar, str] | None:
    """(the grammar, the field that asks for it). None: any content will do."""
    form, outputs = body.response_format, body.structured_outputs
    if form is not None and not isinstance(form, TextFormat):
        if outputs is not None:
            message = "give either response_format or structured_outputs, not both"
            raise RequestError(message, param="structured_outputs")
        try:
            return _of_response_format(form), "response_format"
        except GrammarError as error:
            raise RequestError(f"response_format: {error}", param="response_format", code="invalid_grammar") from error
    if outputs is None:
        return None
    try:
        return _of_structured_outputs(outputs), "structured_outputs"
    except GrammarError as error:
        message = f"structured_outputs: {error}"
        raise RequestError(message, param="structured_outputs", code="invalid_grammar") from error


def _of_response_format(form: Any) -> Grammar:
    if isinstance(form, JsonSchemaFormat):
        described = form.json_schema
        if described.definition is None:
            return g.json_object()
        return g.json_schema(described.definition, strict=bool(described.strict))
    if isinstance(form, StructuralTagFormat):
        return g.structural_tag(form.format)
    return g.json_object()


def _of_structured_outputs(outputs: StructuredOutputs) -> Grammar:
    loose = outputs.disable_any_whitespace is False
    if outputs.definition is not None:
        return g.json_schema(outputs.schema_value(), strict=True, any_whitespace=loose)
    if outputs.regex is not None:
        return g.regex(outputs.regex)
    if outputs.choice is not None:
        return g.choice(outputs.choice)
    if outputs.grammar is not None:
        return g.ebnf(outputs.grammar)
    if outputs.structural_tag is not None:
        return g.structural_tag(outputs.structural_tag_format(), any_whitespace=loose)
    return g.json_object(any_whitespace=loose)


def chat_grammar(
    form: AnswerFormat,
    content: tuple[Grammar, str] | None,
    tools: list[Tool],
    choice: ToolChoice,
    *,
    parallel: bool,
    prompt_end: str,
) -> tuple[Grammar, str] | None:
    """Content, calls, or either; after the reasoning, if there is some."""
    calls, must_call = _calls(form, tools, choice, parallel=parallel, exact=content is not None)
    if content is None and calls is None:
        return None
    grammar, param = content or (None, "tools")
    if calls is None and not form.reads and grammar is not None:
        return grammar, param
    node = calls
    if grammar is not None and not must_call:
        said = tool_grammar.final_message(g.as_node(grammar), prompt_end) if form.harmony else g.as_node(grammar)
        node = said if calls is None else {"type": "or", "elements": [said, calls]}
    if form.harmony and node is not None and (must_call or grammar is not None):
        node = tool_grammar.after_analysis(node, prompt_end)
    if form.reasoning is not None and node is not None:
        opened = prompt_end.rstrip().endswith(form.reasoning.opening)
        node = tool_grammar.after_reasoning(form.reasoning, node, opened=opened)
    try:
        return g.structural_tag(node or {}, any_whitespace=grammar.any_whitespace if grammar else False), param
    except GrammarError as error:
        raise RequestError(f"{param}: {error}", param=param, code="invalid_grammar") from error


def callable_names(tools: list[Tool], choice: ToolChoice) -> frozenset[str]:
    """The tools that the answer may call."""
    if choice == "none":
        return frozenset()
    if isinstance(choice, NamedChoice):
        return frozenset({choice.function.name})
    return choice.names if isinstance(choice, AllowedChoice) else frozenset(tool.function.name for tool in tools)


def _calls(
    form: AnswerFormat, tools: list[Tool], choice: ToolChoice, *, parallel: bool, exact: bool
) -> tuple[dict[str, Any] | None, bool]:
    """(what calls must look like, whether there must be one). exact: beside a grammar for content, so no free text."""
    named = isinstance(choice, NamedChoice)
    allowed = callable_names(tools, choice)
    must_call = named or choice == "required" or (isinstance(choice, AllowedChoice) and choice.must_call)
    wanted = [tool.function.model_dump(exclude_none=True) for tool in tools if tool.function.name in allowed]
    bound = must_call or exact or len(wanted) < len(tools) or any(f.get("strict") for f in wanted)
    if not wanted or not bound:
        return None, False
    try:
        one = named or not parallel
        return tool_grammar.calls(form, wanted, required=must_call or exact, one=one), must_call
    except GrammarError as error:
        raise RequestError(f"tools: {error}", param="tools", code="invalid_grammar") from error
