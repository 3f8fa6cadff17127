"""Forced tokens: the same text as without them, in fewer steps; the token at a border is left to the model."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mainsail_engine.structured import grammar as g
from mainsail_engine.structured.jump_forward import JumpForward
from mainsail_engine.structured.vocabulary import Vocabulary

pytestmark = pytest.mark.model
PERSON = {
    "type": "object",
    "properties": {"first_name": {"type": "string", "maxLength": 8}, "profession": {"enum": ["sailor", "carpenter"]}},
    "required": ["first_name", "profession"],
}


def best(allowed: np.ndarray) -> int:
    """As decided as greedy sampling: the allowed token with the lowest number."""
    return int(allowed[0])


def spelled(grammars: Any, tokens: list[int]) -> str:
    return b"".join(grammars.vocabulary.tokens[token] for token in tokens).decode()


def test_what_is_forced_is_written_at_once(grammars: Any) -> None:
    constraint = grammars.constraint(g.json_schema(PERSON, strict=True), jump_forward=True)
    beginning = constraint.forced(100)
    assert spelled(grammars, beginning) == '{"first_name":'  # space and quote are one token, and perhaps more
    for token in (b' "', b'",'):
        assert constraint.accept(grammars.vocabulary.tokens.index(token))
    assert spelled(grammars, constraint.forced(100)) == ' "profession":'


@pytest.mark.parametrize(
    "grammar",
    [
        g.choice(["exactly this, and nothing else"]),
        g.ebnf('root ::= "SELECT " ("a" | "b") " FROM t WHERE x = 1;"'),
        g.json_schema({"const": {"a": [1, 2, {"b": None}]}}, strict=True),
        g.regex("(AB|CD)-1234567-(x|y)"),
        g.choice(["größer als Ω", "größer als 🙂"]),
    ],
    ids=["const", "ebnf", "json", "regex", "unicode"],
)
def test_the_text_is_the_same_with_and_without(grammars: Any, grammar: g.Grammar) -> None:
    """Every choice is made the same way: by the bytes, not by how they are cut into tokens."""
    for seed in range(4):
        texts = []
        for jump_forward in (False, True):
            constraint = grammars.constraint(grammar, jump_forward=jump_forward)
            numbers = random.Random(seed)
            favourite = numbers.choice(["first", "last"])

            def by_bytes(allowed: np.ndarray, favourite: str = favourite) -> int:
                key = lambda t: (grammars.vocabulary.tokens[t][:1] or b"\xff", len(grammars.vocabulary.tokens[t]))  # noqa: E731
                return int((min if favourite == "first" else max)(allowed, key=key))

            texts.append(grammars.write(constraint, by_bytes))
        (without, all_chosen), (with_jumps, few_chosen) = texts
        assert with_jumps == without
        assert few_chosen < all_chosen


def test_the_end_is_forced_too(grammars: Any) -> None:
    constraint = grammars.constraint(g.choice(["no, never", "yes"]), jump_forward=True)
    assert constraint.accept(grammars.vocabulary.tokens.index(b"no"))
    tokens = constraint.forced(100)
    assert spelled(grammars, tokens) == ", never"
    assert tokens[-1] == 2
    assert constraint.ended


def test_bounds_are_kept_and_what_is_not_taken_is_not_accepted(grammars: Any) -> None:
    grammar = g.json_schema(PERSON, strict=True)
    whole = grammars.constraint(grammar, jump_forward=True).forced(100)
    constraint = grammars.constraint(grammar, jump_forward=True)
    assert constraint.forced(2) == whole[:2]
    assert constraint.forced(100, least=50) == []
    assert constraint.forced(0) == []
    assert constraint.forced(100) == whole[2:]


def test_half_a_character_forces_nothing(grammars: Any) -> None:
    """A token may end within a character: there is no text to force until it is complete."""
    tokens = [token for token in grammars.vocabulary.tokens if token]
    half = next(t for t in tokens if t and "🙂".encode().startswith(t) and len(t) < 4)
    constraint = grammars.constraint(g.choice(["🙂 yes"]), jump_forward=True)
    assert constraint.accept(grammars.vocabulary.tokens.index(half))
    assert constraint.forced(10) == []
    assert len(grammars.allowed(constraint))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), max_size=30), more=st.text(max_size=5))
def test_stable_tokens_stay_whatever_follows(vocabulary: Vocabulary, text: str, more: str) -> None:
    tokens, stable = JumpForward(vocabulary).tokens(text)
    assert 0 <= stable <= len(tokens)
    if not tokens:
        return
    assert b"".join(vocabulary.tokens[t] for t in tokens) == text.encode()
    encode = vocabulary.encode
    assert encode is not None
    if more and json.dumps(more[0], ensure_ascii=True)[1:2].isascii() and more[0] in 'a1 ",:.}':
        assert encode(text + more[0])[:stable] == tokens[:stable]
