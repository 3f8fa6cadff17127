"""Which endpoint gets a request: the one with the least token-weighted work in flight (pure).

`Load` is what the gateway itself knows of each endpoint: the weight (expected tokens) of what is in flight there, and of all
that ever went there. The second breaks ties, so that a slow trickle of requests is spread evenly instead of always
meeting the first of equals.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from mainsail_gateway.routes import Endpoint


@dataclass(slots=True)
class Load:
    """Weights by endpoint; only `started` and `ended` change them."""

    in_flight: dict[Endpoint, int] = field(default_factory=dict[Endpoint, int])
    total: dict[Endpoint, int] = field(default_factory=dict[Endpoint, int])

    def started(self, endpoint: Endpoint, weight: int) -> None:
        self.in_flight[endpoint] = self.in_flight.get(endpoint, 0) + weight
        self.total[endpoint] = self.total.get(endpoint, 0) + weight

    def ended(self, endpoint: Endpoint, weight: int) -> None:
        left = self.in_flight.get(endpoint, 0) - weight
        if left > 0:
            self.in_flight[endpoint] = left
        else:
            self.in_flight.pop(endpoint, None)

    def forget(self, alive: Collection[Endpoint]) -> None:
        """Drop the totals of endpoints that are gone; what is in flight ends by itself."""
        self.total = {endpoint: weight for endpoint, weight in self.total.items() if endpoint in alive}


def pick(endpoints: Iterable[Endpoint], load: Load, tried: Collection[Endpoint] = ()) -> Endpoint | None:
    """The least loaded endpoint that was not tried yet; None when there is none.

    A newcomer starts with the smallest total of its peers, not with zero: it must not be given every request until it
    has caught up with what the others did in a month.
    """
    left = [endpoint for endpoint in endpoints if endpoint not in tried]
    if not left:
        return None
    known = [load.total[endpoint] for endpoint in left if endpoint in load.total]
    floor = min(known, default=0)
    return min(left, key=lambda e: (load.in_flight.get(e, 0), load.total.get(e, floor), e))
