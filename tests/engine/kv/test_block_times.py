from __future__ import annotations

from mainsail_engine.kv.block_times import KEPT_USES, BlockTimes
from mainsail_engine.kv.prefix_tree import Node
from mainsail_engine.protocol import BlockLife


def node(block: int) -> Node:
    return Node(b"\0" * 64, block, None, "")


def test_a_life() -> None:
    times, one = BlockTimes(sample=1.0), node(3)
    times.now = 10.0
    times.stored(one)
    for times.now in (12.0, 17.0):
        times.used([1, 3])
    times.now = 20.0
    times.removed(one)
    assert times.take() == [BlockLife(lifetime_s=10.0, idle_s=3.0, reuse_gaps_s=[2.0, 5.0])]
    assert times.take() == []


def test_only_the_last_uses_are_told() -> None:
    times, one = BlockTimes(sample=1.0), node(0)
    times.stored(one)
    for times.now in range(1, 101):
        times.used([0])
    times.removed(one)
    (life,) = times.take()
    assert life.reuse_gaps_s == [1.0] * KEPT_USES
    assert life.lifetime_s == 100.0


def test_a_sample_is_a_share() -> None:
    times = BlockTimes(sample=0.1)
    for block in range(5000):
        times.stored(node(block))
        times.used([block])
        times.removed(node(block))
    assert 400 < len(times.take()) < 600
