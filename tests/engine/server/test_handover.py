"""The side form of streams, and answers that go on at another engine: what is left must be equal, byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.engine.server.conftest import Engine

pytestmark = pytest.mark.model

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
QUESTION = [{"role": "user", "content": "Write three sentences about the sea. Use an emoji."}]
USAGE = {"stream_options": {"include_usage": True}}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"name": "meet", "parameters": PERSON}
CASES = {
    "greedy chat": (CHAT, {"messages": QUESTION, "temperature": 0, "max_tokens": 40, **USAGE}),
    "seeded chat": (CHAT, {"messages": QUESTION, "temperature": 1.3, "seed": 7, "top_k": 40, "max_tokens": 40}),
    "until it stops": (CHAT, {"messages": [{"role": "user", "content": "Say hi."}], "temperature": 0, **USAGE}),
    "ids shown": (CHAT, {"messages": QUESTION, "temperature": 0, "max_tokens": 24, "return_token_ids": True}),
    "no tokens of its own to show": (
        TEXT,
        {"prompt": "日本語で：", "seed": 3, "top_k": 40, "temperature": 1.5, "max_tokens": 40},
    ),
    "stop string": (
        TEXT,
        {"prompt": "One, two, three,", "temperature": 0, "stop": [" ten"], "max_tokens": 40, **USAGE},
    ),
    "min_tokens": (TEXT, {"prompt": "The end.", "seed": 5, "top_k": 40, "min_tokens": 20, "max_tokens": 30}),
    "two prompts, two answers": (
        TEXT,
        {
            "prompt": ["The sea is", "The sky is"],
            "n": 2,
            "seed": 11,
            "top_k": 40,
            "temperature": 1.1,
            "max_tokens": 12,
            **USAGE,
        },
    ),
    "penalties": (
        CHAT,
        {
            "messages": QUESTION,
            "temperature": 0.8,
            "seed": 17,
            "top_k": 40,
            "presence_penalty": 0.7,
            "frequency_penalty": 0.9,
            "repetition_penalty": 1.2,
            "max_tokens": 40,
            **USAGE,
        },
    ),
    "biased": (
        TEXT,
        {"prompt": "The sea", "temperature": 0, "logit_bias": {"260": 4, "288": -50}, "max_tokens": 24, **USAGE},
    ),
    "log-probabilities of a chat": (
        CHAT,
        {"messages": QUESTION, "temperature": 0, "logprobs": True, "top_logprobs": 2, "max_tokens": 16, **USAGE},
    ),
    "log-probabilities of a text": (
        TEXT,
        {"prompt": "One, two,", "temperature": 0, "logprobs": 2, "max_tokens": 16, **USAGE},
    ),
    "a stop string of several tokens, shown": (
        TEXT,
        {
            "prompt": "One, two, three,",
            "temperature": 0,
            "stop": [" six, seven"],
            "include_stop_str_in_output": True,
            "max_tokens": 40,
            **USAGE,
        },
    ),
    "a schema": (
        CHAT,
        {
            "messages": QUESTION,
            "temperature": 0.9,
            "seed": 5,
            "top_k": 40,
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
            "max_tokens": 60,
            **USAGE,
        },
    ),
    "a pattern": (
        TEXT,
        {
            "prompt": "Call",
            "temperature": 1.0,
            "seed": 6,
            "structured_outputs": {"regex": "[0-9]{3}-[0-9]{4} or [a-z ]{20}"},
            "max_tokens": 60,
            **USAGE,
        },
    ),
    "a call": (
        CHAT,
        {
            "messages": QUESTION,
            "temperature": 0,
            "tools": [{"type": "function", "function": TOOL}],
            "tool_choice": {"type": "function", "function": {"name": "meet"}},
            "max_tokens": 60,
            **USAGE,
        },
    ),
    "two answers of a chat": (
        CHAT,
        {"messages": QUESTION, "n": 2, "temperature": 1.0, "seed": 8, "top_k": 40, "max_tokens": 16, **USAGE},
    ),
    "usage all along": (
        CHAT,
        {
            "messages": QUESTION,
            "temperature": 0,
            "max_tokens": 16,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    "a response": (RESPONSES, {"input": "Tell me about the sea.", "temperature": 0, "max_output_tokens": 24}),
    "a response with a call": (
        RESPONSES,
        {
            "input": "Who comes?",
            "temperature": 0,
            "tools": [{"type": "function", **TOOL}],
            "tool_choice": {"type": "function", "name": "meet"},
            "max_output_tokens": 60,
        },
    ),
}


def frames(stream: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(notes, piece) of a stream in the side form, to its end."""
    while stream and stream != b":end\n":
        line, _, rest = stream.partition(b"\n")
        word, length, *notes = line.split(b" ")
        assert word == b":ids", line
        yield b" ".join(notes), rest[: int(length)]
        stream = rest[int(length) :]


