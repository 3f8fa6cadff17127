"""The requests that this server takes, field by field. Every field is honoured or refused by its name.

Strict: no string for a number, no unknown field. Fields of the OpenAI API that the engine does not honour (yet) are
declared `neutral(…)`: their neutral values pass, anything else is a 400 that names the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from mainsail_engine.structured.grammar import GrammarError

INT64 = 2**63
MAX_STOPS = 16
MAX_N = 128
MAX_PROMPTS = 2048
MAX_LOGPROBS = 20
MAX_BIASED = 1024
MAX_BAD_WORDS = 256
MAX_TOOLS = 128


@dataclass(frozen=True, slots=True)
class _Only:
    """null or one of these values (of the very same type), and described so; anything else is refused."""

    values: tuple[Any, ...]
    refusal: PydanticCustomError

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [None, *self.values]}

    def _check(self, value: Any) -> Any:
        if value is None or any(type(value) is type(item) and value == item for item in self.values):
            return value
        raise self.refusal


def neutral(*values: Any) -> _Only:
    """A field that is refused unless it is null or one of these values."""
    hint = f", or set it to {values[0]!r}" if values else ""
    message = "is not supported by this engine; leave it out{hint}"
    return _Only(values, PydanticCustomError("unsupported", message, {"hint": hint}))


def removed(instead: str) -> _Only:
    """A field of old that would be dangerous to overlook: the output would be unconstrained."""
    return _Only((), PydanticCustomError("unsupported", "was removed; use {instead}", {"instead": instead}))


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _unicode(value: str) -> str:
    """JSON may carry half a surrogate pair, which is no text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "is not valid Unicode") from None
    return value


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Usage so far with every chunk."""
    include_obfuscation: Annotated[Any, neutral(False)] = None


Stop = Annotated[
    list[Annotated[str, Field(min_length=1), AfterValidator(_unicode)]],
    BeforeValidator(_as_list),
    Field(max_length=MAX_STOPS, description="A text or a list of texts; generation ends before the first one."),
]


Unicode = Annotated[str, AfterValidator(_unicode)]
Metadata = Annotated[
    dict[Annotated[Unicode, Field(max_length=64)], Annotated[Unicode, Field(max_length=512)]], Field(max_length=16)
]
Bias = Annotated[float, Field(ge=-100, le=100)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = list[TokenId]


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    definition: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    strict: bool | None = None
    """What cannot be enforced is refused by name. Otherwise it is left to the model, and the rest enforced."""


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StructuralTagFormat(Strict):
    type: Literal["structural_tag"]
    format: dict[str, Any]
    """xgrammar's description of text and JSON interleaved."""


def by_type(tags: dict[str, str]) -> Callable[[Any], str | None]:
    """Which of a union's members a value is, by its `type`; "str" in tags: a plain text. Tags are names of types:
    errors leave those out of a field's path."""

    def tag_of(value: Any) -> str | None:
        if isinstance(value, str):
            return tags.get("str")
        kind = cast("dict[str, Any]", value).get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return tags.get(kind) if isinstance(kind, str) else None

    return tag_of


_FORMS = {
    "text": "TextFormat", "json_object": "JsonObjectFormat", "json_schema": "JsonSchemaFormat",
    "structural_tag": "StructuralTagFormat",
}  # fmt: skip


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("TextFormat")]
    | Annotated[JsonObjectFormat, Tag("JsonObjectFormat")]
    | Annotated[JsonSchemaFormat, Tag("JsonSchemaFormat")]
    | Annotated[StructuralTagFormat, Tag("StructuralTagFormat")],
    Discriminator(
        by_type(_FORMS),
        custom_error_type="response_format",
        custom_error_message=f"type must be one of {', '.join(_FORMS)}",
    ),
]


class StructuredOutputs(Strict):
    """vLLM's field: the answer's content conforms to exactly one of these."""

    definition: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    """A JSON Schema, or its text."""
    regex: Unicode | None = None
    choice: list[Unicode] | None = None
    grammar: Unicode | None = None
    """EBNF; the first rule is `root`."""
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = None
    """false: white space wherever JSON allows it. Otherwise JSON has one form, as json.dumps writes it."""
    disable_fallback: Annotated[Any, neutral(False)] = None
    disable_additional_properties: Annotated[Any, neutral(True)] = None
    whitespace_pattern: Annotated[Any, neutral()] = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        asked = (self.definition, self.regex, self.choice, self.grammar, self.json_object or None, self.structural_tag)
        if sum(value is not None for value in asked) != 1:
            names = "json, regex, choice, grammar, json_object, structural_tag"
            raise PydanticCustomError("structured_outputs", "give exactly one of {names}", {"names": names})
        return self

    def schema_value(self) -> Any:
        return _from_text(self.definition, "json")

    def structural_tag_format(self) -> dict[str, Any]:
        tag = _from_text(self.structural_tag, "structural_tag")
        form = cast("dict[str, Any]", tag).get("format") if isinstance(tag, dict) else None
        if not isinstance(form, dict):
            raise GrammarError('structural_tag: an object {"type": "structural_tag", "format": {…}} is needed')
        return cast("dict[str, Any]", form)


