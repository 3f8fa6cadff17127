from __future__ import annotations

from mainsail_engine.server.admission import MAX_RETRY_S, Admission, DrainRate


def test_an_empty_queue_takes_any_prompt() -> None:
    assert Admission(max_requests=1, max_tokens=10).check(5, 1000) is None


def test_bounded_by_requests() -> None:
    admission = Admission(max_requests=2, max_tokens=1000)
    admission.enter(10)
    assert admission.check(1, 10) is None
    admission.enter(10)
    rejection = admission.check(1, 10)
    assert rejection is not None
    assert rejection.reason == "max_num_queued_reqs"
    admission.leave(10, 1.0, served=False)
    assert admission.check(1, 10) is None


def test_bounded_by_tokens() -> None:
    admission = Admission(max_requests=100, max_tokens=100)
    admission.enter(90)
    assert admission.check(1, 10) is None
    rejection = admission.check(1, 11)
    assert rejection is not None
    assert rejection.reason == "max_num_queued_tokens"


def test_retry_after_follows_the_measured_rate() -> None:
    admission = Admission(max_requests=100, max_tokens=1000)
    for second in range(6):
        admission.enter(100)
        admission.leave(100, float(second), served=True)
    admission.enter(1000)
    rejection = admission.check(1, 500)
    assert rejection is not None
    assert rejection.retry_after_s == 5.0
    assert admission.retry_after_s(1e9) == MAX_RETRY_S
    assert admission.retry_after_s(1) == 1.0


def test_giving_up_says_nothing_about_the_rate() -> None:
    admission = Admission(max_requests=100, max_tokens=1000)
    for second in range(5):
        admission.enter(100)
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