def delivered(notes: list[bytes]) -> dict[int, dict]:
    choices: dict[int, dict] = {}
    for note in b" ".join(notes).split():
        index, _, tokens = note.decode().partition("=")
        choice = choices.setdefault(int(index), {"token_ids": [], "num_cached_tokens": 0, "finished": False})
        choice["finished"] = tokens.endswith(".")
        for token in filter(None, tokens.rstrip(".").split(",")):
            token_id, _, cached = token.partition("@")
            choice["num_cached_tokens"] = int(cached or choice["num_cached_tokens"])
            choice["token_ids"].append(int(token_id))
    return choices


def stream(engine: Engine, path: str, body: dict, resume: dict | None = None) -> httpx.Response:
    raw = json.dumps({"model": engine.name, "stream": True, **body}).encode()
    headers = {"x-mainsail-stream": "ids", "content-type": "application/json"}
    if resume is not None:
        told = json.dumps(resume).encode()
        headers["x-mainsail-resume"] = str(len(told))
        raw = told + raw
    return engine.http.post(engine.url + path, content=raw, headers=headers)


def identity(response: httpx.Response) -> dict:
    told = dict(part.split("=") for part in response.headers["x-mainsail-stream"].split()[1:])
    return {"id": told["id"], "created": int(told["created"])}


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_is_equal_wherever_it_broke(engine: Engine, case: str) -> None:
    goes_on(engine, *CASES[case])


THOUGHTS = [("fruit", "Apples", "An apple."), ("bird", "Ravens", "A raven."), ("tree", "Oaks", "An oak.")]
THINKING: list[dict[str, Any]] = [
    {"role": role, "content": content}
    for kind, many, one in THOUGHTS
    for role, content in (
        ("user", f"Name a {kind}."),
        ("assistant", f"<think>\nThe user wants a {kind}. {many} are a {kind}.\n</think>\n\n{one}"),
    )
] + [{"role": "user", "content": "Name a fish."}]
"""A small model that is shown how to think does so."""
ANSWER = {"type": "object", "properties": {"fish": {"type": "string", "maxLength": 12}}, "required": ["fish"],
          "additionalProperties": False}  # fmt: skip
REASONED = {
    "greedy": (CHAT, {"messages": THINKING, "temperature": 0, **USAGE}),
    "seeded, drawn from all tokens": (CHAT, {"messages": THINKING, "temperature": 0.7, "seed": 5, **USAGE}),
    "ids shown": (CHAT, {"messages": THINKING, "temperature": 0, "return_token_ids": True}),
    "kept back": (CHAT, {"messages": THINKING, "temperature": 0, "include_reasoning": False, **USAGE}),
    "a schema after it": (
        CHAT,
        {
            "messages": THINKING,
            "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}},
            **USAGE,
        },
    ),
    "a response": (RESPONSES, {"input": THINKING, "temperature": 0}),
}


def test_reasoning_goes_on_wherever_it_broke(own_engine) -> None:
    """Cut after each piece: within the tags, in the reasoning, between it and the answer, in the answer."""
    engine: Engine = own_engine("--reasoning-parser", "qwen3")
    for path, body in REASONED.values():
        limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
        whole = goes_on(engine, path, {**body, limit: 60}, everywhere=True)
        assert (b"The" in whole and b"wants" in whole) == (body.get("include_reasoning") is not False)
        assert b"think" not in whole, "the tags are nobody's"
        if "stream_options" in body:
            (used,) = re.findall(rb'"reasoning_tokens":([0-9]+)', whole)
            assert int(used) > 10


