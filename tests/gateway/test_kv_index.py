"""Which endpoint has what of a prompt, by the blocks that engines tell of."""

from __future__ import annotations

import base64
import struct
from array import array

from hypothesis import given
from hypothesis import strategies as st

from mainsail_gateway import kv_index
from mainsail_gateway.balance import Prefix
from mainsail_gateway.kv_index import SAMPLE, Blocks, KVIndex

SHORT, LONG, TALK = Prefix(b"short", 128), Prefix(b"long", 512), Prefix(b"talk", 1000)


def blocks(*hashes: int, tokens: int = 0) -> Blocks:
    ends = array("I", [64 * (n + 1) for n in range(len(hashes))])
    return Blocks(tokens or 64 * len(hashes), ends, array("Q", [SAMPLE * h for h in hashes]))


def index(**has: tuple[int, ...]) -> KVIndex:
    found = KVIndex()
    for endpoint, hashes in has.items():
        found.begin(endpoint)
        found.stored(endpoint, [SAMPLE * h for h in hashes])
    return found


def test_the_deepest_block_says_how_much_is_there():
    found = index(a=(1, 2, 3), b=(1,), c=())
    found.learn([TALK], blocks(1, 2, 3, 4), 1000)
    assert found.cached([TALK]) == {"a": 192, "b": 64, "c": 0}
    found.removed("a", [SAMPLE * 3])
    assert found.cached([TALK])["a"] == 128
    assert found.cached([SHORT]) == {}, "a text that no engine has told of"


def test_what_prompts_share_is_learned_from_what_they_have_in_common():
    found = index(a=(1, 2, 3, 4, 5))
    found.learn([SHORT, LONG, Prefix(b"one", 1024)], blocks(*range(1, 17)), 1024)
    assert found.cached([SHORT, LONG]) == {"a": 320}
    found.learn([SHORT, LONG, Prefix(b"two", 1024)], blocks(1, 2, 3, *range(30, 43)), 1024)
    assert found.cached([SHORT, LONG]) == {"a": 192}
    assert found.cached([SHORT]) == {"a": 128}
    assert found.cached([SHORT, LONG, Prefix(b"one", 1024)]) == {"a": 320}


def test_who_is_not_known_is_left_to_guessing():
    found = index(a=(1,))
    found.stored("never begun", [SAMPLE])
    found.learn([TALK], blocks(1), 1000)
    assert found.cached([TALK]) == {"a": 64}
    found.forget("a")
    assert found.cached([TALK]) == {}


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(kv_index, "MAX_BLOCKS", 10)
    monkeypatch.setattr(kv_index, "MAX_TEXTS", 3)
    found = index(a=tuple(range(10)))
    assert found.num_blocks("a") == 10
    found.stored("a", [SAMPLE * 99])
    assert list(found.known) == [], "more than is kept: not known"
    for name in range(5):
        found.learn([Prefix(b"%d" % name, 64)], blocks(1), 64)
    assert len(found._texts) == 3


def test_only_sampled_blocks_are_kept():
    found = index(a=())
    found.stored("a", range(4 * SAMPLE))
    assert found.num_blocks("a") == 4


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)), max_size=50), st.integers(0, 10**6))
def test_what_an_engine_tells_is_read(pairs: list[tuple[int, int]], tokens: int):
    packed = base64.b64encode(b"".join(struct.pack(">IQ", *pair) for pair in pairs))
    found = Blocks.told(b"%d %b" % (tokens, packed))
    assert found == Blocks(tokens, array("I", [end for end, _ in pairs]), array("Q", [h for _, h in pairs]))


@given(st.binary(max_size=60))
def test_whatever_else_an_engine_says_is_not_believed(value: bytes):
    found = Blocks.told(value)
    assert found is None or (found.tokens < 10**9 and len(found.ends) == len(found.hashes) <= kv_index.MAX_TOLD)


@given(st.lists(st.integers(1, 40), unique=True, max_size=30), st.integers(0, 30))
def test_the_search_finds_what_a_walk_finds(hashes: list[int], cached: int):
    found = index(a=tuple(hashes[:cached]))
    if hashes:
        found.learn([TALK], blocks(*hashes), 1000)
        assert found.cached([TALK]) == {"a": 64 * min(cached, len(hashes))}
