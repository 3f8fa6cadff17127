"""What the cached blocks hold: a radix tree over tokens, one node for each block of 16.

    root(cache_salt) ── [t0 .. t15] ─┬─ [t16 .. t31] ── [t32 .. t40)      a leaf may be partly filled
                                     └─ [u16 .. u31]

A path from the root is a prefix, and names the blocks that hold its KV. Full blocks are shared as they are. Where a
prompt leaves the tree inside a block, the common tokens of that block can be copied (copy-on-write), so reuse is exact
to the token. Tokens are compared themselves, not hashes of them: there are no collisions, and `cache_salt` keeps
tenants apart from the root on.

A node's key is its tokens as big-endian 32-bit words: slicing and hashing 64 bytes is one step in C, and in sorted
order the longest common prefix with any tokens is found beside the place where they would be inserted.

Eviction takes the least recently released leaf that no request owns, from a heap with lazy deletion: O(log n). A
request that owns a node owns the whole path to it, so every idle block can be evicted in the end, leaves first.

The idea: RadixAttention (SGLang, Zheng et al. 2023) on paged blocks, with a copied tail as in TensorRT-LLM.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.kv.block_pool import BlockPool, BlockPoolError

TOKEN_BYTES = 4
KEY_BYTES = BLOCK_SIZE * TOKEN_BYTES


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as big-endian 32-bit words, so that byte order is token order."""
    words = array("I", token_ids)
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


def common_tokens(left: bytes, right: bytes) -> int:
    """How many leading tokens two packed sequences share."""
    size = min(len(left), len(right))
    differing = int.from_bytes(left[:size], "big") ^ int.from_bytes(right[:size], "big")
    return (size * 8 - differing.bit_length()) // 8 // TOKEN_BYTES


class Node:
    """One cached block, or a root (block -1)."""

    __slots__ = ("block", "children", "key", "keys", "last_used", "parent", "salt")

    def __init__(self, key: bytes, block: int, parent: Node | None, salt: str) -> None:
        self.key = key
        self.block = block
        self.parent = parent
        self.salt = salt
        self.children: dict[bytes, Node] = {}
        self.keys: list[bytes] = []
        """The children's keys in order."""
        self.last_used = 0

    @property
    def is_full(self) -> bool:
        return len(self.key) == KEY_BYTES


class Match:
    """What the tree has of a prompt: full blocks to share, and a tail to copy."""

    __slots__ = ("blocks", "node", "tail_block", "tail_tokens")

    def __init__(self, blocks: list[int], node: Node | None, tail_block: int = -1, tail_tokens: int = 0) -> None:
        self.blocks = blocks
        self.node = node
        """Where the full blocks end; None: at the root."""
        self.tail_block = tail_block
        self.tail_tokens = tail_tokens
        """The first tail_tokens positions of tail_block go on where the full blocks end."""

    @property
    def num_tokens(self) -> int:
        return len(self.blocks) * BLOCK_SIZE + self.tail_tokens


