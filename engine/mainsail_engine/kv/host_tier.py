"""KV blocks in host memory: who holds them, and the copies between the tiers.

    device   free ──▶ owned ──▶ idle ──evicted──▶ free            a block whose content went to the host is free
                                  │ store                          at once: the store is part of the next plan, and
    host                       cached ──load──▶ owned (device)     the device reads it before anybody writes there

A *store* copies an evicted block to the host. Steps run in the order of their launch and a plan's stores come before
its writes, so the bookkeeping never waits for one. A *load* brings a block back into one allocated for it, while other
requests run; it is done when the runner has said so (`StepResult.num_loaded`). Until then the load holds what it
reads and what it writes, and the whole path above: its request may go away meanwhile, the copy may not.

Loads are numbered as they are queued, and finish in that order: whoever needs load 7 may run once `num_loaded >= 7`.

What a host block holds is the prefix tree's knowledge, as on the device; which one goes for a new one is its decision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mainsail_engine.kv.block_pool import BlockPool, BlockPoolError
from mainsail_engine.kv.moves import BlockMove


@dataclass(slots=True, frozen=True)
class Load:
    """Blocks on their way to the device, and what is held until the last of them is there."""

    number: int
    """Of its last block."""
    device_blocks: list[int]
    host_blocks: list[int]


class HostTier:
    def __init__(self, num_blocks: int = 0) -> None:
        self.pool = BlockPool(num_blocks)
        """Owned: read by a load. Idle: held by the prefix tree only."""
        self.num_queued = 0
        """Blocks that loads were asked for, since the start."""
        self.num_loaded = 0
        """… of which so many are on the device."""
        self.num_stored = 0
        self._stores: list[BlockMove] = []
        self._queue: deque[BlockMove] = deque()
        self._loads: deque[Load] = deque()

    @property
    def is_loading(self) -> bool:
        return self.num_loaded < self.num_queued

    @property
    def is_on_bus(self) -> bool:
        """Whether any load has begun and not arrived."""
        return self.num_loaded < self.num_queued - len(self._queue)

    def grow(self, num_blocks: int) -> None:
        """There is room for num_blocks now (host memory is pinned piece by piece)."""
        self.pool.grow(num_blocks)

    def store(self, block: int) -> int:
        """Copy this device block with the next plan. Returns the host block, held by the prefix tree from now on."""
        host = self.pool.allocate()
        self.pool.cache(host)
        self.pool.release((host,))
        self._stores.append(BlockMove(block, host))
        self.num_stored += 1
        return host

    def load(self, moves: Sequence[BlockMove], held: Iterable[int]) -> int:
        """Queue copies to the device. `held`: device blocks that the caller has acquired for this load.

        The moves' host blocks must be acquired as well. Returns the number of the last block's load.
        """
        self._queue.extend(moves)
        self.num_queued += len(moves)
        self._loads.append(Load(self.num_queued, list(held), [move.host for move in moves]))
        return self.num_queued

    def take_stores(self) -> list[BlockMove]:
        """For the plan that is being made."""
        stores, self._stores = self._stores, []
        return stores

    def take_loads(self, limit: int) -> list[BlockMove]:
        """The next `limit` at most."""
        return [self._queue.popleft() for _ in range(min(limit, len(self._queue)))]

    def finish(self, num_loaded: int) -> list[Load]:
        """So many blocks have arrived since the start. Returns the loads that are complete, for release."""
        if num_loaded > self.num_queued - len(self._queue):
            raise BlockPoolError(f"{num_loaded} blocks are said to be loaded; fewer were asked for")
        self.num_loaded = max(self.num_loaded, num_loaded)
        finished: list[Load] = []
        while self._loads and self._loads[0].number <= self.num_loaded:
            finished.append(self._loads.popleft())
        return finished

    def held_blocks(self) -> Iterable[int]:
        """Device blocks, once for each load that holds them."""
        return (block for load in self._loads for block in load.device_blocks)

    def check_integrity(self) -> None:
        """Recount. Raises BlockPoolError."""
        self.pool.check_integrity()
        counts = [0] * self.pool.num_blocks
        for load in self._loads:
            for host in load.host_blocks:
                counts[host] += 1
        if counts != self.pool.ref_counts:
            raise BlockPoolError("reference counts of host blocks are not what the loads hold")
