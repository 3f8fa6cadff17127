"""Who is next: priorities first, then fairness between users, then first come, first served.

    priority 5   user a: r7
    priority 0   user a: r1 r4 r9      served 4,200
                 user b: r8            served   310   ◀ next of its priority

Every user has an account of what was computed for them: prompt tokens (those not cached) and, twice as dear, generated
ones. Among users who wait, the one served least goes first, so a user with a thousand requests delays one with a single
request by at most about one request. Who comes back after a pause starts level with the least served of those present:
idle time cannot be saved up. A preempted request keeps its place by arrival.

The idea: virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", 2024).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from mainsail_engine.request import Request

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2
"""A generated token costs about as much as several prompt tokens of a batch; 2 as in the paper."""


class Account:
    """What one user got, and how many of their requests are here."""

    __slots__ = ("num_requests", "served")

    def __init__(self) -> None:
        self.served = 0
        self.num_requests = 0


def _arrival(request: Request) -> int:
    return request.arrival_index


class WaitingQueue:
    """Requests that wait, and the accounts of all users who have requests here, waiting or running."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[int, str], list[Request]] = {}
        """(-priority, user) → requests by arrival; never empty."""
        self._accounts: dict[str, Account] = {}
        self._size = 0
        self.num_prompt_tokens = 0
        """Of all that wait, cached or not."""

    def __len__(self) -> int:
        return self._size

    def join(self, request: Request) -> Account:
        """A new request of this user is here, and waits. Returns the account to charge."""
        account = self._accounts.get(request.user)
        if account is None:
            account = Account()
            account.served = min((a.served for a in self._accounts.values()), default=0)
            self._accounts[request.user] = account
        account.num_requests += 1
        self.push(request)
        return account

    def leave(self, request: Request) -> None:
        """The request is finished: its user is gone with the last one."""
        account = self._accounts[request.user]
        account.num_requests -= 1
        if account.num_requests == 0:
            del self._accounts[request.user]

    def push(self, request: Request) -> None:
        insort(self._lanes.setdefault((-request.priority, request.user), []), request, key=_arrival)
        self._size += 1
        self.num_prompt_tokens += len(request.prompt_token_ids)

    def remove(self, request: Request) -> None:
        key = (-request.priority, request.user)
        lane = self._lanes[key]
        del lane[bisect_left(lane, request.arrival_index, key=_arrival)]
        self._size -= 1
        self.num_prompt_tokens -= len(request.prompt_token_ids)
        if not lane:
            del self._lanes[key]

    def order(self, request: Request) -> tuple[int, int, int]:
        """Smaller goes first."""
        return -request.priority, self._accounts[request.user].served, request.arrival_index

    def in_order(self) -> Iterator[Request]:
        """Waiting requests, the next one first; charges made on the way count. Do not push meanwhile."""
        lanes = [list(lane) for lane in self._lanes.values()]
        heads = [(self.order(lane[0]), index, 0) for index, lane in enumerate(lanes)]
        heapify(heads)
        while heads:
            order, index, position = heappop(heads)
            current = self.order(lanes[index][position])
            if current > order:
                heappush(heads, (current, index, position))
                continue
            if position + 1 < len(lanes[index]):
                heappush(heads, (self.order(lanes[index][position + 1]), index, position + 1))
            yield lanes[index][position]
