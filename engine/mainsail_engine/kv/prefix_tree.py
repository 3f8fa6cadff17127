"""What the cached blocks hold: a radix tree over tokens, one node for each block of 16, over both tiers of memory.

    root(cache_salt) ── [t0 .. t15] ─┬─ [t16 .. t31] ── [t32 .. t40)      a leaf may be partly filled
        device            device     │     host            host
                                     └─ [u16 .. u31]
                                           device

A path from the root is a prefix, and names the blocks that hold its KV. Full blocks are shared as they are. Where a
prompt leaves the tree inside a block, the common tokens of that block can be copied (copy-on-write), so reuse is exact
to the token. Tokens are compared themselves, not hashes of them: there are no collisions, and `cache_salt` keeps
tenants apart from the root on.

A node's key is its tokens as big-endian 32-bit words: slicing and hashing 64 bytes is one step in C, and in sorted
order the longest common prefix with any tokens is found beside the place where they would be inserted.

Eviction takes the least recently released node that no request owns and below which nothing is on the device, from a
heap with lazy deletion: O(log n). A request that owns a node owns the whole path to it, so every idle block can be
evicted in the end, leaves first. What is evicted goes to the host tier while there is room; so along a path come nodes
on the device first, then nodes on the host. A node that came back keeps its host copy, to be evicted for nothing the
next time, until the host's room is needed: such copies go first, then the least recently used leaf, if it is older
than what wants its place. A path that is kept for a session stays on the device until it is let go.

The idea: RadixAttention (SGLang, Zheng et al. 2023) on paged blocks, with a copied tail as in TensorRT-LLM.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.kv.block_pool import BlockPool, BlockPoolError
from mainsail_engine.kv.host_tier import HostTier
from mainsail_engine.kv.packed_tokens import KEY_BYTES, common_tokens, pack_tokens


class Node:
    """One cached block, on the device, the host or both; or a root (no parent)."""

    __slots__ = (
        "block",
        "children",
        "device_children",
        "digest",
        "host",
        "kept",
        "key",
        "keys",
        "last_used",
        "load",
        "parent",
        "salt",
    )

    def __init__(self, key: bytes, block: int, parent: Node | None, salt: str) -> None:
        self.key = key
        self.block = block
        """On the device; -1: not there."""
        self.host = -1
        """On the host; -1: not there."""
        self.load = 0
        """Number of the load that brings or brought it to the device: there once the host tier has loaded so many."""
        self.parent = parent
        self.salt = salt
        self.children: dict[bytes, Node] = {}
        self.keys: list[bytes] = []
        """The children's keys in order."""
        self.device_children = 0
        self.kept = 0
        """For how many sessions this node, or one below it, is kept."""
        self.last_used = 0
        self.digest = b""
        """Of these tokens and all before them, once somebody asked (events.py)."""

    @property
    def is_full(self) -> bool:
        return len(self.key) == KEY_BYTES

    def __lt__(self, other: Node) -> bool:
        """For heaps, where a stale entry and a new one are alike in all else: any order will do."""
        return id(self) < id(other)


class Match:
    """What the tree has of a prompt: full blocks to share, some of them to load first, and a tail to copy."""

    __slots__ = ("blocks", "host_nodes", "node", "tail", "tail_tokens")

    def __init__(
        self,
        blocks: list[int],
        node: Node | None,
        *,
        host_nodes: Sequence[Node] = (),
        tail: Node | None = None,
        tail_tokens: int = 0,
    ) -> None:
        self.blocks = blocks
        """On the device."""
        self.host_nodes = host_nodes
        """What follows them, on the host only."""
        self.node = node
        """Where the full blocks end; None: at the root."""
        self.tail = tail
        self.tail_tokens = tail_tokens
        """The first tail_tokens positions of the tail's block go on where the full blocks end."""

    @property
    def num_blocks(self) -> int:
        """Full blocks on either tier."""
        return len(self.blocks) + len(self.host_nodes)

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * BLOCK_SIZE + self.tail_tokens

    @property
    def num_host_tokens(self) -> int:
        """What has to be loaded."""
        tail_on_host = self.tail is not None and self.tail.block < 0
        return len(self.host_nodes) * BLOCK_SIZE + (self.tail_tokens if tail_on_host else 0)


class TreeWatcher(Protocol):
    """Told what full blocks come to the device and leave it."""

    def stored(self, node: Node, /) -> None: ...
    def removed(self, node: Node, /) -> None: ...


class PrefixTree:
    def __init__(self, pool: BlockPool, host: HostTier | None = None) -> None:
        self._pool = pool
        self._host = host or HostTier()
        self._roots: dict[str, Node] = {}
        self._nodes: list[Node | None] = [None] * pool.num_blocks
        """By device block."""
        self._host_nodes: dict[int, Node] = {}
        """By host block."""
        self._leaves: list[tuple[int, int, Node]] = []
        """Heap of (last_used, block, node); stale when the node was used since, has children there, or is gone."""
        self._host_leaves: list[tuple[bool, int, int, Node]] = []
        """Heap of (it is the only copy, last_used, host block, node), stale likewise."""
        self._clock = self._num_demoted = 0
        self.watchers: tuple[TreeWatcher, ...] = ()

    def match(self, token_ids: Sequence[int], salt: str, limit: int) -> Match:
        """The longest cached prefix of token_ids[:limit]. Changes nothing: acquire the blocks to keep them."""
        node = self._roots.get(salt)
        if node is None:
            return Match([], None)
        packed = pack_tokens(token_ids[:limit])
        blocks, host_nodes = list[int](), list[Node]()
        for position in range(0, len(packed) - KEY_BYTES + 1, KEY_BYTES):
            child = node.children.get(packed[position : position + KEY_BYTES])
            if child is None:
                break
            if child.block >= 0:
                blocks.append(child.block)
            else:
                host_nodes.append(child)
            node = child
        matched = (len(blocks) + len(host_nodes)) * KEY_BYTES
        tail, tail_tokens = self._closest_child(node, packed[matched : matched + KEY_BYTES])
        end = node if matched else None
        return Match(blocks, end, host_nodes=host_nodes, tail=tail, tail_tokens=tail_tokens)

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

        The returned node's block is another one when the same tokens are on the device already: the caller then
        shares that one (acquires it) to keep the path, and its own stays private.
        """
        parent = parent or self._root(salt)
        existing = parent.children.get(key)
        if existing is not None:
            if existing.block < 0:
                self.arrive(existing, block)
            return existing
        self._drop_covered_leaf(parent, key)
        return self._attach(parent, key, block)

    def insert_tail(self, parent: Node | None, salt: str, key: bytes, block: int) -> Node:
        """A last, partly filled block; not kept when a child of parent begins with the same tokens already.

        Returns the node that holds these tokens.
        """
        parent = parent or self._root(salt)
        at = bisect_left(parent.keys, key)
        if at < len(parent.keys) and parent.keys[at].startswith(key):
            existing = parent.children[parent.keys[at]]
            if existing.block < 0 and existing.key == key:
                self.arrive(existing, block)
            else:
                self._touch(existing)
            return existing
        self._drop_covered_leaf(parent, key)
        return self._attach(parent, key, block)

    def _root(self, salt: str) -> Node:
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node(b"", -1, None, salt)
        return root

    def _attach(self, parent: Node, key: bytes, block: int) -> Node:
        if parent.parent is None:
            self._roots[parent.salt] = parent  # it may have just lost its only child, and with it its place here
        node = Node(key, -1, parent, parent.salt)
        parent.children[key] = node
        insort(parent.keys, key)
        self.arrive(node, block)
        return node

    def arrive(self, node: Node, block: int, load: int = 0) -> None:
        """The node is on the device as well: in this block, once that load has brought it."""
        self._pool.cache(block)
        self._nodes[block] = node
        node.block, node.load = block, load
        if node.kept:
            self._pool.keep(block, True)
        if self.watchers and node.is_full:
            for watcher in self.watchers:
                watcher.stored(node)
        if node.parent is not None:
            node.parent.device_children += 1
        self._queue_host(node)

    def _drop_covered_leaf(self, parent: Node, key: bytes) -> None:
        """A partly filled idle leaf whose tokens the new key repeats is of no more use."""
        at = bisect_left(parent.keys, key) - 1
        if at < 0:
            return
        leaf = parent.children[parent.keys[at]]
        if not leaf.is_full and key.startswith(leaf.key) and not self._is_owned(leaf):
            self._detach(leaf)

    def _is_owned(self, node: Node) -> bool:
        return node.block >= 0 and self._pool.ref_counts[node.block] > 0

    def _touch(self, node: Node) -> None:
        """Used just now: last in line for eviction, if it is idle at all."""
        if node.block >= 0 and not self._is_owned(node):
            self.mark_idle((node.block,))

    def mark_idle(self, blocks: Iterable[int]) -> None:
        """These blocks were released by their last owner just now: the newest in line for eviction."""
        self._clock += 1
        for block in blocks:
            node = self._nodes[block]
            if node is None:
                raise BlockPoolError(f"block {block} is cached, but the prefix tree does not know it")
            node.last_used = self._clock
            if not node.device_children:
                heappush(self._leaves, (self._clock, block, node))
            if node.host >= 0:
                self._queue_host(node)
        if len(self._leaves) > 2 * self._pool.num_blocks + 64:
            self._leaves = [entry for entry in self._leaves if self._is_idle_leaf(entry)]
            heapify(self._leaves)

    def _is_idle_leaf(self, entry: tuple[int, int, Node]) -> bool:
        last_used, block, node = entry
        return (
            self._nodes[block] is node
            and node.last_used == last_used
            and not node.device_children
            and not node.kept
            and self._pool.ref_counts[block] == 0
        )

    def keep(self, node: Node) -> int:
        """Keep the path that ends here from being evicted. Returns how many of its blocks nobody kept before."""
        added, each = 0, node
        while each.parent is not None:
            each.kept += 1
            if each.kept == 1 and each.block >= 0:
                self._pool.keep(each.block, True)
                added += 1
            each = each.parent
        return added

    def let_go(self, node: Node) -> None:
        """The end of one `keep`. What nobody keeps any more is the newest in line for eviction."""
        each, idle = node, list[int]()
        while each.parent is not None:
            each.kept -= 1
            if each.kept == 0 and each.block >= 0:
                self._pool.keep(each.block, False)
                if self._pool.ref_counts[each.block] == 0:
                    idle.append(each.block)
            each = each.parent
        self.mark_idle(idle)

    def demote(self, node: Node) -> None:
        """What only leads to this node is the first in line for eviction, and takes nobody's place on the host."""
        self._num_demoted += 1
        each = node
        while each.parent is not None and not each.kept and not self._is_owned(each):
            if each is not node and len(each.children) > 1:
                return
            each.last_used = -self._num_demoted  # older than anything used
            self._queue_leaf(each)
            self._queue_host(each)
            each = each.parent

    # -- from the device to the host, and away -------------------------------------------------------------------

    def evict(self, num_blocks: int) -> int:
        """Free up to num_blocks idle device blocks, least recently used leaves first. Returns how many."""
        evicted = 0
        while evicted < num_blocks and self._leaves:
            entry = heappop(self._leaves)
            if self._is_idle_leaf(entry):
                self._evict(entry[2])
                evicted += 1
        return evicted

    def _evict(self, node: Node) -> None:
        """Off the device: to the host if there is room or it is there, else out of the tree, with what continues it."""
        if node.host < 0:
            if not self._host_room(node.last_used):
                self._drop_subtree(node)
                return
            node.host = self._host.store(node.block)
            self._host_nodes[node.host] = node
        self._leave_device(node)
        self._queue_host(node)

    def _leave_device(self, node: Node) -> None:
        block, parent = node.block, node.parent
        if self.watchers and node.is_full:
            for watcher in self.watchers:
                watcher.removed(node)
        self._nodes[block] = None
        self._pool.uncache(block)
        node.block = -1
        if parent is not None:
            parent.device_children -= 1
            self._queue_leaf(parent)

    def _queue_leaf(self, node: Node) -> None:
        """In line for eviction, if that is all that keeps it."""
        if node.block >= 0 and not (node.device_children or node.kept) and self._pool.ref_counts[node.block] == 0:
            heappush(self._leaves, (node.last_used, node.block, node))

    def _queue_host(self, node: Node) -> None:
        """In line for leaving the host, if nothing continues it only there."""
        if node.host >= 0 and (node.block >= 0 or not node.children):
            heappush(self._host_leaves, (node.block < 0, node.last_used, node.host, node))
            if len(self._host_leaves) > 2 * self._host.pool.num_blocks + 64:
                self._host_leaves = [entry for entry in self._host_leaves if self._may_leave_host(entry)]
                heapify(self._host_leaves)

    def _may_leave_host(self, entry: tuple[bool, int, int, Node]) -> bool:
        only_copy, last_used, host, node = entry
        return (
            self._host_nodes.get(host) is node
            and node.last_used == last_used
            and only_copy == (node.block < 0)
            and not (only_copy and node.children)
            and self._host.pool.ref_counts[host] == 0
        )

    def host_released(self, host_blocks: Iterable[int]) -> None:
        """Loads have read these: they may leave the host again."""
        for host in self._host.pool.release(host_blocks):
            self._queue_host(self._host_nodes[host])

    def _host_room(self, last_used: int) -> bool:
        """A free host block for something last used then: nothing newer has to go for it."""
        while not self._host.pool.num_free:
            entry = heappop(self._host_leaves) if self._host_leaves else None
            if entry is None:
                return False
            if not self._may_leave_host(entry):
                continue
            only_copy, used, _, node = entry
            if not only_copy:
                self._leave_host(node)
            elif used <= last_used:
                self._detach(node)
            else:
                heappush(self._host_leaves, entry)
                return False
        return True

    def _leave_host(self, node: Node) -> None:
        del self._host_nodes[node.host]
        self._host.pool.uncache(node.host)
        node.host = -1

    def _detach(self, node: Node) -> None:
        """Take a leaf out of the tree and both tiers. Its parent may be the next leaf, an empty root goes too."""
        parent = node.parent
        if parent is None or node.children:
            raise BlockPoolError("only a leaf can leave the prefix tree")
        del parent.children[node.key]
        del parent.keys[bisect_left(parent.keys, node.key)]
        if node.host >= 0:
            self._leave_host(node)
        if node.block >= 0:
            self._leave_device(node)
        if not node.kept:
            node.parent = None  # whoever still remembers this node need not remember the path
        if parent.children:
            return
        if parent.parent is None:
            del self._roots[parent.salt]
        elif parent.block < 0:
            self._queue_host(parent)

    def _drop_subtree(self, node: Node) -> None:
        """The node and everything below it, of which nothing is owned."""
        stack, order = [node], list[Node]()
        while stack:
            each = stack.pop()
            order.append(each)
            stack.extend(each.children.values())
        for each in reversed(order):
            self._detach(each)

    def forget(self, node: Node | None, *, owned: int = 1) -> None:
        """Take the path that ends here out of the tree, as far up as nobody owns it besides the caller.

        For KV that must not be used again: it made a step fail. What continues it goes as well. `owned`: how many
        references to each of its blocks the caller holds.
        """
        while node is not None and node.parent is not None:
            if (node.block >= 0 and self._pool.ref_counts[node.block] > owned) or self._owned_below(node):
                return
            parent = node.parent
            self._drop_subtree(node)
            node = parent

    def _owned_below(self, node: Node) -> bool:
        """Whether anything that continues node is in use."""
        stack = list(node.children.values())
        while stack:
            child = stack.pop()
            if self._is_owned(child):
                return True
            stack.extend(child.children.values())
        return False

    def drop_tenant(self, salt: str) -> None:
        """Forget everything of this salt, of which nothing may be owned."""
        root = self._roots.get(salt)
        for child in list(root.children.values()) if root else ():
            self._drop_subtree(child)

    def clear(self) -> int:
        """Forget every idle block, on both tiers (the weights changed, or the device's memory is given up).

        Returns how many blocks that freed on the device.
        """
        free = self._pool.num_free
        stack = list(self._roots.values())
        while stack:
            for child in list(stack.pop().children.values()):
                if self._is_owned(child):
                    stack.append(child)
                else:
                    self._drop_subtree(child)
        return self._pool.num_free - free

    def check_integrity(self) -> None:
        """Walk the whole tree. Raises BlockPoolError with the first thing that is wrong."""
        on_device = on_host = 0
        stack = [(root, salt) for salt, root in self._roots.items()]
        queued = {entry[1] for entry in self._leaves if self._is_idle_leaf(entry)}
        queued_host = {entry[2] for entry in self._host_leaves if self._may_leave_host(entry)}
        while stack:
            node, salt = stack.pop()
            self._check_node(node, salt)
            if node.parent is not None:
                self._check_device(node, queued)
                self._check_host(node, queued_host)
                on_device += node.block >= 0
                on_host += node.host >= 0
            stack.extend((child, salt) for child in node.children.values())
        for found, pool in ((on_device, self._pool), (on_host, self._host.pool)):
            if found != sum(pool.cached):
                raise BlockPoolError(f"the tree holds {found} blocks, the pool counts {sum(pool.cached)}")

    def _check_node(self, node: Node, salt: str) -> None:
        if node.keys != sorted(node.children):
            raise BlockPoolError("a node's keys are not its children's")
        if node.salt != salt:
            raise BlockPoolError("a node is under another tenant's root")
        if node.device_children != sum(child.block >= 0 for child in node.children.values()):
            raise BlockPoolError("a node's children on the device are miscounted")
        if node.parent is None and not node.children:
            raise BlockPoolError("an empty root was left behind")
        if node.parent is not None and node.children and not node.is_full:
            raise BlockPoolError("a partly filled block has a continuation")
        if node.parent is not None and node.block < 0 and (node.host < 0 or node.device_children):
            raise BlockPoolError("a node is nowhere, or its continuation is on the device without it")

    def _check_device(self, node: Node, queued: set[int]) -> None:
        if node.block < 0:
            return
        refs = self._pool.ref_counts
        if self._nodes[node.block] is not node or not self._pool.cached[node.block]:
            raise BlockPoolError(f"block {node.block} is in the tree, but not registered as such")
        if any(child.block >= 0 and refs[child.block] > refs[node.block] for child in node.children.values()):
            raise BlockPoolError("a block has more owners than the block before it")
        if self._pool.kept[node.block] != (node.kept > 0):
            raise BlockPoolError(f"block {node.block} is kept by the tree or by the pool, not by both")
        if any(child.kept > node.kept for child in node.children.values()):
            raise BlockPoolError("a node is kept oftener than the node before it")
        if not (node.device_children or node.kept or refs[node.block]) and node.block not in queued:
            raise BlockPoolError(f"idle leaf {node.block} would never be evicted")

    def _check_host(self, node: Node, queued: set[int]) -> None:
        if node.host < 0:
            return
        if self._host_nodes.get(node.host) is not node or not self._host.pool.cached[node.host]:
            raise BlockPoolError(f"host block {node.host} is in the tree, but not registered as such")
        may_leave = (node.block >= 0 or not node.children) and not self._host.pool.ref_counts[node.host]
        if may_leave and node.host not in queued:
            raise BlockPoolError(f"host block {node.host} would never be evicted")
