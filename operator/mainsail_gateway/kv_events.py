"""Listening to what engines store and remove in their KV caches (the engine's kv/events.py; vLLM's wire form).

Where an endpoint has the ports for it (its EndpointSlice says so: `kv-events`, `kv-replay`), one subscription follows
it, and kv_index.py keeps the picture. One thread has all sockets and does the decoding; the event loop is handed what
comes together in `GATHER_S`, and only applies it.

*Exact or unknown.* Batches are numbered. A subscriber asks for a snapshot when it begins; live batches wait for it, and
those that it contains are dropped. A lost connection (an engine that restarts under the same address is one), or a gap
afterwards (a queue that ran over), makes the endpoint unknown until the next snapshot; an engine that began anew is
told by its first batch, number 0. An endpoint that leaves the table is forgotten. An engine without snapshots (vLLM) is
followed from its first batch on, or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import zmq
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from zmq.utils.monitor import recv_monitor_message

from mainsail_gateway.fleet import Fleet
from mainsail_gateway.kv_index import KVIndex, is_sampled
from mainsail_gateway.routes import Endpoint
from mainsail_gateway.watch import Key

log = logging.getLogger(__name__)

GATHER_S = 0.02
LOOK_S = 0.5
"""How often the endpoints are compared with those that are followed, and snapshots that did not come are asked for."""
ASK_AGAIN_S = 2.0
MOST_WAITING = 10_000
"""Batches that wait for a snapshot."""
HEARTBEAT_MS, SILENT_MS = 2_000, 10_000
"""How often a peer is asked whether it is there, and when one that says nothing counts as gone."""
MOST_SOCKETS = 65_536
EVENTS = {"begin": "begun", "forget": "lost", "stored": "stored", "removed": "removed"}
"""What the metric calls a change's kind."""
SNAPSHOT = (-1).to_bytes(8, "big", signed=True)


class Stored(msgspec.Struct, array_like=True, tag="BlockStored", frozen=True):
    block_hashes: list[int]
    parent_block_hash: int | None = None
    token_ids: msgspec.Raw = msgspec.Raw()
    block_size: int = 0
    lora_id: int | None = None
    medium: str | None = None


class Removed(msgspec.Struct, array_like=True, tag="BlockRemoved", frozen=True):
    block_hashes: list[int]
    medium: str | None = None


class Cleared(msgspec.Struct, array_like=True, tag="AllBlocksCleared", frozen=True):
    pass


class Batch(msgspec.Struct, array_like=True, frozen=True):
    ts: float
    events: list[Stored | Removed | Cleared]


class Change(NamedTuple):
    """What happened to one endpoint's cache."""

    kind: str
    """begin, forget, stored or removed: a method of KVIndex."""
    blocks: list[int]


_decoder = msgspec.msgpack.Decoder(Batch)


def changes(payload: bytes) -> list[Change]:
    """A batch's events, of sampled blocks only. Raises msgspec.DecodeError."""
    found: list[Change] = []
    for event in _decoder.decode(payload).events:
        if isinstance(event, Cleared):
            found.append(Change("begin", []))
        elif event.medium in (None, "GPU"):
            kind = "stored" if isinstance(event, Stored) else "removed"
            found.append(Change(kind, [block for block in event.block_hashes if is_sampled(block)]))
    return found


@dataclass(slots=True)
class Feed:
    """One engine's numbered batches, put in order. Pure."""

    next: int | None = None
    """The number that comes next; None: a snapshot has to come first."""
    waiting: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])

    def live(self, number: int, payload: bytes) -> list[Change]:
        """A batch has come; what it changes. `next` is None where a snapshot is needed now."""
        if number == 0:
            self.next, self.waiting = 1, []
            return [Change("begin", []), *changes(payload)]
        if self.next is None:
            self.waiting = [*self.waiting[-MOST_WAITING + 1 :], (number, payload)]
            return []
        if number < self.next:
            return []
        if number > self.next:
            self.next, self.waiting = None, [(number, payload)]
            return [Change("forget", [])]
        self.next += 1
        return changes(payload)

    def snapshot(self, number: int, payload: bytes) -> list[Change]:
        """Everything as it was after the batch of that number."""
        waiting, self.waiting = self.waiting, []
        self.next = number + 1
        found = changes(payload)
        for later, batch in waiting:
            found += self.live(later, batch) if later > number else []
        return found


class _Link:
    """The sockets to one engine."""

    def __init__(self, context: zmq.Context[Any], endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.feed = Feed()
        self.asked_at = float("-inf")
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        events, snapshots = endpoint.kv_events or (0, 0)
        self.live: zmq.Socket[bytes] = context.socket(zmq.SUB)
        self.ask: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.monitor: zmq.Socket[bytes] = self.live.get_monitor_socket(zmq.Event.DISCONNECTED)
        self.ask.setsockopt(zmq.IMMEDIATE, 1)  # nothing is asked of an engine that is away
        for socket, port in ((self.live, events), (self.ask, snapshots)):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IPV6, int(":" in endpoint.host))
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
            socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)
            socket.connect(f"tcp://{host}:{port}")
        self.live.setsockopt(zmq.SUBSCRIBE, b"")

    @property
    def sockets(self) -> tuple[zmq.Socket[bytes], ...]:
        return self.live, self.ask, self.monitor

    def want_snapshot(self, now: float) -> None:
        if self.feed.next is None and now - self.asked_at >= ASK_AGAIN_S:
            self.asked_at = now
            with contextlib.suppress(zmq.Again):
                self.ask.send_multipart((b"", SNAPSHOT), zmq.NOBLOCK)

    def receive(self, socket: zmq.Socket[bytes]) -> list[Change]:
        """All that is there. What cannot be read makes the endpoint unknown, and so does a connection that is lost."""
        found: list[Change] = []
        while socket.poll(0):
            if socket is self.monitor:
                recv_monitor_message(socket)
                found += self._lost("the connection is lost")
                continue
            frames = socket.recv_multipart()
            try:
                found += self._read(socket is self.live, frames)
            except (msgspec.DecodeError, IndexError) as error:
                found += self._lost(str(error))
        return found

    def _lost(self, why: str) -> list[Change]:
        log.info("KV events of %s: %s", self.endpoint.pod, why)
        known, self.feed = self.feed.next is not None, Feed()
        return [Change("forget", [])] if known else []

    def _read(self, live: bool, frames: list[bytes]) -> list[Change]:
        number, payload = int.from_bytes(frames[-2], "big", signed=True), frames[-1]
        if live:
            return self.feed.live(number, payload)
        return self.feed.snapshot(number, payload) if number >= 0 and payload and self.feed.next is None else []

    def close(self) -> None:
        self.live.disable_monitor()
        for socket in self.sockets:
            socket.close()


