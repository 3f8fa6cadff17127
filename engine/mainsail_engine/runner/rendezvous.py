"""How ranks that were started apart find one another, and whether they were started alike.

    leader (node 0)   keeps a store at --master-port, in which it lays an invitation: what it was started with, and
                      where it listens; then it waits until every rank has come
    every other rank  waits for the leader, compares, says that it has come

A rank comes once: one that was started again finds its place taken, and ends. The leader has then noticed that the
first one is gone, or will, and ends too; they meet again at its next store. (Kubernetes starts both again.)
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterable

import msgspec
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from mainsail_engine.config import EngineConfig
from mainsail_engine.errors import InvalidConfigurationError, StartupError
from mainsail_engine.runner.distributed import connect
from mainsail_engine.version import version

log = logging.getLogger(__name__)
NODES_LIMIT_S = 1800.0
"""How long the leader waits for ranks on other nodes: their pods may have to be scheduled, and their model fetched."""
EVERY_S = 20.0
"""Between two lines about who is waited for."""
POLL_S = 0.1


class LeaderLostError(StartupError):
    """The leader's node cannot be reached any more, or will have nothing to do with this rank."""

    reason = "LeaderLost"


class Addresses(msgspec.Struct, frozen=True):
    """Where the leader listens, as ZeroMQ's endpoints; a * stands for its host."""

    plans: str
    pulse: str
    beats: str
    results: str

    def of(self, host: str) -> Addresses:
        """As a rank connects to them."""
        return Addresses(*(address.replace("*", host) for address in msgspec.structs.astuple(self)))


class Invitation(msgspec.Struct, frozen=True):
    version: str
    config: EngineConfig
    addresses: Addresses


def alike(config: EngineConfig) -> EngineConfig:
    """What all nodes must have been given: all but their own number, and how each reaches the leader."""
    nodes = msgspec.structs.replace(config.nodes, node_rank=0, master_addr="-", master_port=1)
    return msgspec.structs.replace(config, nodes=nodes)


def invite(store: TCPStore, config: EngineConfig, addresses: Addresses) -> None:
    store.set("invitation", msgspec.json.encode(Invitation(version(), alike(config), addresses)).decode())


def wait_for_all(store: TCPStore, ranks: Iterable[int]) -> None:
    """Until these ranks have come. Raises StartupError when they do not."""
    missing, began_s, told_s = set(ranks), time.monotonic(), time.monotonic()
    while missing := {rank for rank in missing if not store.check([f"rank {rank}"])}:
        now, waited = time.monotonic(), ", ".join(map(str, sorted(missing)))
        if now - began_s > NODES_LIMIT_S:
            raise StartupError(f"ranks {waited} did not come within {NODES_LIMIT_S:.0f} s: see their nodes' logs")
        if now - told_s > EVERY_S:
            told_s = now
            log.info("waiting for ranks %s", waited)
        time.sleep(POLL_S)


def come(host: str, port: int, rank: int, config: EngineConfig) -> tuple[TCPStore, Addresses]:
    """Wait for the leader, however long that takes, and take a place. Raises StartupError's kinds."""
    _wait_for_listener(host, port)
    store = connect(host, port, config.num_ranks)
    invitation = msgspec.json.decode(store.get("invitation"), type=Invitation)
    check_alike(invitation, config)
    if store.add(f"rank {rank}", 1) > 1:
        raise LeaderLostError(
            f"rank {rank} has come to the leader at {host}:{port} before: it has not noticed yet that it was lost"
        )
    return store, invitation.addresses.of(host)


def check_alike(invitation: Invitation, config: EngineConfig) -> None:
    """Raises InvalidConfigurationError that names what differs between the leader and this node."""
    theirs, ours = invitation.config, alike(config)
    named = [name for name in EngineConfig.__struct_fields__ if getattr(theirs, name) != getattr(ours, name)]
    if invitation.version != version():
        named.append(f"version ({invitation.version} there, {version()} here)")
    if named:
        raise InvalidConfigurationError(
            f"this node was not started like the leader: {', '.join(named)} differ; all nodes take the same flags"
        )


def _wait_for_listener(host: str, port: int) -> None:
    told_s = 0.0
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=5.0).close()
            return
        if time.monotonic() - told_s > EVERY_S:
            told_s = time.monotonic()
            log.info("waiting for the leader at %s:%d", host, port)
        time.sleep(POLL_S)
