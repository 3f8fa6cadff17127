"""Schemas: what is rewritten, what is refused by name; and random ones, whose answers must validate."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mainsail_engine.structured import grammar as g
from mainsail_engine.structured.json_schema import SchemaError, enforceable

OBJECT = {"type": "object"}
INTEGER = {"type": "integer"}

REFUSED: list[tuple[Any, str]] = [
    ([], "schema is an object"),
    ({"type": "thing"}, r"\$\.type"),
    ({"type": "array", "items": INTEGER, "uniqueItems": True}, r"\$\.uniqueItems"),
    ({"type": "array", "contains": INTEGER}, r"\$\.contains"),
    ({"type": "integer", "multipleOf": 3}, r"\$\.multipleOf"),
    ({"type": "integer", "not": {"const": 3}}, r"\$\.not"),
    ({"if": INTEGER, "then": {"minimum": 3}, "type": "integer"}, r"\$\.if"),
    ({"type": "string", "pattern": "^a+$", "maxLength": 2}, "beside pattern"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, r"\$\.dependentRequired"),
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/P", "minimum": 5}}}, r"\$\.properties\.a\.minimum"),
    ({"oneOf": [INTEGER, {"type": "number"}]}, "may overlap"),
    ({"oneOf": [OBJECT, OBJECT]}, "may overlap"),
    ({"$ref": "https://example.com/schema"}, "inside the schema"),
    ({"allOf": [{"type": "object", "properties": {"a": INTEGER}}, {"type": "object", "properties": {"a": INTEGER}}]},
     "common properties"),
    ({"type": "object", "required": ["b"], "properties": {"a": INTEGER}, "additionalProperties": False}, "forbids it"),
    ({"type": "object", "required": "a"}, r"\$\.required"),
    ({"type": "object", "properties": []}, r"\$\.properties"),
    ({"type": "array", "minItems": -1}, r"\$\.minItems"),
    ({"enum": []}, r"\$\.enum"),
    ({"type": "string", "enum": [1, 2]}, "no value of the enum"),
    ({"anyOf": "x"}, r"\$\.anyOf"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "why"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_enforced_is_refused_by_name(schema: Any, why: str) -> None:
    with pytest.raises(SchemaError, match=why):
        enforceable(schema, strict=True)


def test_without_strict_the_rest_is_enforced() -> None:
    schema = {"type": "array", "items": {"type": "integer", "multipleOf": 2}, "uniqueItems": True, "maxItems": 3}
    assert enforceable(schema, strict=False) == {"type": "array", "maxItems": 3, "items": {"type": "integer"}}


def test_depth_is_bounded() -> None:
    schema: dict[str, Any] = {}
    for _ in range(2000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(SchemaError, match="levels deep"):
        enforceable(schema, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_objects_that_say_nothing_are_closed(strict: bool) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"a": INTEGER}}
    assert enforceable(schema, strict=strict) == {**schema, "additionalProperties": False}
    for said in ({"additionalProperties": True}, {"minProperties": 2}):
        assert enforceable({**schema, **said}, strict=strict) == {**schema, **said}
    assert enforceable({"type": "object"}, strict=strict) == {"type": "object"}


def test_a_branch_that_stands_for_others_stays_open() -> None:
    """Without strict, of branches that cannot be combined the first one is enforced: the others may want more."""
    one: dict[str, Any] = {"type": "object", "properties": {"a": INTEGER}}
    two = {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "required": ["b"]}
    assert enforceable({"allOf": [one, two]}, strict=False) == {**one, "additionalProperties": True}


def test_disjoint_branches_of_one_of_become_any_of() -> None:
    tagged = [
        {"type": "object", "properties": {"kind": {"const": kind}, "x": INTEGER}, "required": ["kind"]}
        for kind in ("a", "b")
    ]
    assert "anyOf" in enforceable({"oneOf": tagged}, strict=True)  # type: ignore[operator]
    assert "anyOf" in enforceable({"oneOf": [INTEGER, {"type": "string"}]}, strict=True)  # type: ignore[operator]


def test_pydantic_schemas_pass() -> None:
    import datetime
    from typing import Literal

    from pydantic import BaseModel, Field

    class Place(BaseModel):
        city: str = Field(description="where", max_length=40)
        zip: str = Field(pattern=r"^[0-9]{5}$")

    class Person(BaseModel):
        """Somebody."""

        name: str
        born: datetime.date | None = None
        home: Place
        tags: list[Literal["a", "b"]] = Field(default_factory=list, max_length=3)
        friends: list[Person] = Field(default_factory=list, max_length=1)

    enforceable(Person.model_json_schema(), strict=True)


@pytest.mark.model
@pytest.mark.parametrize(
    ("bounds", "good", "bad"),
    [
        ({"maxLength": 3}, ["", "é日z", "~ '"], ["four", "\x02", "a\tb", "\x1f", "\n"]),
        ({"minLength": 2}, ["ab", "a long one"], ["", "a", "a\x00"]),
        ({"minLength": 1, "maxLength": 2}, ["x", "xy"], ["", "xyz", "\r"]),
    ],
)
def test_strings_of_a_length_hold_no_control_characters(
    grammars: Any, bounds: dict[str, int], good: list[str], bad: list[str]
) -> None:
    """Raw ones would make the answer invalid JSON."""
    grammar = g.json_schema({"type": "string", **bounds}, strict=True)

    def accepts(text: str) -> bool:
        constraint = grammars.constraint(grammar, jump_forward=False)
        ids = [grammars.vocabulary.tokens.index(bytes([byte])) for byte in f'"{text}"'.encode()]
        return all(constraint.accept(token) for token in ids)

    assert [text for text in good if not accepts(text)] == []
    assert [text for text in bad if accepts(text)] == []


# -- random schemas ---------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "name", "größe", "x y", 'q"', "id"])
LOW, FEW = st.integers(-99, 99), st.integers(1, 9)
SCALARS: list[st.SearchStrategy[dict[str, Any]]] = [
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n}, LOW, st.integers(0, 99)),
    st.builds(lambda low, n: {"type": "integer", "exclusiveMinimum": low, "maximum": low + n}, LOW, FEW),
    st.builds(lambda low, n: {"type": "string", "minLength": low, "maxLength": low + n}, st.integers(0, 4), FEW),
    st.sampled_from([{"type": "string", "pattern": p} for p in ("^[a-c]{2,4}$", "^(x|yy)z?$", "^[0-9]+-[A-F]$")]),
    st.sampled_from([{"type": "string", "format": f} for f in ("date", "uuid", "ipv4", "time")]),
    st.lists(st.sampled_from(["a", "ß", 'say "x"', 1, -2.5, None, True]), min_size=1, max_size=4, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from([{"const": v} for v in ("c", 7, None, [1, "x"], {"k": 1})]),
    st.builds(lambda n: {"type": ["integer", "null"], "minimum": n, "maximum": n + 5}, FEW),
]


def _object(properties: dict[str, Any], required: set[str], extra: bool) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if names := sorted(required & properties.keys()):
        schema["required"] = names
    if not extra:
        schema["additionalProperties"] = False
    return schema


def _array(items: Any, low: int, extra: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + extra}


SCHEMAS = st.recursive(
    st.one_of(SCALARS),
    lambda inner: st.one_of(
        st.builds(_object, st.dictionaries(NAMES, inner, max_size=4), st.sets(NAMES), st.booleans()),
        st.builds(_array, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
        st.builds(lambda a, b: {"type": "array", "prefixItems": [a, b], "minItems": 2, "items": False}, inner, inner),
    ),
    max_leaves=5,
)
WITH_REFERENCES = st.builds(
    lambda part, whole: {
        "$defs": {"p": part},
        "type": "object",
        "properties": {"first": {"$ref": "#/$defs/p"}, "second": {"anyOf": [{"$ref": "#/$defs/p"}, whole]}},
        "required": ["second"],
    },
    SCHEMAS,
    SCHEMAS,
)


@pytest.mark.model
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS | WITH_REFERENCES, seed=st.integers(0, 2**32 - 1), jump_forward=st.booleans())
def test_whatever_is_written_validates(grammars: Any, schema: dict[str, Any], seed: int, jump_forward: bool) -> None:
    """Random tokens among the allowed ones, but for parts of characters: of these xgrammar allows some that make no
    UTF-8 (E0 80, ED A0, F0 80), which come out as U+FFFD and may be counted wrong."""
    try:
        grammar = g.json_schema(schema, strict=True)
    except g.GrammarError:
        return
    constraint = grammars.constraint(grammar, jump_forward=jump_forward)
    numbers = random.Random(seed)
    ends = {2}

    def choose(allowed: np.ndarray) -> int:
        # Mostly short tokens that end things, so that texts end.
        allowed = np.array([t for t in allowed if t in grammars.whole] or allowed.tolist())
        short = [t for t in allowed if t in ends or grammars.vocabulary.tokens[t] in (b'"', b"}", b"]", b"0", b"1")]
        return int(numbers.choice(short if short and numbers.random() < 0.7 else allowed))

    text, _ = grammars.write(constraint, choose, most=4000)
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
