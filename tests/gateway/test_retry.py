from hypothesis import given
from hypothesis import strategies as st

from mainsail_gateway import retry
from mainsail_gateway.retry import RetryBudget


@given(st.integers(0, 3000), st.floats(0, 30))
def test_retries_stay_a_tenth_of_the_load_and_a_floor(requests, seconds):
    budget = RetryBudget(balance=0.0, at=0.0)
    granted = 0
    for n in range(requests):
        budget.deposit()
        granted += budget.withdraw(seconds * (n + 1) / requests)
    assert granted <= requests * retry.RATIO + seconds * retry.FLOOR_PER_S + 1e-6


def test_an_empty_budget_fills_with_time():
    budget = RetryBudget(balance=0.0, at=10.0)
    assert not budget.withdraw(10.1)
    assert budget.withdraw(11.0)
