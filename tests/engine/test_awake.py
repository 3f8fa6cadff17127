"""Time that a process was not there for is nobody's silence."""

from __future__ import annotations

from mainsail_engine.awake import AwakeClock


def test_a_pause_counts_as_one_long_turn() -> None:
    moments = iter((100.0, 100.2, 100.4, 1000.0, 1000.2))
    clock = AwakeClock(1.0, lambda: next(moments))
    assert clock.now_s == 0.0
    assert [round(clock.tick(), 6) for _ in range(4)] == [0.2, 0.4, 1.4, 1.6]
    assert round(clock.now_s, 6) == 1.6
