"""The ranks of an engine: their process groups, and the sums, gathers and hand-overs that a model asks for.

NCCL between GPUs, gloo on the CPU (the same code above it). The ranks of one stage live in one Pod and sum within a
group of their own; between two stages each rank hands its hidden states to the rank of the same place in the next.
Small sums on GPUs go through symmetric memory (runner/peer_sums.py).
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed import (
    ProcessGroup,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
    Work,  # pyright: ignore[reportPrivateImportUsage]
)

from mainsail_engine.errors import InvalidConfigurationError
from mainsail_engine.model.parallel import Parallel
from mainsail_engine.runner.peer_sums import PeerSums, peer_sums

RENDEZVOUS_S = 120
_ADDRESS_OF_INTERFACE = 0x8915
"""SIOCGIFADDR of Linux."""


@dataclass(slots=True)
class _Counted:
    """Hand-overs so far, the same on both sides: two that are under way at once must not be taken for one another."""

    sent: int = 0
    received: int = 0


@dataclass(frozen=True, slots=True)
class RankParallel(Parallel):
    """One of several ranks. `join` makes it."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _group: ProcessGroup | None = None
    """Those that share this stage's matrices."""
    _before: ProcessGroup | None = None
    """This rank and the one of the stage before."""
    _after: ProcessGroup | None = None
    peers: PeerSums | None = None
    """None: all sums go through the group."""
    _leaving: deque[tuple[Work, torch.Tensor]] = field(default_factory=deque[tuple[Work, torch.Tensor]])
    """Hand-overs that may not have arrived, which must be kept until they have."""
    _counted: _Counted = field(default_factory=_Counted)

    @property
    def _world_rank(self) -> int:
        return self.stage * self.size + self.rank

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, of this stage; may overwrite x."""
        if self.size == 1:
            return x
        x = x.contiguous()
        if self.peers is not None and self.peers.takes(x):
            return self.peers.sum(x)
        dist.all_reduce(x, group=self._group)  # pyright: ignore[reportUnknownMemberType]
        return x

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        """The [n, columns] of all ranks of this stage side by side: [n, size * columns]."""
        if self.size == 1:
            return x
        n, columns = x.shape
        out = torch.empty((self.size * n, columns), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(out, x.contiguous(), group=self._group)  # pyright: ignore[reportUnknownMemberType]
        return out.view(self.size, n, columns).transpose(0, 1).reshape(n, self.size * columns)

    def smallest(self, number: int) -> int:
        """The smallest of all ranks' numbers, over all stages."""
        value = torch.tensor([number], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MIN)  # pyright: ignore[reportUnknownMemberType]
        return int(value.item())

    def pass_on(self, hidden: torch.Tensor) -> None:
        """See Parallel. On the CPU it is on its way when this returns, on a GPU it is queued."""
        hidden, self._counted.sent = hidden.contiguous(), self._counted.sent + 1
        work = dist.isend(hidden, self._world_rank + self.size, group=self._after, tag=self._counted.sent)  # pyright: ignore[reportUnknownMemberType]
        if work is None:
            return
        if hidden.is_cuda:
            work.wait()  # of the stream: what comes later may overwrite it
            return
        self._leaving.append((work, hidden))
        while len(self._leaving) > self.num_stages:  # so many steps are in flight: the one before has arrived
            self._leaving.popleft()[0].wait()

    def receive(self, out: torch.Tensor) -> torch.Tensor:
        """See Parallel. On the CPU it waits for it, on a GPU the stream does."""
        self._counted.received += 1
        dist.recv(out, self._world_rank - self.size, group=self._before, tag=self._counted.received)  # pyright: ignore[reportUnknownMemberType]
        return out


def listen(size: int, port: int = 0) -> TCPStore:
    """Where the ranks meet: a store, kept by rank 0. port 0: a free one. Raises InvalidConfigurationError."""
    try:
        return TCPStore(
            "127.0.0.1", port, size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=RENDEZVOUS_S)
        )
    except dist.DistNetworkError as error:  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue, reportUnknownVariableType]
        raise InvalidConfigurationError(f"--master-port {port} cannot be used: {error}") from error


def connect(host: str, port: int, size: int) -> TCPStore:
    """The store that rank 0 keeps."""
    return TCPStore(host, port, size, is_master=False, timeout=timedelta(seconds=RENDEZVOUS_S))


def join(
    rank: int, size: int, device: torch.device, store: TCPStore | int, *, num_stages: int = 1, host: str = "127.0.0.1"
) -> RankParallel:
    """Become rank `rank` of num_stages * size. Waits for the others.

    store: the listener itself (rank 0), a client of it, or its port on the loopback. host: rank 0's node.
    """
    if isinstance(store, int):
        store = connect("127.0.0.1", store, size * num_stages)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)  # what is made below is made on the current one, in parts
    if (interface := interface_towards(host)) is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface != "lo" else ("GLOO_SOCKET_IFNAME",):
            os.environ.setdefault(name, interface)
    dist.init_process_group(  # pyright: ignore[reportUnknownMemberType]
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size * num_stages,
        device_id=device if cuda else None,
    )
    stage, place = divmod(rank, size)
    group = _stage_group(stage, size, num_stages)
    before, after = _neighbours(rank, size, num_stages)
    small = peer_sums(device, group) if cuda and size > 1 and group is not None else None
    return RankParallel(place, size, stage, num_stages, device, group, before, after, small)


def _stage_group(stage: int, size: int, num_stages: int) -> ProcessGroup | None:
    """Every rank makes the groups of all stages, as torch wants it."""
    if num_stages == 1:
        return dist.group.WORLD
    groups = [_group(range(s * size, (s + 1) * size)) for s in range(num_stages)] if size > 1 else []
    return groups[stage] if groups else None


def _neighbours(rank: int, size: int, num_stages: int) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    """(with the rank of the stage before, with that of the next); every rank makes all."""
    pairs = {to: _group((to - size, to)) for to in range(size, size * num_stages)}
    return pairs.get(rank), pairs.get(rank + size)


def _group(ranks: range | tuple[int, ...]) -> ProcessGroup:
    """Of these ranks; one that is not among them gets a stand-in, which it does not use."""
    return cast(ProcessGroup, dist.new_group(list(ranks)))  # pyright: ignore[reportUnknownMemberType]


def interface_towards(host: str) -> str | None:
    """The network interface that leads to a host, by its IPv4 address. None: not to be found so."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # nothing is sent
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if _address_of(probe, name) == own:
                    return name
    except OSError:
        return None
    return "lo" if own.startswith("127.") else None


def _address_of(probe: socket.socket, interface: str) -> str | None:
    try:
        found = fcntl.ioctl(probe.fileno(), _ADDRESS_OF_INTERFACE, struct.pack("256s", interface.encode()[:15]))
    except OSError:
        return None
    return socket.inet_ntoa(found[20:24])
