"""What an answer's head says of its prompt's blocks."""

from __future__ import annotations

import base64
import struct

import pytest
from starlette.requests import Request

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.kv.block_hash import block_hashes
from mainsail_engine.request import SamplingParams
from mainsail_engine.server.serving import Job
from mainsail_engine.server.told_blocks import BLOCKS_HEADER, MAX_TOLD, SAMPLE, blocks_header


def asking(value: bytes = b"tell") -> Request:
    return Request({"type": "http", "headers": [(BLOCKS_HEADER.encode(), value)]})


def job(length: int) -> Job:
    return Job([(7 * n) % 1000 for n in range(length)], SamplingParams(max_tokens=1), cache_salt="s")


@pytest.mark.parametrize("length", [1, BLOCK_SIZE * 40 + 3, BLOCK_SIZE * 4000])
def test_sampled_blocks_are_told_with_where_they_end(length: int) -> None:
    one = job(length)
    tokens, _, packed = blocks_header(asking(), [one])[BLOCKS_HEADER].partition(" ")
    told = list(struct.iter_unpack(">IQ", base64.b64decode(packed)))
    every = {number * BLOCK_SIZE: found for number, found in enumerate(block_hashes(one.prompt_token_ids, "s"), 1)}
    sampled = [(end, found) for end, found in every.items() if found % SAMPLE == 0]
    assert int(tokens) == length
    assert set(told) <= set(sampled)
    assert told == sorted(told)
    assert len(told) == min(len(told), MAX_TOLD)
    assert told[-1:] == sampled[-1:]
    if len(sampled) <= MAX_TOLD:
        assert told == sampled


def test_nobody_is_told_who_does_not_ask() -> None:
    assert blocks_header(asking(b"no"), [job(100)]) == {}
    assert blocks_header(Request({"type": "http", "headers": []}), [job(100)]) == {}
