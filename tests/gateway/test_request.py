import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainsail_gateway.errors import GatewayError
from mainsail_gateway.request import DEFAULT_ANSWER_TOKENS, MAX_ANSWER_TOKENS, parse

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def test_what_is_read():
    messages = [{"role": "user", "content": "x" * 400}]
    parsed = parse(
        json.dumps({"messages": messages, "model": "m", "max_tokens": 7, "user": "u", "stream": True}).encode()
    )
    assert (parsed.model, parsed.stream, parsed.session) == ("m", True, "u")
    assert parsed.prompt == json.dumps(messages).encode()
    assert parsed.weight == len(parsed.prompt) // 4 + 7


@pytest.mark.parametrize(
    ("limits", "answer"),
    [
        ({}, DEFAULT_ANSWER_TOKENS),
        ({"max_tokens": 10**9}, MAX_ANSWER_TOKENS),
        ({"max_tokens": -1}, DEFAULT_ANSWER_TOKENS),
        ({"max_tokens": "7"}, DEFAULT_ANSWER_TOKENS),
        ({"max_tokens": 9, "max_completion_tokens": 8}, 8),
    ],
)
def test_the_answers_part_of_the_weight(limits, answer):
    assert parse(json.dumps({"model": "m", **limits}).encode()).weight == answer


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(body):
    try:
        parse(body)
    except GatewayError as error:
        assert error.status == 400  # noqa: PT017


@given(st.dictionaries(st.sampled_from(["model", "messages", "prompt", "tools", "user", "max_tokens", "n"]), anything))
def test_any_object_is_read_or_refused(fields):
    try:
        assert parse(json.dumps(fields).encode()).model == fields["model"]
    except GatewayError as error:
        assert (error.status, error.param) == (400, "model")  # noqa: PT017
        assert not isinstance(fields.get("model"), str) or not fields["model"]


def test_a_timeout_without_end_is_no_failure_of_the_gateway():
    found = parse(b'{"model": "m", "timeout": 1%b}' % (b"0" * 400))
    assert found.timeout_s is not None
    assert found.timeout_s > 1e15
