"""The KV cache as a request meets it: match, admit, grow, write, release. Ties block pool and prefix tree together.

    positions   0 .............. 47 | 48 ... 57 | 58 ...... 70 | 71 ... 79
    block_ids   [ shared, full     ] [ copied → own block      | reserved by nobody: allocated as chunks come ]
                 owned with others    written up to num_written_tokens; full blocks enter the tree as they fill

A request owns (one reference each) every block of its table. Where it computed a block that the tree knew already,
it owns the tree's as well (`shadow_block_ids`), so that whoever owns a node owns the path to it. Only KV that a
*finished* step has written enters the tree; the last, partly filled block does when the request ends.
"""

from __future__ import annotations

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.kv.block_pool import BlockPool, BlockPoolError
from mainsail_engine.kv.prefix_tree import Match, PrefixTree, pack_tokens
from mainsail_engine.request import Request
from mainsail_engine.step import BlockCopy


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold num_tokens positions."""
    return -(-num_tokens // BLOCK_SIZE)


class KVCache:
    def __init__(self, num_blocks: int, *, enable_prefix_caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool)
        self._sharing = enable_prefix_caching
        self._pinned: list[int] = []
        """Sources of this step's copies: nobody may get them before the plan is made."""

    def match(self, request: Request) -> Match:
        """What is cached of the request's known tokens, as far as the cache may serve it."""
        if not self._sharing:
            return Match([], None)
        limit = request.max_cached_tokens
        return self.tree.match(request.token_ids(0, request.num_tokens), request.cache_salt, limit)

    def blocks_wanted(self, request: Request, match: Match) -> int:
        """Available blocks that admission takes: those to compute, and the matched ones that lie idle."""
        refs = self.pool.ref_counts
        idle = sum(1 for block in match.blocks if refs[block] == 0)
        tail_idle = match.tail_tokens > 0 and refs[match.tail_block] == 0
        return blocks_for(request.num_tokens) - len(match.blocks) + idle + tail_idle

    def admit(self, request: Request, match: Match) -> BlockCopy | None:
        """Give the request what matched. Returns the copy to make before the step, if its tail is shared."""
        self.pool.acquire(match.blocks)
        request.block_ids = list(match.blocks)
        request.tree_node = match.node
        request.num_tree_blocks = len(match.blocks)
        request.num_computed_tokens = request.num_written_tokens = match.num_tokens
        if not match.tail_tokens:
            return None
        self.pool.acquire((match.tail_block,))
        self._pinned.append(match.tail_block)
        self.grow(request, match.num_tokens)
        return BlockCopy(match.tail_block, request.block_ids[-1], match.tail_tokens)

    def unpin(self) -> None:
        """The plan is made: its copies come before any write, so their sources are free to go."""
        if self._pinned:
            self._release(self._pinned)
            self._pinned = []

    def make_free(self, num_blocks: int) -> bool:
        """Evict until num_blocks are free. False if even then they are not."""
        missing = num_blocks - self.pool.num_free
        return missing <= 0 or self.tree.evict(missing) == missing

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
        while self._sharing and (request.num_tree_blocks + 1) * BLOCK_SIZE <= num_tokens:
            index = request.num_tree_blocks
            key = pack_tokens(request.token_ids(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE))
            node = self.tree.insert(request.tree_node, request.cache_salt, key, request.block_ids[index])
            if node.block != request.block_ids[index]:
                self.pool.acquire((node.block,))
                request.shadow_block_ids.append(node.block)
            request.tree_node = node
            request.num_tree_blocks = index + 1

    def release(self, request: Request) -> None:
        """Give up all blocks; what is written stays cached until its room is needed."""
        start = request.num_tree_blocks * BLOCK_SIZE
        if self._sharing and request.num_written_tokens > start:
            key = pack_tokens(request.token_ids(start, request.num_written_tokens))
            block = request.block_ids[request.num_tree_blocks]
            self.tree.insert_tail(request.tree_node, request.cache_salt, key, block)
        self._forfeit(request)

    def discard(self, request: Request) -> None:
        """Give up all blocks of a request whose step failed; nothing of it may be used again."""
        self.tree.forget(request.tree_node)
        self._forfeit(request)

    def _forfeit(self, request: Request) -> None:
        blocks = request.block_ids + request.shadow_block_ids
        request.block_ids, request.shadow_block_ids = [], []
        request.tree_node, request.num_tree_blocks = None, 0
        request.num_computed_tokens = request.num_written_tokens = 0
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
        """Recount everything, with owners as all who may own blocks. Raises BlockPoolError."""
        self.pool.check_integrity()
        self.tree.check_integrity()
        counts = [0] * self.pool.num_blocks
        for request in owners:
            for block in request.block_ids + request.shadow_block_ids:
                counts[block] += 1
        if counts != self.pool.ref_counts:
            wrong = [b for b, count in enumerate(counts) if count != self.pool.ref_counts[b]]
            raise BlockPoolError(f"reference counts of blocks {wrong[:8]} are not what the requests own")
