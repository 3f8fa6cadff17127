"""Whether a request may be tried once more. Pure.

Retries save requests when one replica fails and bury a fleet when all are overloaded, so they are paid from a budget
that ordinary requests fill: a tenth of a retry each, and a few a second for services with little traffic (Finagle's
and Linkerd's retry budget). What cannot add load is free: a connection that was refused, or found dead on reuse.

Fail-overs of streams that had begun have a budget of their own: when an engine with many streams breaks, all of them
are to go on, and the load that they bring to the others is load that the engine has lost. So each stream that begins
pays for one; what the budget bounds is a fleet that breaks faster than it begins answers. Requests that one engine lost
before it had answered may draw on it too, while most of the others work (`Pool.sound`).
"""

from dataclasses import dataclass

RATIO = 0.1
FLOOR_PER_S = 3.0
MOST = 100.0


@dataclass(slots=True)
class RetryBudget:
    balance: float = 10.0
    ratio: float = RATIO
    most: float = MOST
    at: float | None = None
    """When the floor was last added; None: never yet."""

    def deposit(self) -> None:
        """An ordinary request came."""
        self.balance = min(self.most, self.balance + self.ratio)

    def withdraw(self, now: float) -> bool:
        """Pay for a retry; False when the budget is spent."""
        since = now if self.at is None else self.at
        self.balance = min(self.most, self.balance + max(0.0, now - since) * FLOOR_PER_S)
        self.at = now
        if self.balance < 1.0:
            return False
        self.balance -= 1.0
        return True


def failover_budget() -> RetryBudget:
    """For streams that break after they have begun."""
    return RetryBudget(balance=100.0, ratio=1.0, most=1000.0)
