from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainsail_engine.cells import Cells
from mainsail_engine.metrics import Metrics
from mainsail_engine.server.admission import MAX_RETRY_S, RESERVED_S, Admission, DrainRate
from mainsail_engine.server.board import Board


def test_an_empty_queue_takes_any_prompt() -> None:
    assert Admission(max_requests=1, max_tokens=10).check(5, 1000, 0.0) is None


def test_bounded_by_requests() -> None:
    admission = Admission(max_requests=2, max_tokens=1000)
    admission.enter(10, 0.0)
    assert admission.check(1, 10, 0.0) is None
    admission.enter(10, 0.0)
    rejection = admission.check(1, 10, 0.0)
    assert rejection is not None
    assert rejection.reason == "max_num_queued_reqs"
    admission.leave(10, 1.0, served=False)
    assert admission.check(1, 10, 0.0) is None


def test_bounded_by_tokens() -> None:
    admission = Admission(max_requests=100, max_tokens=100)
    admission.enter(90, 0.0)
    assert admission.check(1, 10, 0.0) is None
    rejection = admission.check(1, 11, 0.0)
    assert rejection is not None
    assert rejection.reason == "max_num_queued_tokens"


def test_retry_after_follows_the_measured_rate() -> None:
    admission = Admission(max_requests=100, max_tokens=1000)
    for second in range(6):
        admission.enter(100, float(second))
        admission.leave(100, second + 1.0, served=True)
        admission.enter(0, second + 1.0)
        admission.leave(0, second + 60.0, served=False)
    admission.enter(1000, 0.0)
    rejection = admission.check(1, 500, 0.0)
    assert rejection is not None
    assert rejection.retry_after_s == 5.0
    assert admission.retry_after_s(1e9) == MAX_RETRY_S
    assert admission.retry_after_s(1) == 1.0


def test_giving_up_says_nothing_about_the_rate() -> None:
    admission = Admission(max_requests=100, max_tokens=1000)
    for second in range(5):
        admission.enter(100, 0.0)
        admission.leave(100, float(second), served=False)
    assert admission.retry_after_s(1000) == 1.0
    assert (admission.num_requests, admission.num_tokens) == (0, 0)


def test_the_rate_forgets() -> None:
    rate = DrainRate()
    assert rate.tokens_per_s is None
    for second in range(100):
        rate.add(1000, float(second))
    for second in range(100, 200):
        rate.add(10, float(second))
    assert rate.tokens_per_s is not None
    assert abs(rate.tokens_per_s - 10) < 0.1


def overloaded(*, max_wait_s: float, requests: int = 200) -> Admission:
    """Ten requests of 100 tokens leave in a second, and so many stand in the queue since t = 0."""
    admission = Admission(max_requests=10_000, max_tokens=10**9, max_wait_s=max_wait_s, board=Board())
    for _ in range(requests + 100):
        admission.enter(100, 0.0)
    for served in range(100):
        admission.leave(100, 0.1 * (served + 1), served=True)
    return admission


class Clients:
    """Requests of 100 tokens on an engine that begins ten in a second and ends each a second later."""

    def __init__(self, max_wait_s: float = 4.0) -> None:
        self.board = Board()
        self.admission = Admission(max_requests=10_000, max_tokens=10**9, max_wait_s=max_wait_s, board=self.board)
        self.queued, self.running = deque[float](), deque[float]()
        self.refused = self.ended = 0
        self.waits_s: list[float] = []

    def ask(self, now: float) -> None:
        if self.admission.check(1, 100, now) is not None:
            self.refused += 1
            return
        self.admission.reserve([100], now)
        self.admission.enter(100, now)
        self.queued.append(now)
        self._show()

    def serve(self, now: float) -> None:
        """A tenth of a second's work."""
        if self.running and self.running[0] <= now - 1.0:
            self.running.popleft()
            self.admission.ended(now)
            self.ended += 1
            self._show()
        if self.queued:
            self.waits_s.append(now - self.queued.popleft())
            self.running.append(now)
            self.admission.leave(100, now, served=True)

    def _show(self) -> None:
        self.board.set("running", len(self.queued) + len(self.running))


def test_a_standing_queue_that_would_take_too_long_refuses() -> None:
    admission = overloaded(max_wait_s=4.0)
    rejection = admission.check(1, 100, 10.0)
    assert rejection is not None
    assert rejection.reason == "max_queue_wait"
    assert abs(rejection.retry_after_s - 16) <= 2
    for _ in range(170):
        admission.leave(100, 10.0, served=False)
    assert admission.check(1, 100, 10.0) is None


