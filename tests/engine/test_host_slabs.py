"""Host memory that is pinned before anybody needs it; here by a function that only notes what it is given."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from mainsail_engine import host_slabs
from mainsail_engine.host_slabs import SLAB_BYTES, HostSlabs
from mainsail_engine.pages import address_of, as_tensor
from mainsail_engine.runner.swap import HostMemory


def test_whole_slabs_are_pinned_one_after_the_other() -> None:
    pinned: list[tuple[int, int]] = []
    slabs = HostSlabs(3 * SLAB_BYTES + 5, lambda address, size: not pinned.append((address, size)))
    first = slabs.take(2)
    assert [(address_of(slab), SLAB_BYTES) for slab in first] == pinned[:2]
    assert [address_of(slab) for slab in slabs.left()] == [pinned[2][0]]
    assert slabs.left() == slabs.take(5) == []
    assert not as_tensor(first[0]).any()


def test_what_the_driver_refuses_is_not_there() -> None:
    pinned: list[int] = []

    def pin(address: int, size: int) -> bool:
        pinned.append(size)
        return len(pinned) <= 2

    slabs = HostSlabs(5 * SLAB_BYTES, pin)
    assert len(slabs.take(5)) == 2
    assert len(pinned) == 3, "it was asked once more, and no further"


def test_a_slow_driver_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is at its third slab when patience is over: that one is had still, and no other is asked for."""
    monkeypatch.setattr(host_slabs, "PATIENCE_S", 0.1)
    asked: list[int] = []
    is_slow = threading.Event()

    def pin(address: int, size: int) -> bool:
        asked.append(address)
        if len(asked) == 3:
            is_slow.set()
            assert slabs._ended.wait(120)
        return True

    slabs = HostSlabs(12 * SLAB_BYTES, pin)
    slabs._may_pin.set()
    assert is_slow.wait(120)
    assert len(slabs.take(12)) == 3
    assert slabs.left() == []
    assert len(asked) == 3, "what is left is not pinned behind anybody's back"


def test_a_process_that_ends_before_it_may_pin_ends() -> None:
    script = """
from mainsail_engine.host_slabs import SLAB_BYTES, HostSlabs
slabs = HostSlabs(2 * SLAB_BYTES, lambda address, size: print("pinned"))
print("the end")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert (ended.returncode, ended.stdout) == (0, "the end\n")


def test_blocks_lie_in_slabs_as_many_as_fit() -> None:
    """A third of a slab each and a little: two in a slab, and no block over a border."""
    numbers = SLAB_BYTES // 12 + 1
    slabs = HostSlabs(4 * SLAB_BYTES, lambda address, size: True)
    memory = HostMemory((numbers,), torch.float32, 4 * SLAB_BYTES)
    memory._use(slabs, torch.device("cpu"))
    assert memory.num_blocks == 8 + 8, "its own, and those of the slabs"
    runs = [(first, stop, len(part)) for first, stop, part in memory.runs([8, 9, 10, 15])]
    assert runs == [(0, 2, 2), (2, 3, 1), (3, 4, 1)]