def _from_text(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{name}: not valid JSON: {error}") from error


class GenerationRequest(Strict):
    """What chat and plain completions have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Stop | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=256)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(max_length=256), AfterValidator(_unicode)] | None = None
    return_token_ids: bool | None = None
    user: Annotated[str, Field(max_length=256), AfterValidator(_unicode)] | None = None
    """Users who wait are served fairly."""
    session_id: Annotated[str, Field(max_length=256), AfterValidator(_unicode)] | None = None
    """Whose next turn this is, where an agent rewrites its history; sessions are recognised without it."""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds; a request that is not finished by then ends with 504."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[Unicode, Bias], Field(max_length=MAX_BIASED)] | None = None
    """Token id (as JSON's keys are: in quotes) to what is added to its logit."""
    prompt_logprobs: NumLogprobs | None = None
    """Of each prompt token so many of the best; in a stream they come with an answer's first event."""
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    bad_words: Annotated[list[Annotated[Unicode, Field(min_length=1)]], Field(max_length=MAX_BAD_WORDS)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Keep only so many of the prompt's last tokens."""
    return_tokens_as_token_ids: bool | None = None
    """In log-probabilities, tokens are written as "token_id:123": strings that are unique."""
    spaces_between_special_tokens: Annotated[Any, neutral(True)] = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    guided_json: Annotated[Any, removed("structured_outputs.json")] = None
    guided_regex: Annotated[Any, removed("structured_outputs.regex")] = None
    guided_choice: Annotated[Any, removed("structured_outputs.choice")] = None
    guided_grammar: Annotated[Any, removed("structured_outputs.grammar")] = None
    guided_decoding_backend: Annotated[Any, removed("structured_outputs")] = None
    guided_whitespace_pattern: Annotated[Any, removed("structured_outputs.disable_any_whitespace")] = None
    use_beam_search: Annotated[Any, neutral(False)] = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None

    @model_validator(mode="after")
    def _check_together(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options: only allowed with stream: true")
        if self.min_tokens and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise PydanticCustomError("min_tokens", "min_tokens: must not be above max_tokens")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    """A caching hint of Anthropic's, which some agents send to everybody: prefixes are kept here without one."""


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    index: Annotated[int, Field(ge=0)] | None = None
    """As clients have it from a stream's deltas and send it back; the list's order is what counts."""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """What the model thought before; its template decides whether it sees that again."""
    reasoning: str | None = None
    """The same under its other name."""
    refusal: Annotated[Any, neutral()] = None
    annotations: Annotated[Any, neutral([])] = None
    audio: Annotated[Any, neutral()] = None
    function_call: Annotated[Any, neutral()] = None

    def text(self) -> str:
        """The parts of the content joined, as templates get it."""
        content = self.content
        return "\n".join(part.text for part in content) if isinstance(content, list) else content or ""

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content", "content: must not be empty (only an assistant's may be)")
        return self


class FunctionDefinition(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON Schema of the arguments object."""
    strict: bool | None = None
    """The arguments of a call conform to the schema, also where the model may choose whether to call."""


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Strict):
    name: str


class NamedChoice(Strict):
    type: Literal["function"]
    function: FunctionName


class FunctionReference(Strict):
    type: Literal["function"]
    function: FunctionName


class AllowedSet(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionReference], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(Strict):
    """Only these of the tools may be called; the prompt tells of all, so that it stays what is cached."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedSet

    @property
    def must_call(self) -> bool:
        return self.allowed_tools.mode == "required"

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.allowed_tools.tools)


NOT_A_CHOICE = "must be none, auto, required, or an object of type function or allowed_tools"
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("str")]
    | Annotated[NamedChoice, Tag("NamedChoice")]
    | Annotated[AllowedChoice, Tag("AllowedChoice")],
    Discriminator(
        by_type({"str": "str", "function": "NamedChoice", "allowed_tools": "AllowedChoice"}),
        custom_error_type="tool_choice",
        custom_error_message=NOT_A_CHOICE,
    ),
]

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""How much a model is to think before it answers; its chat template says what it makes of that (reasoning.py)."""
CacheHint = Annotated[
    Any, Field(description="A hint of OpenAI's to its own prompt cache: prefixes are kept here without one.")
]


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    """Left out: auto with tools, none without."""
    parallel_tool_calls: bool | None = None
    """false: at most one call in an answer."""
    include_reasoning: bool | None = None
    """false: reasoning is not shown (it is counted)."""
    functions: Annotated[Any, neutral([])] = None
    function_call: Annotated[Any, neutral("none", "auto")] = None
    audio: Annotated[Any, neutral()] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    prediction: Annotated[Any, neutral()] = None
    reasoning_effort: Effort | None = None
    verbosity: Annotated[Any, neutral("medium")] = None
    web_search_options: Annotated[Any, neutral()] = None
    metadata: Metadata | None = None
    """Labels of a stored completion: nothing is stored here, and nothing else depends on them."""
    store: Annotated[Any, neutral(False)] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """A routing hint of OpenAI's: prefixes are found here without one."""
    prompt_cache_retention: CacheHint = None
    prompt_cache_options: CacheHint = None
    moderation: Annotated[Any, neutral()] = None
    continue_final_message: bool | None = None
    """The last message is left open: the answer goes on where it ends. Not with add_generation_prompt."""
    echo: bool | None = None
    """The answer begins with the last message, where that is the assistant's."""

    @model_validator(mode="after")
    def _check_final_message(self) -> ChatCompletionRequest:
        if self.continue_final_message and self.add_generation_prompt:
            message = "add_generation_prompt: not with continue_final_message, which leaves the last message open"
            raise PydanticCustomError("add_generation_prompt", message)
        if self.continue_final_message and not (self.messages[-1].content and not self.messages[-1].tool_calls):
            message = "continue_final_message: the last message has no text to go on from"
            raise PydanticCustomError("continue_final_message", message)
        return self

    @property
    def echoed(self) -> str:
        """What the answer begins with."""
        last = self.messages[-1]
        return last.text() if self.echo and last.role == "assistant" else ""

    @model_validator(mode="after")
    def _check_tools(self) -> ChatCompletionRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise PydanticCustomError("tools", "tools: two of them have the same name")
        if isinstance(self.tool_choice, AllowedChoice) and not self.tool_choice.names <= set(names):
            raise PydanticCustomError("tool_choice", "tool_choice: allows a function that is not among the tools")
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise PydanticCustomError("tool_choice", "tool_choice: names a function that is not among the tools")
        if self.tool_choice == "required" and not names:
            raise PydanticCustomError("tool_choice", "tool_choice: required, but there are no tools")
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs: only allowed with logprobs: true")
        return self


class CompletionRequest(GenerationRequest):
    prompt: Annotated[
        str | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)],
        Field(description="A text, token ids, or a list of either."),
    ]  # fmt: skip
    add_special_tokens: bool | None = None
    best_of: Annotated[Any, neutral(1)] = None
    echo: bool | None = None
    """The prompt comes back before its continuation, with its log-probabilities where logprobs asks for them."""
    logprobs: NumLogprobs | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """0 only with echo: nothing but the prompt."""
    suffix: Annotated[Any, neutral("")] = None

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "max_tokens: must be at least 1 (0 is for echo: true)")
        return self


class EmbeddingRequest(Strict):
    model: str
    input: Annotated[
        str | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)],
        Field(description="A text, token ids, or a list of either."),
    ]  # fmt: skip
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last", "cls"] | None = None
    """How the hidden states of an input become one vector; as the model's files say, else their mean."""
    normalize: bool | None = None
    """To length 1; as the model's files say, else yes."""
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """The first so many numbers of it, of a model that was trained for that."""
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(max_length=256), AfterValidator(_unicode)] | None = None
    user: Annotated[str, Field(max_length=256), AfterValidator(_unicode)] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "prompt: give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: TokenIds


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class AnswerCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[AnswerCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mainsail"
    root: str
    parent: str | None = None
    """Of a LoRA adapter: the base model."""
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class ProbeState(BaseModel):
    status: Literal["ok", "failed"]
    message: str


class SleepState(BaseModel):
    is_sleeping: bool


class LoadAdapterRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(min_length=1)
    """What clients then ask for as `model`."""
    lora_path: str = Field(min_length=1)
    """A folder where the server runs, with adapter_config.json and adapter_model.safetensors."""


class UnloadAdapterRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(min_length=1)


class DetokenizeResponse(BaseModel):
    prompt: str
