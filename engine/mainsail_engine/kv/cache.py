"""The KV cache as a request meets it: match, admit, grow, write, release. Ties block pool, prefix tree, host tier.

    positions   0 .............. 47 | 48 ... 57 | 58 ...... 70 | 71 ... 79
    block_ids   [ shared, full     ] [ copied → own block      | reserved by nobody: allocated as chunks come ]
                 owned with others    written up to num_written_tokens; full blocks enter the tree as they fill

A request owns (one reference each) every block of its table. Where it computed a block that the tree knew already,
it owns the tree's as well (`shadow_block_ids`), so that whoever owns a node owns the path to it. Only KV that a
*finished* step has written enters the tree; the last, partly filled block does when the request ends.

What matched on the host only is loaded into blocks allocated at admission; a request may run once `is_loaded` says
so. Preemption is release: what was written stays cached, moves to the host as its room is needed, and is matched again
when the request resumes. Without prefix caching that works too, under a root of the request's own.
"""

from __future__ import annotations

from collections.abc import Callable

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.kv.block_pool import BlockPool, BlockPoolError
from mainsail_engine.kv.block_times import BlockTimes
from mainsail_engine.kv.host_tier import HostTier
from mainsail_engine.kv.moves import BlockCopy, BlockMove
from mainsail_engine.kv.packed_tokens import pack_tokens
from mainsail_engine.kv.prefix_tree import Match, Node, PrefixTree
from mainsail_engine.request import Request


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold num_tokens positions."""
    return -(-num_tokens // BLOCK_SIZE)


class KVCache:
    def __init__(
        self, num_blocks: int, *, num_host_blocks: int = 0, enable_prefix_caching: bool = True, sample: float = 0.0
    ) -> None:
        """sample: share of the blocks whose time in the cache is measured."""
        self.pool = BlockPool(num_blocks)
        self.host = HostTier(num_host_blocks)
        self.tree = PrefixTree(self.pool, self.host)
        self.times = BlockTimes(sample) if sample > 0 and enable_prefix_caching else None
        if self.times is not None:
            self.tree.watchers = (self.times,)
        self._sharing = enable_prefix_caching
        self.let_one_go: Callable[[], bool] = lambda: False
        """Gives up what is kept for one session. False: nothing is kept for any (set by residency.py)."""
        self._pinned: list[int] = []
        """Sources of this step's copies: nobody may get them before the plan is made."""

    def _salt(self, request: Request) -> str:
        """Without sharing every request is a tenant of its own, for what it left behind when it was preempted."""
        return request.cache_salt if self._sharing else f"\0{request.request_id}"

    def match(self, request: Request) -> Match:
        """What is cached of the request's known tokens, as far as the cache may serve it."""
        if not self._sharing and not request.num_preemptions:
            return Match([], None)
        limit = request.max_cached_tokens
        return self.tree.match(request.token_ids(0, request.num_tokens), self._salt(request), limit)

    def blocks_wanted(self, request: Request, match: Match) -> int:
        """Available blocks that admission takes: those to compute or to load, and the matched ones that lie idle.

        Kept ones do not count: they are not available to others either (`num_unkept`).
        """
        refs, kept = self.pool.ref_counts, self.pool.kept
        idle = sum(1 for block in match.blocks if refs[block] == 0 and not kept[block])
        tail = match.tail if match.tail_tokens else None
        tail_idle = tail is not None and tail.block >= 0 and refs[tail.block] == 0 and not kept[tail.block]
        return blocks_for(request.num_tokens) - len(match.blocks) + idle + tail_idle

    def tail_is_loading(self, match: Match) -> bool:
        """A tail can be copied only once it is there: admit this match later."""
        return match.tail_tokens > 0 and match.tail is not None and match.tail.load > self.host.num_loaded

    def admit(self, request: Request, match: Match) -> BlockCopy | None:
        """Give the request what matched. Returns the copy to make before the step, if its tail is shared.

        What is on the host is on its way from now on: no chunk of the request may run before `is_loaded`.
        """
        self.pool.acquire(match.blocks)
        if self.times is not None:
            self.times.used(match.blocks)
        request.block_ids = list(match.blocks)
        request.tree_node = match.node
        request.num_tree_blocks = match.num_blocks
        request.num_computed_tokens = request.num_written_tokens = match.num_tokens
        request.load = self._load_of_path(match)
        tail = match.tail if match.tail_tokens else None
        if match.host_nodes or (tail is not None and tail.block < 0):
            self._load(request, match)
        elif tail is not None:
            self.pool.acquire((tail.block,))
            self._pinned.append(tail.block)
            self.grow(request, match.num_tokens)
            return BlockCopy(tail.block, request.block_ids[-1], match.tail_tokens)
        return None

    def _load_of_path(self, match: Match) -> int:
        """The last load, of another request, that brings blocks of this path."""
        last, node = 0, match.node
        while self.host.is_loading and node is not None:
            last, node = max(last, node.load), node.parent
        return last

    def _load(self, request: Request, match: Match) -> None:
        """Allocate for what is on the host, and queue its way to the device: full blocks as the tree's, a tail as own.

        Acquired first, so that making room pushes none of it out.
        """
        tail = match.tail if match.tail_tokens else None
        sources = [node.host for node in match.host_nodes] + ([tail.host] if tail is not None else [])
        self.host.pool.acquire(sources)
        self.grow(request, match.num_tokens)
        targets = request.block_ids[len(match.blocks) :]
        self.pool.acquire(request.block_ids)
        request.load = self.host.num_queued + len(sources)
        for node, block in zip(match.host_nodes, targets, strict=False):
            self.tree.arrive(node, block, request.load)
        if tail is not None:
            request.num_written_tokens -= match.tail_tokens  # a block on its way is nothing to share yet
        moves = [BlockMove(block, host) for block, host in zip(targets, sources, strict=True)]
        self.host.load(moves, request.block_ids)

    def fetch(self, node: Node) -> bool:
        """Queue the way back to the device for the path that ends here, ahead of its use.

        False: there is nothing to bring (it left the host as well), or no room.
        """
        wanted, each = list[Node](), node
        while each.parent is not None and each.block < 0:
            wanted.append(each)
            each = each.parent
        if not wanted or any(each.host < 0 for each in wanted):
            return False
        above = list[int]()
        while each.parent is not None:
            above.append(each.block)
            each = each.parent
        wanted.reverse()
        self.host.pool.acquire([each.host for each in wanted])
        self.pool.acquire(above)
        if not self.make_free(len(wanted)):
            self.tree.host_released([each.host for each in wanted])
            self._release(above)
            return False
        blocks = [self.pool.allocate() for _ in wanted]
        number = self.host.num_queued + len(wanted)
        for each, block in zip(wanted, blocks, strict=True):
            self.tree.arrive(each, block, number)
        moves = [BlockMove(block, each.host) for each, block in zip(wanted, blocks, strict=True)]
        self.host.load(moves, above + blocks)
        return True

    def blocks_on_host(self, node: Node) -> int:
        """Blocks of the path that ends here which are not on the device."""
        count, each = 0, node
        while each.parent is not None and each.block < 0:
            count, each = count + 1, each.parent
        return count

    def is_loaded(self, request: Request) -> bool:
        return request.load <= self.host.num_loaded

    def loaded(self, num_loaded: int) -> None:
        """The runner has brought so many blocks to the device since the start."""
        if num_loaded > self.host.num_loaded:
            for load in self.host.finish(num_loaded):
                self.tree.host_released(load.host_blocks)
                self._release(load.device_blocks)

    def unpin(self) -> None:
        """The plan is made: its copies come before any write, so their sources are free to go."""
        if self._pinned:
            self._release(self._pinned)
            self._pinned = []

    def make_free(self, num_blocks: int) -> bool:
        """Evict until num_blocks are free, at last what is kept for sessions. False if even then they are not."""
        missing = num_blocks - self.pool.num_free
        if missing <= 0:
            return True
        missing -= self.tree.evict(missing)
        while missing > 0 and self.pool.num_kept > 0 and self.let_one_go():
            missing -= self.tree.evict(missing)
        return missing <= 0

    def grow(self, request: Request, num_tokens: int) -> None:
        """Blocks for positions [0, num_tokens). Raises BlockPoolError when there are none: ask `make_free` before."""
        missing = blocks_for(num_tokens) - len(request.block_ids)
        if missing > 0 and self.make_free(missing):
            request.block_ids.extend(self.pool.allocate() for _ in range(missing))
        elif missing > 0:
            raise BlockPoolError(f"request {request.request_id} needs {missing} blocks, and none can be evicted")

    def written(self, request: Request, num_tokens: int) -> None:
        """A finished step has written positions [0, num_tokens): full blocks can be shared from now on."""
        request.num_written_tokens = num_tokens
        if self._sharing:
            self._cache_full_blocks(request)

    def _cache_full_blocks(self, request: Request) -> None:
        salt = self._salt(request)
        while (request.num_tree_blocks + 1) * BLOCK_SIZE <= request.num_written_tokens:
            index = request.num_tree_blocks
            key = pack_tokens(request.token_ids(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE))
            node = self.tree.insert(request.tree_node, salt, key, request.block_ids[index])
            if node.block != request.block_ids[index]:
                self.pool.acquire((node.block,))
                request.shadow_block_ids.append(node.block)
            request.tree_node = node
            request.num_tree_blocks = index + 1

    def suspend(self, request: Request) -> Node | None:
        """Give up all blocks for a while: what is written stays cached on either tier, to resume from.

        Returns where that ends in the tree; None: nothing was written.
        """
        self._cache_full_blocks(request)
        end, start = request.tree_node, request.num_tree_blocks * BLOCK_SIZE
        if request.num_written_tokens > start:
            key = pack_tokens(request.token_ids(start, request.num_written_tokens))
            block = request.block_ids[request.num_tree_blocks]
            end = self.tree.insert_tail(request.tree_node, self._salt(request), key, block)
        self._forfeit(request)
        return end

    def release(self, request: Request) -> Node | None:
        """Give up all blocks for good; what is written stays cached until its room is needed.

        Returns where that ends in the tree; None: nothing of it is cached.
        """
        if self._sharing:
            return self.suspend(request)
        self._forfeit(request)
        self.forget_tenant(request)
        return None

    def forget_tenant(self, request: Request) -> None:
        """Without sharing, what a preempted request left behind is of no use to others."""
        if not self._sharing and request.num_preemptions:
            self.tree.drop_tenant(self._salt(request))

    def discard(self, request: Request) -> None:
        """Give up all blocks of a request whose step failed; nothing of it may be used again."""
        if request.tree_node is not None:
            self.tree.forget(request.tree_node, owned=1)
        else:  # it was preempted: others may own what it left by now
            self.tree.forget(request.resume_node, owned=0)
        self._forfeit(request)
        self.forget_tenant(request)

    def _forfeit(self, request: Request) -> None:
        blocks = request.block_ids + request.shadow_block_ids
        request.block_ids, request.shadow_block_ids = [], []
        request.tree_node, request.num_tree_blocks = None, 0
        request.num_computed_tokens = request.num_written_tokens = request.load = 0
        self._release(blocks)

    def _release(self, blocks: list[int]) -> None:
        idle = self.pool.release(blocks)
        if idle:
            self.tree.mark_idle(idle)

    def lost_work(self, request: Request) -> int:
        """Blocks that only this request owns: what preempting it frees, and may cost to compute again.

        Along a path owners only grow fewer, so the border is found by bisection.
        """
        refs, blocks = self.pool.ref_counts, request.block_ids
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if refs[blocks[middle]] > 1:
                low = middle + 1
            else:
                high = middle
        return len(blocks) - low

    def check_integrity(self, owners: list[Request]) -> None:
        """Recount everything, with owners as all requests that may own blocks. Raises BlockPoolError."""
        self.pool.check_integrity()
        self.host.check_integrity()
        self.tree.check_integrity()
        counts = [0] * self.pool.num_blocks
        for block in self.host.held_blocks():
            counts[block] += 1
        for request in owners:
            for block in request.block_ids + request.shadow_block_ids:
                counts[block] += 1
        if counts != self.pool.ref_counts:
            wrong = [b for b, count in enumerate(counts) if count != self.pool.ref_counts[b]]
            raise BlockPoolError(f"reference counts of blocks {wrong[:8]} are not what requests and loads own")