class PrefixTree:
    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._roots: dict[str, Node] = {}
        self._nodes: list[Node | None] = [None] * pool.num_blocks
        self._leaves: list[tuple[int, int, Node]] = []
        """Heap of (last_used, block, node); stale when the node was used since, has children, or is gone."""
        self._clock = 0

    def match(self, token_ids: Sequence[int], salt: str, limit: int) -> Match:
        """The longest cached prefix of token_ids[:limit]. Changes nothing: acquire the blocks to keep them."""
        node = self._roots.get(salt)
        if node is None:
            return Match([], None)
        packed = pack_tokens(token_ids[:limit])
        blocks: list[int] = []
        for position in range(0, len(packed) - KEY_BYTES + 1, KEY_BYTES):
            child = node.children.get(packed[position : position + KEY_BYTES])
            if child is None:
                break
            blocks.append(child.block)
            node = child
        rest = packed[len(blocks) * KEY_BYTES : (len(blocks) + 1) * KEY_BYTES]
        end = node if blocks else None
        tail, tail_tokens = self._closest_child(node, rest)
        return Match(blocks, end, tail.block, tail_tokens) if tail else Match(blocks, end)

    def _closest_child(self, node: Node, rest: bytes) -> tuple[Node | None, int]:
        """The child sharing most leading tokens with rest: a neighbour of rest in sorted order."""
        best, best_tokens = None, 0
        at = bisect_left(node.keys, rest)
        for key in node.keys[max(at - 1, 0) : at + 1]:
            shared = common_tokens(key, rest)
            if shared > best_tokens:
                best, best_tokens = node.children[key], shared
        return best, best_tokens

    def insert(self, parent: Node | None, salt: str, key: bytes, block: int) -> Node:
        """The full block that continues parent (None: the root). Returns the node that now stands for it.

        The returned node's block is another one when the same tokens are cached already: the caller then shares that
        one (acquires it) to keep the path, and its own stays private.
        """
        parent = parent or self._root(salt)
        existing = parent.children.get(key)
        if existing is not None:
            return existing
        self._drop_covered_leaf(parent, key)
        return self._attach(parent, key, block)

    def insert_tail(self, parent: Node | None, salt: str, key: bytes, block: int) -> None:
        """A last, partly filled block; not kept when a child of parent begins with the same tokens already."""
        parent = parent or self._root(salt)
        at = bisect_left(parent.keys, key)
        if at < len(parent.keys) and parent.keys[at].startswith(key):
            self._touch(parent.children[parent.keys[at]])
            return
        self._drop_covered_leaf(parent, key)
        self._attach(parent, key, block)

    def _root(self, salt: str) -> Node:
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node(b"", -1, None, salt)
        return root

    def _attach(self, parent: Node, key: bytes, block: int) -> Node:
        if parent.block < 0:
            self._roots[parent.salt] = parent  # it may have just lost its only child, and with it its place here
        node = Node(key, block, parent, parent.salt)
        self._pool.cache(block)
        self._nodes[block] = node
        parent.children[key] = node
        insort(parent.keys, key)
        return node

    def _drop_covered_leaf(self, parent: Node, key: bytes) -> None:
        """A partly filled idle leaf whose tokens the new key repeats is of no more use."""
        at = bisect_left(parent.keys, key) - 1
        if at < 0:
            return
        leaf = parent.children[parent.keys[at]]
        if not leaf.is_full and key.startswith(leaf.key) and self._pool.ref_counts[leaf.block] == 0:
            self._detach(leaf)

    def _touch(self, node: Node) -> None:
        """Used just now: last in line for eviction, if it is idle at all."""
        if self._pool.ref_counts[node.block] == 0:
            self.mark_idle((node.block,))

    def mark_idle(self, blocks: Iterable[int]) -> None:
        """These blocks were released by their last owner just now: the newest in line for eviction."""
        self._clock += 1
        for block in blocks:
            node = self._nodes[block]
            if node is None:
                raise BlockPoolError(f"block {block} is cached, but the prefix tree does not know it")
            node.last_used = self._clock
            if not node.children:
                heappush(self._leaves, (self._clock, block, node))
        if len(self._leaves) > 2 * self._pool.num_blocks + 64:
            self._leaves = [entry for entry in self._leaves if self._is_idle_leaf(entry)]
            heapify(self._leaves)

    def _is_idle_leaf(self, entry: tuple[int, int, Node]) -> bool:
        last_used, block, node = entry
        return (
            self._nodes[block] is node
            and node.last_used == last_used
            and not node.children
            and self._pool.ref_counts[block] == 0
        )

    def evict(self, num_blocks: int) -> int:
        """Free up to num_blocks idle blocks, least recently used leaves first. Returns how many."""
        evicted = 0
        while evicted < num_blocks and self._leaves:
            entry = heappop(self._leaves)
            if self._is_idle_leaf(entry):
                self._detach(entry[2])
                evicted += 1
        return evicted

    def _detach(self, node: Node) -> None:
        """Take a leaf out of the tree. Its parent may be the next leaf, an empty root goes too."""
        parent = node.parent
        if parent is None or node.children:
            raise BlockPoolError("only a leaf can leave the prefix tree")
        del parent.children[node.key]
        del parent.keys[bisect_left(parent.keys, node.key)]
        self._nodes[node.block] = None
        self._pool.uncache(node.block)
        if parent.children:
            return
        if parent.block < 0:
            del self._roots[parent.salt]
        elif self._pool.ref_counts[parent.block] == 0:
            heappush(self._leaves, (parent.last_used, parent.block, parent))

    def forget(self, node: Node | None) -> None:
        """Take the path that ends here out of the tree, as far up as only one request owns it.

        For KV that must not be used again: it made a step fail. What continues it goes as well.
        """
        refs = self._pool.ref_counts
        while node is not None and node.block >= 0 and refs[node.block] <= 1:
            if not self._forget_below(node):
                return
            parent = node.parent
            self._detach(node)
            node = parent

    def _forget_below(self, node: Node) -> bool:
        """Remove the idle nodes under node. False if one of them is in use."""
        stack, order = list(node.children.values()), list[Node]()
        while stack:
            child = stack.pop()
            order.append(child)
            stack.extend(child.children.values())
        if any(self._pool.ref_counts[child.block] for child in order):
            return False
        for child in reversed(order):
            self._detach(child)
        return True

    def clear(self) -> int:
        """Forget every idle block (the weights changed, or the device's memory is given up). Returns how many."""
        return self.evict(self._pool.num_blocks)

    def check_integrity(self) -> None:
        """Walk the whole tree. Raises BlockPoolError with the first thing that is wrong."""
        found = 0
        stack = [(root, salt) for salt, root in self._roots.items()]
        queued = {entry[1] for entry in self._leaves if self._is_idle_leaf(entry)}
        while stack:
            node, salt = stack.pop()
            self._check_node(node, salt, queued)
            found += node.block >= 0
            stack.extend((child, salt) for child in node.children.values())
        if found != sum(self._pool.cached):
            raise BlockPoolError(f"the tree holds {found} blocks, the pool counts {sum(self._pool.cached)}")

    def _check_node(self, node: Node, salt: str, queued: set[int]) -> None:
        if node.keys != sorted(node.children):
            raise BlockPoolError("a node's keys are not its children's")
        if node.salt != salt:
            raise BlockPoolError("a node is under another tenant's root")
        if node.block < 0:
            if not node.children:
                raise BlockPoolError("an empty root was left behind")
            return
        refs = self._pool.ref_counts
        if self._nodes[node.block] is not node or not self._pool.cached[node.block]:
            raise BlockPoolError(f"block {node.block} is in the tree, but not registered as such")
        if node.children and not node.is_full:
            raise BlockPoolError("a partly filled block has a continuation")
        if any(refs[child.block] > refs[node.block] for child in node.children.values()):
            raise BlockPoolError("a block has more owners than the block before it")
        if not node.children and refs[node.block] == 0 and node.block not in queued:
            raise BlockPoolError(f"idle leaf {node.block} would never be evicted")
