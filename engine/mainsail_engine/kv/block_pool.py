"""Who owns a block of the KV pool.

Every block is in exactly one of three states, and the pool alone moves it:

    free ──allocate──▶ owned ──release──▶ free
                         │ ▲
          release, when  ▼ │ acquire
          the tree       idle ──uncache──▶ free
          holds it

`owned`: at least one request references it (`ref_counts[block] > 0`); the prefix tree may hold it as well.
`idle`: only the prefix tree holds it; its content is useful, its room can be had by eviction. Some idle blocks are
*kept*: they belong to a session that is expected back, and go only when whoever keeps them lets go (residency.py).
So free + owned + idle = total, always; `check_integrity` recounts it.

The pool promises nothing about content: what a block holds is the prefix tree's knowledge, and when idle blocks go is
its decision. Paging as in PagedAttention (Kwon et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockPoolError(RuntimeError):
    """A bug: a block was freed twice, handed out twice, or used by nobody."""


class BlockPool:
    __slots__ = ("_free", "cached", "kept", "num_blocks", "num_idle", "num_kept", "ref_counts")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        """References by requests, for each block."""
        self.cached = bytearray(num_blocks)
        """1 where the prefix tree holds the block."""
        self.num_idle = 0
        self.kept = bytearray(num_blocks)
        """1 where a cached block is kept."""
        self.num_kept = 0
        """Idle blocks that are kept."""
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that a request can get: free ones, and idle ones after eviction."""
        return len(self._free) + self.num_idle

    @property
    def num_unkept(self) -> int:
        """Available blocks that are not kept for a session."""
        return len(self._free) + self.num_idle - self.num_kept

    @property
    def num_owned(self) -> int:
        return self.num_blocks - len(self._free) - self.num_idle

    def grow(self, num_blocks: int) -> None:
        """Add free blocks until there are num_blocks; never fewer than now."""
        added = range(self.num_blocks, num_blocks)
        self.ref_counts.extend(0 for _ in added)
        self.cached.extend(bytes(len(added)))
        self.kept.extend(bytes(len(added)))
        self._free[:0] = reversed(added)
        self.num_blocks += len(added)

    def allocate(self) -> int:
        """A free block, owned once. Raises BlockPoolError when none is free: evict before."""
        if not self._free:
            raise BlockPoolError("no free block: evict or preempt before allocating")
        block = self._free.pop()
        self.ref_counts[block] = 1
        return block

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each block; idle ones become owned. Raises BlockPoolError for a free block."""
        refs = self.ref_counts
        for block in blocks:
            if refs[block] == 0:
                if not self.cached[block]:
                    raise BlockPoolError(f"block {block} is free and cannot be shared")
                self.num_idle -= 1
                self.num_kept -= self.kept[block]
            refs[block] += 1

    def release(self, blocks: Iterable[int]) -> list[int]:
        """Drop one reference of each block. Returns those that became idle; the others are free or still owned."""
        refs, idle = self.ref_counts, list[int]()
        for block in blocks:
            refs[block] -= 1
            if refs[block] > 0:
                continue
            if refs[block] < 0:
                refs[block] = 0
                raise BlockPoolError(f"block {block} was released more often than it was acquired")
            if self.cached[block]:
                idle.append(block)
                self.num_kept += self.kept[block]
            else:
                self._free.append(block)
        self.num_idle += len(idle)
        return idle

    def cache(self, block: int) -> None:
        """The prefix tree begins to hold an owned block."""
        if self.cached[block] or self.ref_counts[block] == 0:
            raise BlockPoolError(f"block {block} is cached already, or owned by nobody")
        self.cached[block] = 1

    def uncache(self, block: int) -> None:
        """The prefix tree lets go of a block: free, unless a request still owns it."""
        if not self.cached[block]:
            raise BlockPoolError(f"block {block} is not cached")
        self.keep(block, False)
        self.cached[block] = 0
        if self.ref_counts[block] == 0:
            self.num_idle -= 1
            self._free.append(block)

    def keep(self, block: int, kept: bool) -> None:
        """Keep a cached block from being evicted, or no more."""
        if not self.cached[block]:
            raise BlockPoolError(f"block {block} is not cached: there is nothing to keep")
        if self.kept[block] != kept:
            self.kept[block] = kept
            if self.ref_counts[block] == 0:
                self.num_kept += 1 if kept else -1

    def check_integrity(self) -> None:
        """Recount everything. Raises BlockPoolError with the first thing that does not add up."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise BlockPoolError("a block is on the free list twice")
        if any(self.ref_counts[block] or self.cached[block] for block in free):
            raise BlockPoolError("a free block is owned or cached")
        if any(kept and not cached for kept, cached in zip(self.kept, self.cached, strict=True)):
            raise BlockPoolError("a block is kept, but not cached")
        kept = sum(1 for count, kept in zip(self.ref_counts, self.kept, strict=True) if kept and not count)
        if kept != self.num_kept:
            raise BlockPoolError(f"{kept} idle blocks are kept, counted {self.num_kept}")
        if any(count < 0 for count in self.ref_counts):
            raise BlockPoolError("a reference count is negative")
        idle = sum(1 for count, cached in zip(self.ref_counts, self.cached, strict=True) if cached and not count)
        owned = sum(1 for count in self.ref_counts if count)
        if idle != self.num_idle:
            raise BlockPoolError(f"{idle} blocks are idle, counted {self.num_idle}")
        if len(free) + owned + idle != self.num_blocks:
            raise BlockPoolError(f"free {len(free)} + owned {owned} + idle {idle} is not {self.num_blocks}: a leak")
