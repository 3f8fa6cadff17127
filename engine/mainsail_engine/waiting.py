"""Who is next: priority, then fairness between users, then turns that are on time, then first come, first served.

    priority 5   user a: r7
    priority 0   user a: r1 r4 r9      served 4,200
                 user b: r8            served   310   ◀ next of its priority

Every user has an account of what was computed for them: prompt tokens (those not cached) and, twice as dear, generated
ones. Among users who wait, the one served least goes first, so a user with a thousand requests delays one with a single
request by at most about one request. Who comes back after a pause starts level with the least served of those present:
idle time cannot be saved up.

Among one user's requests, first come is first served by the arrival of their sessions, with an exception: a session's
next turn that has waited for less than TURN_S goes before, and among those the one that has waited longest. So where
sessions ask for more than there is, those that run are served in turn, each soon, and those for whom that is too late
wait until there is room for more. (By the age of sessions alone, the oldest are served at once and many of the
youngest wait for minutes; by the age of turns alone all come late together, and where memory is short push one
another's KV out.) Nobody waits behind others for ever: who was preempted, or has waited for MAX_WAIT_S, is first.

The idea: virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", 2024).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from mainsail_engine.request import Place, Request

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2
"""A generated token costs about as much as several prompt tokens of a batch; 2 as in the paper."""
TURN_S = 6.5
"""A session's next turn is on time for so long."""
MAX_WAIT_S = 60.0
"""Who has waited for so long goes first."""
FIRST, TURN, OTHERS = range(3)
NOWHERE: Place = (-1, 0.0, 0)

Order = tuple[int, int, Place]


class Account:
    """What one user got, and how many of their requests are here."""

    __slots__ = ("num_requests", "served")

    def __init__(self) -> None:
        self.served = 0
        self.num_requests = 0


def _place(request: Request) -> Place:
    return request.place


def place_of(request: Request, now: float) -> Place:
    """Within its user's lane."""
    arrived_s = request.arrival_time_s
    if request.num_preemptions or now >= arrived_s + MAX_WAIT_S:
        return FIRST, 0.0, request.arrival_index
    if request.session is not None and not request.session.is_new and now < arrived_s + TURN_S:
        return TURN, arrived_s, request.arrival_index
    return OTHERS, 0.0, request.arrival_index


class WaitingQueue:
    """Requests that wait, and the accounts of all users who have requests here, waiting or running."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[int, str], list[Request]] = {}
        """(-priority, user) → requests by their places; never empty."""
        self._accounts: dict[str, Account] = {}
        self._size = 0
        self._changes: list[tuple[float, int, Request]] = []
        """Heap of (when its place changes, arrival, request); who left the queue is dropped when it comes up."""
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
        """It waits from now on: new, or preempted."""
        self._put(request, request.arrival_time_s)
        self._size += 1
        self.num_prompt_tokens += len(request.prompt_token_ids)

    def _put(self, request: Request, now: float) -> None:
        request.place = place_of(request, now)
        insort(self._lanes.setdefault((-request.priority, request.user), []), request, key=_place)
        if request.place[0] == FIRST:
            return
        lasts_s = TURN_S if request.place[0] == TURN else MAX_WAIT_S
        heappush(self._changes, (request.arrival_time_s + lasts_s, request.arrival_index, request))
        if len(self._changes) > 2 * self._size + 64:
            self._changes = [change for change in self._changes if change[2].place[0] > FIRST]
            heapify(self._changes)

    def advance(self, now: float) -> bool:
        """Give those a new place for whom the time has come. Returns whether there were any."""
        moved = False
        while self._changes and self._changes[0][0] <= now:
            request = heappop(self._changes)[2]
            if request.place[0] > FIRST:
                self._take(request)
                self._put(request, now)
                moved = True
        return moved

    def remove(self, request: Request) -> None:
        self._take(request)
        request.place = NOWHERE
        self._size -= 1
        self.num_prompt_tokens -= len(request.prompt_token_ids)

    def _take(self, request: Request) -> None:
        key = (-request.priority, request.user)
        lane = self._lanes[key]
        del lane[bisect_left(lane, request.place, key=_place)]
        if not lane:
            del self._lanes[key]

    def order(self, request: Request) -> Order:
        """Smaller goes first."""
        return -request.priority, self._accounts[request.user].served, request.place

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