class Listener(Collector):
    """Follows every endpoint of the fleet that tells."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._wanted: Mapping[str, Endpoint] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._looked = 0.0
        self._came: list[tuple[str, Change]] = []
        self._counts: Counter[tuple[Key, str]] = Counter()

    async def run(self) -> None:
        """Until cancelled. Raises RuntimeError if nobody follows any more; the gateway goes on by guessing."""
        thread = threading.Thread(target=self._follow, name="kv-events", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                pools = self._fleet.pools.values()
                self._wanted = {e.key: e for pool in pools for e in pool.endpoints.values() if e.kv_events is not None}
                self._apply()
                await asyncio.sleep(GATHER_S)
            raise RuntimeError("the thread that follows engines' KV events has ended")
        finally:
            self._stop.set()
            for pool in self._fleet.pools.values():
                for key in list(pool.kv.known):
                    pool.kv.forget(key)
            await asyncio.to_thread(thread.join, 2.0)

    def _apply(self) -> None:
        with self._lock:
            came, self._came = self._came, []
        if not came and time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        homes = {key: (name, pool.kv) for name, pool in self._fleet.pools.items() for key in pool.endpoints}
        for pool in self._fleet.pools.values():
            for key in [key for key in pool.kv.known if key not in pool.endpoints]:
                pool.kv.forget(key)  # it left the table
        for key, change in came:
            if (home := homes.get(key)) is not None:
                apply(home[1], key, change)
                self._counts[home[0], change.kind] += max(1, len(change.blocks))

    def _follow(self) -> None:
        """The thread."""
        context: zmq.Context[Any] = zmq.Context()
        context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)
        links: dict[str, _Link] = {}
        sockets: dict[zmq.Socket[bytes], _Link] = {}
        poller = zmq.Poller()
        looked = float("-inf")
        while not self._stop.is_set():
            now = time.monotonic()
            if now - looked >= LOOK_S:
                looked = now
                self._compare(context, links, sockets, poller)
            for link in links.values():
                link.want_snapshot(now)
            if not sockets:  # pyzmq's poll of nothing does not wait
                self._stop.wait(LOOK_S)
                continue
            for socket, _ in poller.poll(100):
                link = sockets[socket]
                self._note((link.endpoint.key, change) for change in link.receive(socket))
        for link in links.values():
            link.close()
        context.destroy(linger=0)

    def _note(self, found: Iterable[tuple[str, Change]]) -> None:
        with self._lock:
            self._came += found

    def _compare(
        self, context: zmq.Context[Any], links: dict[str, _Link], sockets: dict[zmq.Socket[bytes], _Link],
        poller: zmq.Poller,
    ) -> None:  # fmt: skip
        wanted = self._wanted
        for key in links.keys() - wanted.keys():
            link = links.pop(key)
            for socket in link.sockets:
                poller.unregister(socket)
                del sockets[socket]
            link.close()
        for key in wanted.keys() - links.keys():
            link = links[key] = _Link(context, wanted[key])
            for socket in link.sockets:
                poller.register(socket, zmq.POLLIN)
                sockets[socket] = link

    # -- what is known, as metrics -------------------------------------------------------------------------------------

    def describe(self) -> Iterator[Metric]:
        return iter(self._families())

    def collect(self) -> Iterator[Metric]:
        endpoints, blocks, events = families = self._families()
        for name, pool in list(self._fleet.pools.items()):
            endpoints.add_metric(name, len(pool.kv.known))
            blocks.add_metric(name, sum(map(pool.kv.num_blocks, list(pool.kv.known))))
            for kind, event in EVENTS.items():
                events.add_metric((*name, event), self._counts[name, kind])
        yield from families

    def _families(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily, CounterMetricFamily]:
        names, of = ("namespace", "service"), "mainsail:gateway_kv_"
        return (
            GaugeMetricFamily(of + "known_endpoints", "Endpoints whose engine tells what it has cached.", labels=names),
            GaugeMetricFamily(
                of + "known_blocks", "KV blocks that are known to be cached; one of four is kept.", labels=names
            ),
            CounterMetricFamily(
                of + "events",
                "What engines told of their caches: blocks stored and removed (one of four); caches told from their "
                "beginning (begun); caches not known any more, as events or the connection were lost (lost).",
                labels=(*names, "event"),
            ),
        )


def apply(index: KVIndex, endpoint: str, change: Change) -> None:
    if change.kind == "begin":
        index.begin(endpoint)
    elif change.kind == "forget":
        index.forget(endpoint)
    elif change.kind == "stored":
        index.stored(endpoint, change.blocks)
    else:
        index.removed(endpoint, change.blocks)
