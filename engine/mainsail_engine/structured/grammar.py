"""What an answer must conform to, as it travels to the core: one of four kinds, checked for form and size.

Every other way to say it (choices, a JSON object of any form, tool calls) is written as one of these. Whether the text
*is* a grammar only the compiler can tell; what is refused here costs nothing to refuse. `GrammarError` becomes the 400
of the request that carries the grammar.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from mainsail_engine.structured.json_schema import SchemaError, enforceable

MAX_CHARS = 512 * 1024
MAX_PATTERN_CHARS = 16 * 1024
MAX_CHOICES = 4096


TRY_AGAIN = "try again later"
"""How an error ends that says nothing about the grammar."""


class GrammarError(ValueError):
    """No grammar, or none that can be enforced: the message is for the client."""


class Kind(enum.StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    EBNF = "ebnf"
    STRUCTURAL_TAG = "structural_tag"


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """Equal values are one grammar: this is the cache's key."""

    kind: Kind
    text: str
    any_whitespace: bool = False
    """JSON: white space wherever JSON allows it. Otherwise one form, ", " and ": ", as json.dumps writes: a model
    cannot get lost in blank lines, and what is forced can be jumped over."""


def json_schema(schema: Any, *, strict: bool, any_whitespace: bool = False) -> Grammar:
    """JSON that validates against the schema (see json_schema.py for what strict means). Raises GrammarError."""
    return Grammar(Kind.JSON_SCHEMA, checked_schema(schema, strict=strict), any_whitespace)


def checked_schema(schema: Any, *, strict: bool) -> str:
    """The schema's text in the form that the compiler enforces. Raises GrammarError."""
    try:
        plain = enforceable(schema, strict=strict)
    except SchemaError as error:
        raise GrammarError(str(error)) from error
    return _bounded(msgspec.json.encode(plain).decode(), MAX_CHARS, "schema")


def json_object(*, any_whitespace: bool = False) -> Grammar:
    """Any JSON object."""
    return Grammar(Kind.JSON_SCHEMA, '{"type":"object"}', any_whitespace)


def regex(pattern: str) -> Grammar:
    if not pattern:
        raise GrammarError("the pattern is empty")
    return Grammar(Kind.REGEX, _bounded(pattern, MAX_PATTERN_CHARS, "pattern"))


def choice(options: list[str]) -> Grammar:
    """One of these texts."""
    if not options or not all(options):
        raise GrammarError("give at least one choice, and no empty one")
    if len(options) > MAX_CHOICES:
        raise GrammarError(f"at most {MAX_CHOICES} choices are possible, not {len(options)}")
    elements = [{"type": "const_string", "value": option} for option in dict.fromkeys(options)]
    return structural_tag(elements[0] if len(elements) == 1 else {"type": "or", "elements": elements})


def ebnf(text: str) -> Grammar:
    """A context-free grammar in the form of llama.cpp's GBNF; the first rule is `root`."""
    if not text.strip():
        raise GrammarError("the grammar is empty")
    return Grammar(Kind.EBNF, _bounded(text, MAX_CHARS, "grammar"))


def structural_tag(form: dict[str, Any], *, any_whitespace: bool = False) -> Grammar:
    """Text and JSON interleaved, in xgrammar's own description (`format` of a structural tag)."""
    text = msgspec.json.encode({"type": "structural_tag", "format": form}).decode()
    return Grammar(Kind.STRUCTURAL_TAG, _bounded(text, MAX_CHARS, "grammar"), any_whitespace)


def schema_node(schema: Any, *, strict: bool) -> dict[str, Any]:
    """JSON of this schema, as a part of a structural tag."""
    return {"type": "json_schema", "json_schema": msgspec.json.decode(checked_schema(schema, strict=strict))}


def as_node(grammar: Grammar) -> dict[str, Any]:
    """A grammar as a part of a structural tag."""
    if grammar.kind is Kind.JSON_SCHEMA:
        return {"type": "json_schema", "json_schema": msgspec.json.decode(grammar.text)}
    if grammar.kind is Kind.REGEX:
        return {"type": "regex", "pattern": grammar.text}
    if grammar.kind is Kind.EBNF:
        return {"type": "grammar", "grammar": grammar.text}
    return msgspec.json.decode(grammar.text)["format"]


def _bounded(text: str, limit: int, what: str) -> str:
    if len(text) > limit:
        raise GrammarError(f"the {what} has {len(text)} characters; at most {limit} are possible")
    return text
