"""How long KV blocks stay in the prefix cache, and how often they are used there: of a sample of them.

    stored ──used──used── … ──removed ▶ lifetime, idle time at its end, gaps between uses

A block lives here from when the tree begins to hold it on the device until it leaves it (to the host, or for good). A
use is a request that begins with it. Only full blocks count. Watches the tree (`TreeWatcher`); the clock is set from
outside. vLLM's kv_block_* histograms are made from this.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from itertools import pairwise

from mainsail_engine.kv.prefix_tree import Node
from mainsail_engine.protocol import BlockLife

KEPT_USES = 4
"""As many of the last uses of a block are told of."""


class BlockTimes:
    def __init__(self, sample: float, seed: int = 0) -> None:
        """sample: share of the blocks that are watched, 0 to 1."""
        self._sample = sample
        self._random = random.Random(seed).random
        self._born_s: dict[int, float] = {}
        """By block."""
        self._uses_s: dict[int, deque[float]] = {}
        self._ended: list[BlockLife] = []
        self.now = 0.0

    def stored(self, node: Node) -> None:
        if self._random() < self._sample:
            self._born_s[node.block] = self.now
            self._uses_s[node.block] = deque([self.now], maxlen=KEPT_USES + 1)

    def used(self, blocks: Iterable[int]) -> None:
        """A request begins with these blocks."""
        for block in blocks:
            uses_s = self._uses_s.get(block)
            if uses_s is not None:
                uses_s.append(self.now)

    def removed(self, node: Node) -> None:
        born_s = self._born_s.pop(node.block, None)
        if born_s is not None:
            uses_s = self._uses_s.pop(node.block)
            gaps_s = [later - before for before, later in pairwise(uses_s)]
            self._ended.append(BlockLife(self.now - born_s, self.now - uses_s[-1], gaps_s))

    def take(self) -> list[BlockLife]:
        """The lives that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended
