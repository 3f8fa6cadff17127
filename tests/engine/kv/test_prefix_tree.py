"""Matching to the token, sharing, eviction order, salts."""

from __future__ import annotations

import pytest

from mainsail_engine.kv.block_pool import BlockPool
from mainsail_engine.kv.packed_tokens import common_tokens, pack_tokens
from mainsail_engine.kv.prefix_tree import PrefixTree


class Cached:
    """A tree in which token lists are put as finished requests would leave them."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool)

    def put(self, tokens: list[int], salt: str = "") -> list[int]:
        node, owned, table = None, [], []
        for start in range(0, len(tokens), 16):
            part = tokens[start : start + 16]
            block = self.pool.allocate()
            owned.append(block)
            if len(part) < 16:
                self.tree.insert_tail(node, salt, pack_tokens(part), block)
                table.append(block)
                continue
            node = self.tree.insert(node, salt, pack_tokens(part), block)
            if node.block != block:
                self.pool.acquire([node.block])
                owned.append(node.block)
            table.append(node.block)
        self.tree.mark_idle(self.pool.release(owned))
        self.check()
        return table

    def hit(self, tokens: list[int], salt: str = "") -> int:
        return self.tree.match(tokens, salt, len(tokens)).num_tokens

    def check(self) -> None:
        self.pool.check_integrity()
        self.tree.check_integrity()


@pytest.mark.parametrize(("left", "right", "shared"), [([], [1], 0), ([1, 2], [1, 3], 1), ([258, 1], [258, 1, 4], 2)])
def test_common_tokens(left, right, shared):
    assert common_tokens(pack_tokens(left), pack_tokens(right)) == shared


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 70])
@pytest.mark.parametrize("shared", [0, 1, 7, 15, 16, 17, 40, 69, 70])
def test_a_match_is_exact_to_the_token(length, shared):
    cached = Cached(16)
    tokens = list(range(1000, 1000 + length))
    cached.put(tokens)
    shared = min(shared, length)
    assert cached.hit([*tokens[:shared], 7, 8, 9]) == shared


def test_the_tail_comes_from_the_branch_that_shares_most():
    cached = Cached(16)
    prefix = list(range(16))
    branches = [[*prefix, 50, 51, 52, 60 + i, 61] for i in range(4)]
    tables = [cached.put(branch) for branch in branches]
    for branch, table in zip(branches, tables, strict=True):
        match = cached.tree.match([*branch[:20], 99], "", 21)
        assert match.tail is not None
        assert (match.blocks, match.tail.block, match.tail_tokens) == (table[:1], table[1], 4)


def test_the_same_tokens_are_kept_once():
    cached = Cached(8)
    tokens = list(range(40))
    first, again = cached.put(tokens), cached.put(tokens)
    tail = cached.tree.match(tokens, "", 40).tail
    assert tail is not None
    assert first == [*again[:2], tail.block]
    assert cached.pool.num_idle == 3


def test_a_longer_tail_replaces_the_shorter_one_and_a_shorter_one_is_not_kept():
    cached = Cached(8)
    cached.put(list(range(20)))
    cached.put(list(range(25)))
    assert cached.pool.num_idle == 2
    cached.put(list(range(22)))
    assert cached.pool.num_idle == 2
    assert cached.hit(list(range(30))) == 25
    cached.put(list(range(32)))
    assert cached.pool.num_idle == 2
    assert cached.hit(list(range(32))) == 32


@pytest.mark.parametrize("longer", [5, 16])
def test_replacing_the_only_cached_block_keeps_its_tenant(longer):
    cached = Cached(8)
    cached.put(list(range(4)))
    cached.put(list(range(longer)))
    assert cached.hit(list(range(20))) == longer
    assert cached.pool.num_idle == 1


def test_salts_do_not_share():
    cached = Cached(8)
    tokens = list(range(40))
    cached.put(tokens, "one")
    assert cached.hit(tokens, "one") == 40
    assert cached.hit(tokens, "two") == 0
    assert cached.hit(tokens) == 0


def test_the_least_recently_used_leaf_goes_first_and_a_prefix_after_its_continuations():
    cached = Cached(16)
    prefix = list(range(16))
    old, new = [*prefix, *range(100, 116)], [*prefix, *range(200, 216)]
    cached.put(old)
    cached.put(new)
    cached.put(old)
    assert cached.tree.evict(1) == 1
    assert (cached.hit(old), cached.hit(new)) == (32, 16)
    assert cached.tree.evict(1) == 1
    assert cached.hit(old) == 16
    cached.check()
    assert cached.tree.evict(5) == 1
    assert cached.hit(old) == 0
    cached.check()


def test_what_only_an_ended_session_had_goes_before_anything_older():
    cached = Cached(8)
    stem, old, ended = list(range(16)), list(range(100, 132)), list(range(200, 232))
    cached.put([*stem, *old])
    cached.put([*stem, *ended])
    leaf = cached.tree.match([*stem, *ended], "", 48).node
    assert leaf is not None
    cached.tree.demote(leaf)
    cached.check()
    assert cached.tree.evict(2) == 2
    assert (cached.hit([*stem, *ended]), cached.hit([*stem, *old])) == (16, 48)
    cached.check()


def test_what_is_owned_is_not_evicted():
    cached = Cached(8)
    table = cached.put(list(range(48)))
    cached.pool.acquire(table[:2])
    assert cached.tree.evict(8) == 1
    assert cached.hit(list(range(48))) == 32
    cached.check()


def test_forgetting_takes_the_path_and_what_continues_it_but_nothing_that_others_own():
    cached = Cached(16)
    prefix = list(range(16))
    table = cached.put([*prefix, *range(100, 132)])
    other = cached.put([*prefix, *range(200, 216)])
    cached.pool.acquire(table[:2])
    cached.pool.acquire(other)
    cached.tree.forget(cached.tree._nodes[table[1]])
    assert cached.hit([*prefix, *range(100, 132)]) == 16
    assert cached.hit([*prefix, *range(200, 216)]) == 32
    cached.tree.mark_idle(cached.pool.release([*table[:2], *other]))
    cached.check()


def test_many_uses_do_not_make_the_heap_grow():
    cached = Cached(8)
    for _ in range(1000):
        cached.put(list(range(40)))
    assert len(cached.tree._leaves) < 100


def test_a_request_that_left_its_path_forgets_nothing_that_another_one_owns():
    cached = Cached(16)
    table = cached.put(list(range(48)))
    node = cached.tree._nodes[table[2]]
    cached.pool.acquire(table[:2])
    cached.tree.forget(node, owned=0)
    assert cached.hit(list(range(48))) == 32
    cached.tree.mark_idle(cached.pool.release(table[:2]))
    cached.check()
