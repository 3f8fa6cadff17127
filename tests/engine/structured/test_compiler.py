"""Compiling: bad grammars get their reason, terrible ones cost only themselves, good ones are served afterwards."""

from __future__ import annotations

import json
import queue
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.processes import children

from mainsail_engine.structured import grammar as g
from mainsail_engine.structured.grammar import Grammar, Kind
from mainsail_engine.structured.vocabulary import Vocabulary

pytestmark = pytest.mark.model
GOOD = g.regex("[0-9]{3}")
WORKER = "mainsail_engine.structured.worker"


def items(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


BAD: list[tuple[Grammar, str]] = [
    (g.regex("("), "parenthesis"),
    (g.regex("[a"), "Unclosed"),
    (g.regex("(?<=a)b"), "not supported"),
    (g.ebnf("nonsense"), "root"),
    (g.ebnf("root ::= x"), "not defined"),
    (g.ebnf("root ::= root"), "no text conforms"),
    (g.ebnf('root ::= s\ns ::= s s s s | [a-z] | [a-z ]* | ""'), "too ambiguous"),
    (g.regex("(" * 5000 + "a" + ")" * 5000), "."),
    (g.regex("(((a{0,1000}){0,1000}){0,1000})b"), "."),
    (Grammar(Kind.JSON_SCHEMA, '{"$ref":"#"}'), "no text conforms"),
    (Grammar(Kind.JSON_SCHEMA, '{"$ref":"#/nowhere"}'), "nowhere"),
    (Grammar(Kind.JSON_SCHEMA, '{"type":"integer","minimum":5,"maximum":4}'), "minimum"),
    (Grammar(Kind.STRUCTURAL_TAG, '{"type":"structural_tag","format":{"type":"odd"}}'), "."),
    (Grammar(Kind.STRUCTURAL_TAG, "{"), "."),
]


@pytest.mark.parametrize(("grammar", "why"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_grammars_get_their_reason(grammars: Any, grammar: Grammar, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        grammars.compile(grammar)
    grammars.compile(GOOD)


def test_a_grammar_that_hangs_the_compiler_is_ended(make_grammars: Any) -> None:
    grammars = make_grammars(cpu_s=1)
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    grammars.compiler.submit(Grammar(Kind.JSON_SCHEMA, items(3000)), answers.put)
    grammars.compile(GOOD)
    assert answers.get(timeout=240) is not None


def test_memory_is_bounded(make_grammars: Any) -> None:
    words = "|".join(f"word{i}" for i in range(8000))
    grammars = make_grammars(memory_bytes=4 << 20)
    with pytest.raises(ValueError, match=r"memory|nested"):
        grammars.compile(Grammar(Kind.REGEX, words))
    grammars.compile(GOOD)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(list(Kind)), text=st.text(max_size=80) | st.from_regex(r"root ::= [\"a-z|()*+{}\[\] ]{0,40}")
)
def test_random_texts_never_end_the_compiler(grammars: Any, kind: Kind, text: str) -> None:
    error = grammars.verdict(Grammar(kind, text))
    assert error is None or (error and "ended unexpectedly" not in error)
    grammars.compile(GOOD)


def test_when_the_process_is_killed_another_one_starts(make_grammars: Any) -> None:
    others = children(WORKER, recursive=False)
    grammars = make_grammars()
    grammars.compile(GOOD)
    (mine,) = children(WORKER, recursive=False) - others
    mine.kill()
    deadline = time.monotonic() + 240
    while error := grammars.verdict(g.regex("[a-z]{7}")):  # until it is handed to the new one
        assert "try again" in error
        assert time.monotonic() < deadline


def test_the_cache_is_bounded_and_keeps_the_newest(make_grammars: Any) -> None:
    grammars = make_grammars(cache_bytes=1)
    first, second = g.regex("[a-c]+"), g.regex("[d-f]+")
    grammars.compile(first)
    held = grammars.compiler.constraint(first, jump_forward=False)
    grammars.compile(second)
    assert grammars.compiler.constraint(first, jump_forward=False) is None
    assert grammars.compiler.constraint(second, jump_forward=False) is not None
    assert b"a" in {grammars.vocabulary.tokens[t] for t in grammars.allowed(held)}


def test_a_known_grammar_is_answered_at_once(grammars: Any) -> None:
    grammars.compile(GOOD)
    answers: list[str | None] = []
    grammars.compiler.submit(GOOD, answers.append)
    assert answers == [None]


def test_a_model_without_bytes_cannot_be_constrained(make_grammars: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = make_grammars()
    monkeypatch.setattr(grammars.compiler, "_make_vocabulary", lambda: None)
    with pytest.raises(ValueError, match="tokenizer"):
        grammars.compile(GOOD)


def test_padding_and_control_tokens_are_never_allowed(make_grammars: Any) -> None:
    vocabulary = Vocabulary([b"a", b"b", b"", b"", b"ab"] + [b""] * 40, (2,))
    grammars = make_grammars(vocabulary)
    constraint = grammars.constraint(g.regex("a*b"))
    assert grammars.allowed(constraint).tolist() == [0, 1, 4]
    assert constraint.accept(4)
    assert grammars.allowed(constraint).tolist() == [2]
    assert constraint.accept(2)
    assert constraint.ended


def test_sizes_are_bounded() -> None:
    with pytest.raises(g.GrammarError, match="characters"):
        g.regex("a" * 20_000)
    with pytest.raises(g.GrammarError, match="choices"):
        g.choice([str(i) for i in range(5000)])
    with pytest.raises(g.GrammarError, match="characters"):
        g.json_schema({"enum": ["x" * 600_000]}, strict=True)
    for empty in (lambda: g.regex(""), lambda: g.choice([]), lambda: g.choice([""]), lambda: g.ebnf(" ")):
        with pytest.raises(g.GrammarError):
            empty()


def test_choices_are_taken_literally(grammars: Any) -> None:
    options = ['a "quoted" one', "back\\slash", "new\nline", "ümläut 🙂", "{x|y}*"]
    for option in options:
        text, _ = grammars.write(
            grammars.constraint(g.choice(options), jump_forward=True),
            lambda allowed, option=option: next(
                int(t) for t in sorted(allowed, key=lambda t: -len(grammars.vocabulary.tokens[t]))
                if t == 2 or option.encode().startswith(grammars.vocabulary.tokens[t])
            ),
        )  # fmt: skip
        assert text == option


def test_compact_or_free_white_space(grammars: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    fixed = grammars.constraint(g.json_schema(schema, strict=True))
    free = grammars.constraint(g.json_schema(schema, strict=True, any_whitespace=True))
    pretty = json.dumps({"a": 1}, indent=1).encode()
    assert not fixed.matcher.accept_string(pretty, False)
    assert free.matcher.accept_string(pretty, False)