def goes_on(engine: Engine, path: str, body: dict, *, everywhere: bool = False) -> bytes:
    """A stream that breaks after some of its pieces, or each of them, and is resumed, is the undisturbed one: its
    bytes."""
    whole = stream(engine, path, body)
    assert whole.status_code == 200, whole.text
    notes, pieces = zip(*frames(whole.content), strict=True)
    assert pieces[-1].endswith(b"data: [DONE]\n\n") or whole.content.endswith(b":end\n")
    least = 2 if path == RESPONSES else 1  # a response's first piece only says that it has begun
    some = {least, least + 1, len(pieces) // 2, len(pieces) - 2, len(pieces) - 1}
    for cut in range(least, len(pieces)):  # a busy server makes fewer pieces of the same stream
        if cut not in some and not everywhere:
            continue
        resume = {**identity(whole), "choices": delivered(list(notes[:cut]))}
        rest = stream(engine, path, body, resume)
        assert rest.status_code == 200, rest.text
        got_notes, got = zip(*frames(rest.content), strict=True)
        if path == RESPONSES or "logprobs" in body:
            assert_alike(got, pieces[cut:])
        elif len(delivered(list(notes))) == 1:
            assert b"".join(got) == b"".join(pieces[cut:]), f"cut after piece {cut} of {len(pieces)}"
        else:  # choices may interleave in another order, and the cache knows more by now
            assert events(got) == events(pieces[cut:]), f"cut after piece {cut} of {len(pieces)}"
        assert tokens(got_notes) == tokens(notes[cut:])
    return b"".join(pieces)


def assert_alike(got: tuple[bytes, ...], wanted: tuple[bytes, ...]) -> None:
    """Equal but for the last bits of log-probabilities, which come of another batch, and for numbers of events, which
    go on upwards."""
    found, expected = (
        [json.loads(line[6:]) for line in b"".join(pieces).split(b"\n") if line.startswith(b"data: {")]
        for pieces in (got, wanted)
    )
    numbers = [event.pop("sequence_number", at) for at, event in enumerate(found)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert numbers[0] >= expected[0].get("sequence_number", 0)
    for event in expected:
        event.pop("sequence_number", None)
    assert_close(found, expected)


def assert_close(got: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert_close(got[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_close(one, other)
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, abs=1e-3)
    else:
        assert got == wanted


def events(pieces: tuple[bytes, ...]) -> list[bytes]:
    joined = re.sub(rb'"cached_tokens":[0-9]+', b"", b"".join(pieces))
    return sorted(event for event in joined.split(b"\n\n") if event)


def tokens(notes: tuple[bytes, ...]) -> dict[int, list[int]]:
    return {index: choice["token_ids"] for index, choice in delivered(list(notes)).items()}


def test_nobody_who_did_not_ask_sees_it(engine: Engine) -> None:
    answer = engine.chat(messages=QUESTION, max_tokens=4, stream=True)
    assert ":ids" not in answer.text
    assert "x-mainsail-stream" not in answer.headers


GOOD = {"id": "chatcmpl-1", "created": 1, "choices": {"0": {"token_ids": [5]}}}


@pytest.mark.parametrize(
    "resume",
    [
        {**GOOD, "choices": {"1": {"token_ids": [5]}}},
        {**GOOD, "choices": {"0": {"token_ids": [-1]}}},
        {**GOOD, "choices": {"0": {"token_ids": [10**6]}}},
        {**GOOD, "choices": {"0": {"token_ids": [5] * 8}}},
        {**GOOD, "choices": {"0": {"token_ids": [5] * 9, "finished": True}}},
        {**GOOD, "choices": {"0": {"token_ids": "5"}}},
        {**GOOD, "more": 1},
        {"id": "x"},
        [],
    ],
)
def test_a_resume_that_cannot_be_is_refused(engine: Engine, resume: object) -> None:
    answer = stream(engine, CHAT, {"messages": QUESTION, "max_tokens": 8}, resume)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_resume")


@pytest.mark.parametrize("size", ["0", "-1", "x", "99999"])
def test_a_resume_of_a_wrong_size_is_refused(engine: Engine, size: str) -> None:
    answer = engine.http.post(engine.url + CHAT, content=b"{}", headers={"x-mainsail-resume": size})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_resume")


def test_only_streams_are_resumed(engine: Engine) -> None:
    answer = stream(engine, CHAT, {"messages": QUESTION, "max_tokens": 8, "stream": False}, GOOD)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_resume")


def test_an_engine_at_the_bound_of_its_drain_hands_over(own_engine) -> None:
    engine: Engine = own_engine("--drain-timeout", "0.2")
    body = {"model": engine.name, "messages": QUESTION, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with engine.http.stream("POST", engine.url + CHAT, json=body, headers={"x-mainsail-stream": "ids"}) as answer:
        chunks = answer.iter_raw()
        text = next(chunks)
        engine.terminate()
        text += b"".join(chunks)
    assert text.endswith(b":handover shutting_down\n\n")
    assert b"error" not in text
    assert engine.wait() == 0
