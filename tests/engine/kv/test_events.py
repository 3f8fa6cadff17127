"""KV events: on the wire in vLLM's form, and always an exact picture of what the tree holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from mainsail_engine.cli import json_config
from mainsail_engine.config import BLOCK_SIZE, KVEventsConfig
from mainsail_engine.errors import InvalidConfigurationError
from mainsail_engine.kv.block_hash import block_hashes
from mainsail_engine.kv.block_pool import BlockPool
from mainsail_engine.kv.events import END_OF_REPLAY, SNAPSHOT, KVEvents, block_hash
from mainsail_engine.kv.packed_tokens import pack_tokens
from mainsail_engine.kv.prefix_tree import Node, PrefixTree

FLAG = "--kv-events-config"
HANG_MS = 60_000
LOCAL = KVEventsConfig(endpoint="tcp://127.0.0.1:0", replay_endpoint="tcp://127.0.0.1:0", topic="kv@pod")


@pytest.fixture
def events() -> Iterator[KVEvents]:
    made = KVEvents(LOCAL)
    yield made
    made.close()


def full(first: int) -> bytes:
    return pack_tokens(range(first, first + BLOCK_SIZE))


def node(parent: Node | None, tree: PrefixTree, pool: BlockPool, first: int, salt: str = "") -> Node:
    return tree.insert(parent, salt, full(first), pool.allocate())


def test_the_wire_form(events: KVEvents) -> None:
    context = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.connect(events._publisher.endpoint)
    subscriber.setsockopt_string(zmq.SUBSCRIBE, "kv@")
    replay = context.socket(zmq.REQ)
    replay.connect(events._publisher.replay_endpoint)
    try:
        number_of_told = told_until_heard(events, subscriber)
        pool = BlockPool(4)
        tree = PrefixTree(pool)
        tree.watchers = (events,)
        events.cleared()
        first = node(None, tree, pool, 0)
        second = node(first, tree, pool, 100)
        tree.insert_tail(second, "", pack_tokens([1, 2, 3]), pool.allocate())
        events.flush()
        events.flush()
        assert subscriber.poll(HANG_MS)
        topic, number, payload = subscriber.recv_multipart()
        assert (topic, int.from_bytes(number, "big")) == (b"kv@pod", number_of_told)
        ts, told, rank = msgspec.msgpack.decode(payload)
        assert rank is None
        assert abs(ts - time.time()) < 60
        h1, h2 = block_hash(first), block_hash(second)
        assert told == [
            ["AllBlocksCleared"],
            ["BlockStored", [h1], None, list(range(16)), 16, None, "GPU"],
            ["BlockStored", [h2], h1, list(range(100, 116)), 16, None, "GPU"],
        ]
        pool.release([0, 1, 2])
        tree.mark_idle([0, 1, 2])
        tree.clear()
        events.flush()
        assert subscriber.poll(HANG_MS)
        assert msgspec.msgpack.decode(subscriber.recv_multipart()[2])[1] == [
            ["BlockRemoved", [h2], "GPU"],
            ["BlockRemoved", [h1], "GPU"],
        ]
        replay.send(number)
        assert replay.poll(HANG_MS)
        assert replay.recv_multipart() == [number, payload]
        assert END_OF_REPLAY == b"\xff" * 8
    finally:
        context.destroy(linger=0)


def told_until_heard(events: KVEvents, subscriber: zmq.Socket[bytes]) -> int:
    """A subscription has no answer: say something until it is heard. Returns how many batches that took."""
    for count in range(1, 10_000):
        events.cleared()
        events.flush()
        if subscriber.poll(20):
            while int.from_bytes(subscriber.recv_multipart()[1], "big") < count - 1:
                assert subscriber.poll(HANG_MS)
            return count
    raise AssertionError("nobody heard anything")


def snapshot(ask: zmq.Socket[bytes]) -> tuple[int, Any] | None:
    """(the last batch that it contains, the batch), if there was one yet."""
    ask.send_multipart((b"", SNAPSHOT))
    assert ask.poll(HANG_MS)
    _, number, payload = ask.recv_multipart()
    if number == END_OF_REPLAY:
        return None
    assert ask.poll(HANG_MS)
    assert ask.recv_multipart() == [b"", END_OF_REPLAY, b""]
    return int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)


def test_who_comes_late_gets_everything_at_once(events: KVEvents) -> None:
    context = zmq.Context()
    ask = context.socket(zmq.DEALER)
    ask.connect(events._publisher.replay_endpoint)
    try:
        assert snapshot(ask) is None, "nothing was told yet"
        pool = BlockPool(4)
        tree = PrefixTree(pool)
        tree.watchers = (events,)
        events.cleared()
        first = node(None, tree, pool, 0)
        gone = node(first, tree, pool, 100)
        events.flush()
        pool.release([1])
        tree.mark_idle([1])
        tree.evict(1)
        events.flush()
        while (found := snapshot(ask)) is None or found[0] == 0:  # the second batch is on its way to the publisher
            pass
        assert found[0] == 1
        told = found[1][1]
        assert told == [["AllBlocksCleared"], ["BlockStored", [block_hash(first)], None, [], 16, None, "GPU"]]
        assert block_hash(gone) not in told[1][1]
    finally:
        context.destroy(linger=0)


@given(st.lists(st.integers(0, 70_000), max_size=100), st.text(max_size=5))
def test_a_prompts_blocks_have_the_names_of_the_trees(token_ids: list[int], salt: str) -> None:
    pool = BlockPool(8)
    tree = PrefixTree(pool)
    above, named = None, []
    for start in range(0, len(token_ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
        above = tree.insert(above, salt, pack_tokens(token_ids[start : start + BLOCK_SIZE]), pool.allocate())
        named.append(block_hash(above))
    assert list(block_hashes(token_ids, salt)) == named


def test_a_hash_stands_for_the_whole_prefix_and_the_tenant() -> None:
    pool = BlockPool(8)
    tree = PrefixTree(pool)
    a, b = node(None, tree, pool, 0), node(None, tree, pool, 50)
    hashes = {
        block_hash(n)
        for n in (a, b, node(a, tree, pool, 7), node(b, tree, pool, 7), node(None, tree, pool, 0, salt="x"))
    }
    assert len(hashes) == 5
    again = PrefixTree(other := BlockPool(8))
    assert block_hash(node(None, again, other, 0)) == block_hash(a)


class Picture:
    """What a subscriber believes."""

    def __init__(self) -> None:
        self.held: set[int] = set()

    def stored(self, node: Node) -> None:
        assert node.parent is not None
        assert node.parent.parent is None or block_hash(node.parent) in self.held
        assert block_hash(node) not in self.held
        self.held.add(block_hash(node))

    def removed(self, node: Node) -> None:
        self.held.remove(block_hash(node))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=40))
def test_a_subscriber_always_knows_what_is_held(moves: list[tuple[int, int, bool]]) -> None:
    pool = BlockPool(6)
    tree = PrefixTree(pool)
    picture = Picture()
    tree.watchers = (picture,)
    for first, second, evict in moves:
        if evict:
            tree.evict(2)
        if pool.num_free < 2:
            continue
        blocks = [pool.allocate(), pool.allocate()]
        one = tree.insert(None, "", full(100 * first), blocks[0])
        kept = [one.block]
        if one.block != blocks[0]:
            pool.acquire([one.block])
            kept.append(blocks[0])
        two = tree.insert(one, "", full(1000 + 100 * second), blocks[1])
        kept.append(blocks[1])
        if two.block != blocks[1]:
            pool.acquire([two.block])
            kept.append(two.block)
        tree.mark_idle(pool.release(kept))
        nodes = [each for each in tree._nodes if each is not None]
        assert picture.held == {block_hash(each) for each in nodes}


def test_the_flag_is_the_fields_own() -> None:
    config = json_config(
        FLAG, '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:6000"}', KVEventsConfig
    )
    assert config is not None
    assert config.endpoint == "tcp://*:6000"
    assert json_config(FLAG, None, KVEventsConfig) is None


@pytest.mark.parametrize("text", ["", "{", '{"publisher": "kafka"}', '{"endpoints": "x"}', '{"hwm": 0}'])
def test_a_wrong_flag_is_named(text: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=FLAG):
        json_config(FLAG, text, KVEventsConfig)


def test_a_taken_port_is_named(events: KVEvents) -> None:
    with pytest.raises(InvalidConfigurationError, match="cannot be used"):
        KVEvents(KVEventsConfig(endpoint=events._publisher.endpoint))
