"""The pool's states: free, owned, idle; and that it notices misuse."""

from __future__ import annotations

import pytest

from mainsail_engine.kv.block_pool import BlockPool, BlockPoolError


def test_a_block_goes_from_free_to_owned_to_free():
    pool = BlockPool(2)
    block = pool.allocate()
    assert (pool.num_free, pool.num_owned, pool.num_idle) == (1, 1, 0)
    assert pool.release([block]) == []
    assert (pool.num_free, pool.num_owned, pool.num_idle) == (2, 0, 0)
    pool.check_integrity()


def test_a_cached_block_is_idle_when_released_and_owned_again_when_shared():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.cache(block)
    assert pool.release([block]) == [block]
    assert (pool.num_free, pool.num_idle, pool.num_available) == (1, 1, 2)
    pool.acquire([block])
    pool.acquire([block])
    assert pool.ref_counts[block] == 2
    assert pool.num_idle == 0
    pool.uncache(block)
    assert pool.num_owned == 1
    pool.release([block, block])
    assert pool.num_free == 2
    pool.check_integrity()


def test_misuse_is_refused():
    pool = BlockPool(1)
    block = pool.allocate()
    with pytest.raises(BlockPoolError, match="no free block"):
        pool.allocate()
    with pytest.raises(BlockPoolError, match="not cached"):
        pool.uncache(block)
    pool.release([block])
    with pytest.raises(BlockPoolError, match="more often"):
        pool.release([block])
    with pytest.raises(BlockPoolError, match="is free"):
        pool.acquire([block])
    with pytest.raises(BlockPoolError, match="owned by nobody"):
        pool.cache(block)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool, block: pool.ref_counts.__setitem__(block, 0),
        lambda pool, block: setattr(pool, "num_idle", 1),
        lambda pool, block: pool._free.append(block),
        lambda pool, block: pool._free.append(pool._free[0]),
    ],
)
def test_integrity_notices_damage(damage):
    pool = BlockPool(4)
    block = pool.allocate()
    pool.check_integrity()
    damage(pool, block)
    with pytest.raises(BlockPoolError):
        pool.check_integrity()
