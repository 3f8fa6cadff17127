"""Chat templates: the model's own Jinja text, in a sandbox, with the helpers that the field's templates expect.

A template comes with the model and is not trusted: it runs in Jinja's immutable sandbox. What it refuses
(`raise_exception`) is the client's error, and so is a message list that it cannot render.
"""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from mainsail_engine.errors import RequestError, UnsupportedModelError


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML characters; models were trained on plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson  # pyright: ignore[reportUnknownMemberType]
    names: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(names)  # pyright: ignore[reportUnknownMemberType]
    return environment


_END = "\x00end of the last message\x00"
"""Marks where a message that is continued ends; no tokenizer ever sees it."""


class ChatTemplate:
    """One compiled template and the special tokens that it may name (`bos_token`, `eos_token`, …)."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UnsupportedModelError(f"the model's chat template is broken: {error}") from error
        self.source = source
        self._special_tokens = special_tokens

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt's text. Raises RequestError (400) when the template refuses the messages.

        continue_final_message: it ends with the last message's content, whatever the template writes after that.
        """
        if not continue_final_message:
            return self._render(messages, add_generation_prompt, tools, variables)
        marked = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _END}]
        text, found, _ = self._render(marked, False, tools, variables).rpartition(_END)
        if not found:
            message = "this model's chat template does not show the last message: it cannot be continued"
            raise RequestError(message, param="continue_final_message")
        return text

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any] | None,
    ) -> str:
        context = {**self._special_tokens, **(variables or {})}
        try:
            return self._template.render(
                **{**context, "messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
            )
        except _Refused as error:
            raise RequestError(
                f"the chat template refuses these messages: {error.message}", param="messages"
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            message = f"the chat template cannot render these messages: {error}"
            raise RequestError(message, param="messages") from error
