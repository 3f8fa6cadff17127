"""What the prefix cache holds, told to whoever subscribes: blocks stored and removed, by hash, over ZMQ.

    PrefixTree ──stored, removed──▶ KVEvents ──flush, once a step──▶ queue ──▶ publisher thread ──PUB──▶ subscribers

The wire form is vLLM's, so that routers made for it understand this engine: three frames, topic, sequence number
(8 bytes, big-endian) and a msgpack array `[timestamp, [event, …], data_parallel_rank]`, where an event is an array that
begins with its name. A block's hash is chained: it stands for the block's tokens and all before them, and for the
tenant's salt. Partly filled blocks are not told of. Whoever misses a number has lost events, and may ask at the replay
socket (ROUTER, `replay_endpoint`) for all that are kept from a number on, as in vLLM. Who asks there from number -1
gets what vLLM has not: a snapshot, one batch that clears everything and stores all blocks that there are, under the
number of the last batch that it contains. So a subscriber may come at any time, or lose any number of events.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import Any

import msgspec
import zmq

from mainsail_engine.config import BLOCK_SIZE, KVEventsConfig
from mainsail_engine.errors import InvalidConfigurationError
from mainsail_engine.kv.block_hash import first_digest, next_digest, number_of
from mainsail_engine.kv.packed_tokens import unpack_tokens
from mainsail_engine.kv.prefix_tree import Node

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
SNAPSHOT = END_OF_REPLAY
"""The number that asks for everything as it is."""
POLL_MS = 20
"""How long the publisher waits for one of its two sources before it looks at the other."""


class BlockStored(msgspec.Struct, array_like=True, tag=True, frozen=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = "GPU"


class BlockRemoved(msgspec.Struct, array_like=True, tag=True, frozen=True):
    block_hashes: list[int]
    medium: str | None = "GPU"


class AllBlocksCleared(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Nothing is cached any more. Told first of all: a new engine's cache is empty."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True):
    ts: float
    """Seconds since the epoch."""
    events: list[Event]
    data_parallel_rank: int | None = None


def block_hash(node: Node) -> int:
    """Of the node's tokens and all before them, 64 bits."""
    path: list[Node] = []
    each: Node | None = node
    while each is not None and not each.digest:
        path.append(each)
        each = each.parent
    for below in reversed(path):
        above = below.parent
        below.digest = first_digest(below.salt) if above is None else next_digest(above.digest, below.key)
    return number_of(node.digest)


class KVEvents:
    """Gathers what happens to the tree in a step (a `TreeWatcher`), and publishes it."""

    def __init__(self, config: KVEventsConfig) -> None:
        self._events: list[Event] = []
        self._publisher = Publisher(config)

    def stored(self, node: Node) -> None:
        parent = node.parent
        above = None if parent is None or parent.parent is None else block_hash(parent)
        self._events.append(BlockStored([block_hash(node)], above, unpack_tokens(node.key), BLOCK_SIZE))

    def removed(self, node: Node) -> None:
        self._events.append(BlockRemoved([block_hash(node)]))

    def cleared(self) -> None:
        """The cache is empty: a new engine's, or one that has slept."""
        self._events = [AllBlocksCleared()]

    def flush(self) -> None:
        """Hand on what has come together."""
        if self._events:
            events, self._events = self._events, []
            self._publisher.publish(EventBatch(time.time(), events))

    def close(self) -> None:
        self._publisher.close()


class Publisher:
    """A thread with the sockets; the core never waits for a subscriber, who loses events instead."""

    def __init__(self, config: KVEventsConfig) -> None:
        self._topic = config.topic.encode()
        self._queue: queue.SimpleQueue[EventBatch | None] = queue.SimpleQueue()
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._sequence = 0
        self._there: set[int] = set()
        """Blocks that were told stored, and not removed; only with a replay socket."""
        self._context = zmq.Context()
        self._publish_socket = self._context.socket(zmq.PUB)
        self._publish_socket.set_hwm(config.hwm)
        self.endpoint = _bind(self._publish_socket, config.endpoint)
        self._replay_socket: zmq.Socket[bytes] | None = None
        if config.replay_endpoint is not None:
            self._replay_socket = self._context.socket(zmq.ROUTER)
            self.replay_endpoint = _bind(self._replay_socket, config.replay_endpoint)
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def publish(self, batch: EventBatch) -> None:
        self._queue.put(batch)

    def close(self) -> None:
        """Send what was published, and end."""
        self._queue.put(None)
        self._thread.join(timeout=2)

    def _run(self) -> None:
        encode = msgspec.msgpack.Encoder().encode
        while True:
            try:
                batch = self._queue.get(timeout=POLL_MS / 1000) if self._replay_socket else self._queue.get()
            except queue.Empty:
                self._replay()
                continue
            if batch is None:
                break
            payload = encode(batch)
            if self._replay_socket is not None:
                self._follow(batch)
            self._kept.append((self._sequence, payload))
            self._publish_socket.send_multipart((self._topic, self._sequence.to_bytes(8, "big"), payload))
            self._sequence += 1
            self._replay()
        self._context.destroy(linger=200)

    def _follow(self, batch: EventBatch) -> None:
        for each in batch.events:
            if isinstance(each, BlockStored):
                self._there.update(each.block_hashes)
            elif isinstance(each, BlockRemoved):
                self._there.difference_update(each.block_hashes)
            else:
                self._there.clear()

    def _snapshot(self) -> bytes:
        stored = BlockStored(list(self._there), None, [], BLOCK_SIZE)
        return msgspec.msgpack.encode(EventBatch(time.time(), [AllBlocksCleared(), stored]))

    def _replay(self) -> None:
        """Answer those who have lost events: [identity, "", number] → [identity, "", number, payload] for each."""
        socket = self._replay_socket
        while socket is not None and socket.poll(0):
            frames = socket.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            if frames[2] == SNAPSHOT:
                if self._sequence:
                    last = (self._sequence - 1).to_bytes(8, "big")
                    socket.send_multipart((frames[0], b"", last, self._snapshot()))
                socket.send_multipart((frames[0], b"", END_OF_REPLAY, b""))
                continue
            first = int.from_bytes(frames[2], "big")
            for sequence, payload in self._kept:
                if sequence >= first:
                    socket.send_multipart((frames[0], b"", sequence.to_bytes(8, "big"), payload))
            socket.send_multipart((frames[0], b"", END_OF_REPLAY, b""))


def _bind(socket: zmq.Socket[Any], endpoint: str) -> str:
    """The address it got. Raises InvalidConfigurationError."""
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise InvalidConfigurationError(f"--kv-events-config: {endpoint} cannot be used: {error}") from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
