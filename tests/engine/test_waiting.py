"""The order of the queue: priority, least served user, turns on time, arrival."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.sessions import Session
from mainsail_engine.waiting import MAX_WAIT_S, TURN_S, WaitingQueue, place_of


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


def turn(index: int, session: int, number: int, arrival_s: float) -> Request:
    """The session's turn of that number; older sessions have smaller numbers."""
    made = request(index)
    made.arrival_time_s, made.arrival_index = arrival_s, (session << 40) + index
    made.session = Session(session, num_turns=number)
    return made


def test_turns_on_time_take_turns_and_the_late_wait_by_the_age_of_their_sessions():
    queue = WaitingQueue()
    new, old_late, young_late = turn(0, 5, 1, 0.0), turn(1, 1, 3, 0.5), turn(2, 4, 2, 0.2)
    old, young = turn(3, 2, 4, 7.2), turn(4, 3, 2, 7.1)
    for r in (new, old_late, young_late):
        queue.join(r)
    assert ids(queue) == ["r2", "r1", "r0"]
    assert queue.advance(7.05)
    for r in (old, young):
        queue.join(r)
    assert ids(queue) == ["r4", "r3", "r1", "r2", "r0"]
    assert not queue.advance(7.2)
    assert queue.advance(MAX_WAIT_S + 0.1)
    assert ids(queue) == ["r0", "r1", "r3", "r4", "r2"]  # the new one has waited too long, the others are late


def test_a_preempted_turn_is_first():
    queue = WaitingQueue()
    first, second = turn(0, 0, 2, 0.0), turn(1, 1, 2, 0.1)
    for r in (first, second):
        queue.join(r)
    queue.remove(second)
    second.num_preemptions = 1
    queue.push(second)
    assert ids(queue) == ["r1", "r0"]


turns = st.tuples(st.integers(0, 5), st.integers(1, 3), st.floats(0, 100), st.integers(0, 3))


@given(st.lists(turns, max_size=30), st.lists(st.floats(0, 20), max_size=5))
def test_the_order_is_that_of_the_places_at_any_time(made: list[tuple[int, int, float, int]], pauses: list[float]):
    queue, waiting, now = WaitingQueue(), list[Request](), 0.0
    for index, (session, number, arrival_s, leaves) in enumerate(sorted(made, key=lambda each: each[2])):
        now = arrival_s
        queue.advance(now)
        waiting.append(turn(index, session, number, now))
        queue.join(waiting[-1])
        if leaves == 0:
            gone = waiting.pop(index % len(waiting))
            queue.remove(gone)
    for pause in (0.0, TURN_S, *pauses):
        now += pause
        queue.advance(now)
        assert list(queue.in_order()) == sorted(waiting, key=lambda r: place_of(r, now))
