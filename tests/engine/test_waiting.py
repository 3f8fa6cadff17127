"""The order of the queue: priority, least served user, arrival."""

from __future__ import annotations

from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.waiting import WaitingQueue


def request(index: int, user: str = "", priority: int = 0) -> Request:
    made = Request(f"r{index}", [1], SamplingParams(max_tokens=1), 0.0, user=user, priority=priority)
    made.arrival_index = index
    return made


def ids(queue: WaitingQueue) -> list[str]:
    return [r.request_id for r in queue.in_order()]


def test_priority_then_arrival():
    queue = WaitingQueue()
    for r in (request(0), request(1, priority=1), request(2), request(3, priority=1)):
        queue.join(r)
    assert ids(queue) == ["r1", "r3", "r0", "r2"]


def test_a_preempted_request_takes_its_old_place():
    queue = WaitingQueue()
    requests = [request(i) for i in range(3)]
    for r in requests:
        queue.join(r)
    queue.remove(requests[0])
    queue.push(requests[0])
    assert ids(queue) == ["r0", "r1", "r2"]
    assert len(queue) == 3


def test_charges_on_the_way_change_who_is_next():
    queue = WaitingQueue()
    accounts = {}
    for i in range(6):
        user = "ab"[i >= 3]
        accounts[user] = queue.join(request(i, user))
    order = []
    for r in queue.in_order():
        order.append(r.request_id)
        accounts[r.user].served += 10
    assert order == ["r0", "r3", "r1", "r4", "r2", "r5"]


def test_idle_time_is_not_saved_up():
    queue = WaitingQueue()
    first = queue.join(request(0, "a"))
    first.served = 1000
    assert queue.join(request(1, "b")).served == 1000
    second = request(2, "b")
    queue.join(second)
    for gone in (1, 2):
        queue.remove(next(r for r in queue.in_order() if r.arrival_index == gone))
        queue.leave(second)
    first.served = 5000
    assert queue.join(request(3, "b")).served == 5000
