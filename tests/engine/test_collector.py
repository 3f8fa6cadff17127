"""What a program is made of is left out of collections, and garbage is still found."""

from __future__ import annotations

import gc
import weakref

from mainsail_engine.collector import FULL_AFTER, settle


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_there_was_is_not_looked_through_and_later_garbage_goes():
    before = gc.get_threshold()
    try:
        settle()
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold() == (*before[:2], FULL_AFTER)
        gone = weakref.ref(Cycle())
        made: list[list[int]] = []
        while gone() is not None and len(made) < 10 * before[0] * before[1]:
            made.append([])
        assert gone() is None
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
