"""What /v1/responses takes. Every field is honoured or refused by its name, as everywhere (schemas.py)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from mainsail_engine.server.schemas import (
    INT64,
    MAX_TOOLS,
    NOT_A_CHOICE,
    CacheHint,
    Effort,
    JsonObjectFormat,
    Metadata,
    Strict,
    TextFormat,
    Unicode,
    by_type,
    neutral,
)


class InputText(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: Unicode
    annotations: Annotated[Any, neutral([])] = None
    logprobs: Annotated[Any, neutral([])] = None


class InputMessage(Strict):
    """A message in short, or one of an earlier response's output."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Unicode | list[InputText]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Unicode
    id: str | None = None
    status: str | None = None


class FunctionCallOutput(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: Unicode | list[InputText]
    id: str | None = None
    status: str | None = None


class ReasoningText(Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: Unicode


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: Annotated[Any, neutral()] = None
    status: str | None = None


InputItem = InputMessage | FunctionCallItem | FunctionCallOutput | ReasoningItem


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class TextSettings(Strict):
    format: TextFormat | JsonObjectFormat | SchemaFormat | None = None
    verbosity: Annotated[Any, neutral("medium")] = None


class FunctionTool(Strict):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Strict):
    type: Literal["function"]
    name: str


class AllowedTools(Strict):
    """Only these of the tools may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("str")]
    | Annotated[NamedTool, Tag("NamedTool")]
    | Annotated[AllowedTools, Tag("AllowedTools")],
    Discriminator(
        by_type({"str": "str", "function": "NamedTool", "allowed_tools": "AllowedTools"}),
        custom_error_type="tool_choice",
        custom_error_message=NOT_A_CHOICE,
    ),
]


class ReasoningSettings(Strict):
    effort: Effort | None = None
    summary: Annotated[Any, neutral("auto")] = None
    """Reasoning is shown as it is; there is nobody to sum it up."""
    generate_summary: Annotated[Any, neutral("auto")] = None


class ResponsesRequest(Strict):
    model: str
    input: Annotated[Unicode | list[InputItem], Field(min_length=1)]
    instructions: Unicode | None = None
    """The system message. Not remembered from one request to the next."""
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    """Comes back with the response."""
    client_metadata: dict[str, Any] | None = None
    """Codex' own labels: nothing depends on them."""
    user: Annotated[Unicode, Field(max_length=256)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: CacheHint = None
    prompt_cache_options: CacheHint = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[Unicode, Field(max_length=256)] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: Annotated[Any, neutral(False)] = None
    """Nothing is stored: any replica may serve a conversation's next turn."""
    previous_response_id: Annotated[Any, neutral()] = None
    """Refused: send the conversation as input."""
    conversation: Annotated[Any, neutral()] = None
    background: Annotated[Any, neutral(False)] = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    """Reasoning comes in plain text, whether asked for or not, and is taken back so: nothing is encrypted."""
    truncation: Annotated[Any, neutral("disabled")] = None
    top_logprobs: Annotated[Any, neutral(0)] = None
    max_tool_calls: Annotated[Any, neutral()] = None
    reasoning: ReasoningSettings | None = None
    moderation: Annotated[Any, neutral()] = None
    context_management: Annotated[Any, neutral([])] = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None
    prompt: Annotated[Any, neutral()] = None
    stream_options: Annotated[Any, neutral({"include_obfuscation": False})] = None


class OutputPart(BaseModel):
    type: Literal["output_text", "reasoning_text"]
    text: str


class OutputItem(BaseModel):
    """A message, a function call, or reasoning."""

    type: Literal["message", "function_call", "reasoning"]
    id: str
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"] | None = None
    content: list[OutputPart] | None = None
    summary: list[OutputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class InputTokensDetails(BaseModel):
    cached_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ModelResponse(BaseModel):
    """What comes back; the request's own settings beside it."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage
    metadata: dict[str, str]
