"""Processes with orders, which end with their parent."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

from mainsail_engine.child import start_child, take_orders
from mainsail_engine.compile_kernels import CARDS, Order
from mainsail_engine.config import EngineConfig, ModelConfig

PARENT = """
import subprocess
from tests.engine.test_child import orders
from mainsail_engine.child import start_child

child = start_child("tests.engine.test_child", orders(), stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode().strip(), flush=True)
child.wait()
"""


def orders(path: str = "model") -> Order:
    return Order(config=EngineConfig(model=ModelConfig(path=path)), card=CARDS["h200"], mark="mark")


def test_a_child_that_ends_before_it_has_read_its_orders_is_no_error() -> None:
    """They are more than a pipe holds: the parent is still writing then."""
    child = start_child("nothing.at.all", orders("x" * 1_000_000))
    assert child.wait() == 1


def test_a_child_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        number, told = parent.stdout.readline().split()
        assert told == "model"
        child = psutil.Process(int(number))
        parent.kill()
    gone, _ = psutil.wait_procs([child], timeout=120)
    assert gone == [child]


if __name__ == "__main__":
    print(take_orders(Order).config.model.path, flush=True)
    time.sleep(60)