@pytest.mark.parametrize("per_s", [12, 15, 40])
def test_more_than_can_be_served_waits_for_little_more_than_the_bound(per_s: int) -> None:
    clients = Clients()
    for tenth in range(400):
        for i in range(per_s * tenth // 10, per_s * (tenth + 1) // 10):
            clients.ask(i / per_s)
        clients.serve(0.1 * (tenth + 1))
    assert clients.refused > 0.7 * 40 * (per_s - 10) - 60
    assert max(clients.waits_s) < 7.5  # FREE_REQUESTS are 6.4 s here
    assert len(clients.waits_s) > 390  # and the engine had work all the time


@given(number=st.integers(1, 300), pause=st.sampled_from([0.0, 0.01, 0.5]))
@settings(max_examples=20, deadline=None)
def test_a_fixed_number_of_clients_is_never_refused_however_long_they_wait(number: int, pause: float) -> None:
    clients, back = Clients(), deque[float]()
    for i in range(number):
        clients.ask(0.5 * i / number)
    for tenth in range(10, 600):
        now, ended = 0.1 * tenth, clients.ended
        while back and back[0] <= now:
            clients.ask(back.popleft())
        clients.serve(now)
        back.extend(now + pause for _ in range(clients.ended - ended))
    assert clients.refused == 0


def test_a_burst_is_let_in_and_so_are_a_few_with_long_prompts() -> None:
    admission = overloaded(max_wait_s=4.0)
    assert admission.check(1, 100, 0.9) is None
    assert overloaded(max_wait_s=0.0).check(1, 100, 10.0) is None
    assert overloaded(max_wait_s=4.0, requests=50).check(1, 10**6, 10.0) is None


def test_every_reason_is_counted() -> None:
    by_requests, by_tokens = Admission(max_requests=1, max_tokens=1000), Admission(max_requests=9, max_tokens=10)
    by_requests.enter(10, 0.0)
    by_tokens.enter(10, 0.0)
    metrics = Metrics("m", 100)
    by_wait = overloaded(max_wait_s=4.0)
    for admission in (by_requests, by_tokens, by_wait):
        rejection = admission.check(1, 10, 10.0)
        assert rejection is not None
        metrics.rejected(rejection.reason)
        assert f'reason="{rejection.reason}"}} 1.0' in metrics.exposition().decode()


def test_time_without_a_queue_is_not_counted() -> None:
    admission = Admission(max_requests=10_000, max_tokens=10**9, max_wait_s=4.0)
    for hour in range(3):
        for _ in range(100):
            admission.enter(100, 3600.0 * hour)
        for served in range(100):
            admission.leave(100, 3600.0 * hour + 0.01 * served, served=True)
    for _ in range(300):
        admission.enter(100, 20_000.0)
    assert admission.check(1, 100, 20_002.0) is None


def test_a_reservation_counts_until_it_is_taken_or_too_old() -> None:
    admission = Admission(max_requests=2, max_tokens=1000)
    admission.reserve([10, 10], now=0.0)
    assert admission.check(1, 10, 0.0) is not None
    admission.enter(10, 0.0)
    assert admission.check(1, 10, 0.0) is not None
    admission.reserve([], now=RESERVED_S)
    assert admission.check(1, 10, RESERVED_S) is None


def test_processes_count_together(tmp_path: Path) -> None:
    boards = [Board(Cells(num_rows=2, row=row, path=tmp_path / "cells")) for row in (0, 1)]
    one, other = (Admission(max_requests=3, max_tokens=100, board=board) for board in boards)
    one.enter(40, 0.0)
    one.enter(40, 0.0)
    assert other.check(1, 20, 0.0) is None
    assert other.check(2, 10, 0.0) is not None
    assert other.check(1, 21, 0.0) is not None
    for second in (1.0, 2.0):
        one.leave(40, second, served=True)
        one.enter(40, second)
    assert other.tokens_per_s == pytest.approx(40.0)


def test_reservations_that_are_too_old_are_void_also_where_nobody_else_gets_in() -> None:
    """Their clients were gone at once."""
    board = Board()
    admission = Admission(max_requests=2, max_tokens=1000, board=board)
    admission.reserve([10, 10], 0.0)
    assert admission.check(1, 10, RESERVED_S / 2) is not None
    assert admission.check(1, 10, RESERVED_S) is None
    assert board.total("queued_requests") == board.total("queued_tokens") == 0


def test_an_overload_that_is_over_is_not_held_against_the_next() -> None:
    """Clients who come as others leave are let in, whoever was turned away a minute before."""
    board = Board()
    admission = Admission(max_requests=10_000, max_tokens=10**9, max_wait_s=4.0, board=board)
    for start_s in (0.0, 60.0):
        for _ in range(300):
            admission.enter(100, start_s)
        board.set("running", 300)
        for served in range(100):
            admission.leave(100, start_s + 0.1 * (served + 1), served=True)
        now = start_s + 10.0
        admission.ended(now)
        board.set("running", 299)
        assert admission.check(1, 100, now) is None, f"as another leaves, at {now}"
        board.set("running", 300)
        assert [admission.check(1, 100, now) is None for _ in range(50)] == [False] * 50
        for _ in range(200):
            admission.leave(100, now, served=False)
        board.set("running", 0)
        assert admission.check(1, 100, now + 1.0) is None
