"""Which sessions' KV stays on the device between their turns: the policy of sessions.py, carried out on the KV cache.

    turn ends ──▶ kept, for its time to live ──▶ let go: goes to the host as room is needed ──▶ fetched ahead of return
                     │                              ▲
                     └── displaced: a senior's turn or a running request needs the room ──┘

Sessions are served as they came: a turn may displace what is kept for *juniors* (sessions that began later, or of lower
priority), never for seniors. So when live sessions want more than the pool, the first ones run warm, turn after turn,
and the youngest have their turns held at the start; running requests are never cut for it. A new session must also
leave room for what the kept ones will add in their next turns. Whoever has waited too long displaces anybody, so that
none is starved: the less room it wants, the sooner (MAX_HOLD_S for a twentieth of the pool, a quarter of that for half
as much), so a small request beside large sessions waits for a moment at most.

A session that should have been back by now, as all others were, is taken for ended: what only it had is the first to
make room, and does not push out of host memory what is expected back.

Accounting is the block pool's own: a block that several sessions share is kept once, and what is on the host counts
there. All of it is about idle blocks; with nothing kept, the scheduler does what it does without sessions.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from heapq import heappop, heappush

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.kv.cache import KVCache
from mainsail_engine.kv.prefix_tree import Node
from mainsail_engine.request import Request
from mainsail_engine.sessions import Forecast, Session, SessionState, SessionTable

MAX_HOLD_S = 60.0
"""A turn that was held so long may displace everybody's kept KV …"""
LARGE = 0.05
"""… if it wants this share of the pool or more; else sooner, by the square of what it wants."""
REVISIT_S = 30.0
"""How long a session that was fetched ahead is kept at most."""
SMOOTHING = 0.1
"""Weight of the newest measurement in the times that bringing back a block takes."""
FIRST_BLOCK_S = 1e-3
"""What a block takes to compute again, before it was measured."""

Seniority = tuple[int, int]
"""(-priority, order of arrival): smaller is senior."""


@dataclass(slots=True, eq=False)
class Kept:
    """A session between turns, and its KV."""

    session: Session
    seniority: Seniority
    leaf: Node
    forecast: Forecast
    num_blocks: int = 0
    """Kept for it alone when its turn ended."""
    growth_blocks: int = 0
    is_kept: bool = False
    is_parked: bool = False
    """Expected back, though not kept (any more)."""


class Residency:
    def __init__(self, kv: KVCache) -> None:
        self._kv = kv
        self._table = SessionTable()
        self._between: dict[Session, Kept] = {}
        """Sessions between turns, of which something may be cached."""
        self._kept: list[tuple[Seniority, Kept]] = []
        """Those kept on the device, seniors first."""
        self._expiry: list[tuple[float, int, Kept]] = []
        """Heap of (end of the time to live, serial, kept)."""
        self._fetches: list[tuple[float, int, Kept]] = []
        """Heap of (when to be back, serial, kept)."""
        self._serial = 0
        self._reserved_blocks = 0
        self.num_parked = self._parked_blocks = 0
        self._compute_s: float | None = None
        self._load_s: float | None = None
        """Measured seconds to compute and to load a block; None: not yet."""
        kv.let_one_go = self._displace_youngest

    # -- turns come and go ---------------------------------------------------------------------------------------

    def arrive(self, request: Request, now: float) -> None:
        """A new request: find its session, and its place in the queue behind those who were here before."""
        request.session = session = self._table.arrive(
            request.prompt_token_ids,
            salt=request.cache_salt,
            session_id=request.session_id,
            arrival=request.arrival_index,
            now=now,
        )
        request.arrival_index = (session.arrival << 40) + request.arrival_index

    def started(self, request: Request) -> None:
        """Its turn runs and owns what it matched: no need to keep it."""
        kept = self._between.pop(request.session, None) if request.session is not None else None
        if kept is not None:
            self._unpark(kept)
            self._let_go(kept)

    def finished(self, request: Request, leaf: Node | None, now: float) -> None:
        """Its turn is over, and its KV ends at this node of the tree."""
        session = request.session
        if session is None:
            return
        self._table.finished(session, request.num_tokens, now)
        if leaf is None:
            return
        forecast = self._table.forecast(session, self._threshold())
        if not forecast.keep_s and forecast.fetch_s is None:
            return
        growth = -(-int(session.growth) // BLOCK_SIZE)
        kept = Kept(session, self._seniority(request), leaf, forecast, growth_blocks=growth)
        self._between[session] = kept
        if forecast.keep_s > 0:
            self._keep(kept)
            self._push(self._expiry, now + forecast.keep_s, kept)
        else:
            self._park(kept)

    def abandoned(self, request: Request) -> None:
        """The client went away before its turn began, or it failed: nobody is expected back."""
        session = request.session
        if session is not None:
            self.started(request)
            self._table.forget(session)

    def _seniority(self, request: Request) -> Seniority:
        return -request.priority, request.session.arrival if request.session is not None else request.arrival_index

    # -- room ----------------------------------------------------------------------------------------------------

    def room_for(self, request: Request) -> int:
        """Blocks that this request may take without anybody's kept ones, less what those will grow by."""
        room = self._kv.pool.num_unkept
        kept = self._between.get(request.session) if request.session is not None else None
        if kept is not None and kept.is_kept:
            return room
        return room - (self._reserved_blocks if self._kept else 0)

    def is_overdue(self, request: Request, wanted: int, now: float) -> bool:
        """Whether it was held long enough for the blocks that it wants."""
        share = wanted / (LARGE * self._kv.pool.num_blocks)
        return now - request.arrival_time_s >= MAX_HOLD_S * min(1.0, share * share)

    def displace(self, request: Request, num_blocks: int, *, overdue: bool) -> bool:
        """Let go of juniors' blocks, youngest first, until num_blocks more are available. False: there are too few.

        The request's own session and, unless it is overdue, its seniors are left alone.
        """
        seniority = self._seniority(request)
        floor = 0 if overdue else bisect_left(self._kept, (seniority,))
        own = self._between.get(request.session) if request.session is not None else None
        juniors = [kept for _, kept in self._kept[floor:] if kept is not own]
        if floor and sum(kept.num_blocks for kept in juniors) < num_blocks:
            return False
        wanted = self._kv.pool.num_kept - num_blocks
        while self._kv.pool.num_kept > wanted and juniors:
            self._park(juniors.pop())
        return self._kv.pool.num_kept <= wanted

    def _displace_youngest(self) -> bool:
        """Running requests need room: one session's kept blocks, the youngest's."""
        if not self._kept:
            return False
        self._park(self._kept[-1][1])
        return True

    def _keep(self, kept: Kept) -> None:
        kept.num_blocks = self._kv.tree.keep(kept.leaf)
        kept.is_kept = True
        insort(self._kept, (kept.seniority, kept), key=lambda entry: entry[0])
        self._reserved_blocks += kept.growth_blocks

    def _let_go(self, kept: Kept) -> None:
        if not kept.is_kept:
            return
        kept.is_kept = False
        at = bisect_left(self._kept, kept.seniority, key=lambda entry: entry[0])
        while self._kept[at][1] is not kept:
            at += 1
        del self._kept[at]
        self._reserved_blocks -= kept.growth_blocks
        self._kv.tree.let_go(kept.leaf)

    def _park(self, kept: Kept) -> None:
        """Its room may be had from now on; what is evicted goes to the host."""
        self._let_go(kept)
        kept.is_parked = True
        self.num_parked += 1
        self._parked_blocks += kept.num_blocks
        if kept.forecast.fetch_s is not None:
            self._push(self._fetches, kept.session.finished_s + kept.forecast.fetch_s, kept)

    def _unpark(self, kept: Kept) -> None:
        if kept.is_parked:
            kept.is_parked = False
            self.num_parked -= 1
            self._parked_blocks -= kept.num_blocks

    def _push(self, heap: list[tuple[float, int, Kept]], when: float, kept: Kept) -> None:
        self._serial += 1
        heappush(heap, (when, self._serial, kept))

    # -- time passes ---------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Let go of those whose time to live is over, and forget those who are not expected any more."""
        while self._expiry and self._expiry[0][0] <= now:
            kept = heappop(self._expiry)[2]
            if kept.is_kept and kept.session.state is SessionState.ACTING:
                self._park(kept)
                if kept.forecast.is_last:
                    self._kv.tree.demote(kept.leaf)
        for session in self._table.advance(now):
            kept = self._between.pop(session, None)
            if kept is not None:
                self._unpark(kept)
                self._let_go(kept)

    def next_fetch_s(self) -> float | None:
        """When `fetch_ahead` has something to do at the earliest. None: never, as things stand."""
        return self._fetches[0][0] if self._fetches else None

    def fetch_ahead(self, now: float, spare_blocks: int) -> None:
        """Bring back whose return is near, as far as that takes no room that anybody uses."""
        while self._fetches and self._fetches[0][0] <= now and not self._kv.host.is_loading:
            kept = heappop(self._fetches)[2]
            waits = kept.session.state is SessionState.ACTING and self._between.get(kept.session) is kept
            wanted = self._kv.blocks_on_host(kept.leaf) if waits and not kept.is_kept else 0
            if 0 < wanted <= spare_blocks and self._kv.fetch(kept.leaf):
                spare_blocks -= wanted
                self._unpark(kept)
                self._keep(kept)
                self._push(self._expiry, now + REVISIT_S, kept)

    # -- measurements and gauges ---------------------------------------------------------------------------------

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step of mostly prefill took so long."""
        self._compute_s = _smoothed(self._compute_s, seconds * BLOCK_SIZE / num_tokens)

    def loaded(self, num_blocks: int, seconds: float) -> None:
        """So many blocks came from the host in so long."""
        self._load_s = _smoothed(self._load_s, seconds / num_blocks)

    def _threshold(self) -> float:
        """Returns per second that make keeping pay: one over the time to bring back a whole pool."""
        block_s = FIRST_BLOCK_S if self._compute_s is None else self._compute_s
        if self._load_s is not None:
            block_s = min(block_s, self._load_s)
        return 1 / (self._kv.pool.num_blocks * max(block_s, 1e-9))

    @property
    def reserved_blocks(self) -> int:
        """What the kept sessions will add in their next turns."""
        return self._reserved_blocks

    @property
    def num_acting(self) -> int:
        """Sessions between turns whose KV is kept on the device."""
        return len(self._kept)

    @property
    def parked_blocks(self) -> int:
        """What parked sessions had for themselves when their turns ended."""
        return self._parked_blocks

    def check_integrity(self) -> None:
        """Recount what is kept. Raises RuntimeError."""
        kept = [each for each in self._between.values() if each.is_kept]
        if len(kept) != len(self._kept) or self._kept != sorted(self._kept, key=lambda entry: entry[0]):
            raise RuntimeError("the list of kept sessions is not that of the sessions which are kept")
        if self._reserved_blocks != sum(each.growth_blocks for each in kept):
            raise RuntimeError("the blocks reserved for growth are miscounted")
        parked = [each for each in self._between.values() if each.is_parked]
        if (self.num_parked, self._parked_blocks) != (len(parked), sum(each.num_blocks for each in parked)):
            raise RuntimeError("parked sessions are miscounted")
        counts: dict[Node, int] = {}
        for each in kept:
            node = each.leaf
            while node.parent is not None:
                counts[node] = counts.get(node, 0) + 1
                node = node.parent
        if any(node.kept != count for node, count in counts.items()):
            raise RuntimeError("a node is not kept as often as sessions keep it")
        blocks = sum(node.block >= 0 for node in counts)
        if blocks != sum(self._kv.pool.kept):
            raise RuntimeError(f"{blocks} blocks are kept for sessions, the pool counts {sum(self._kv.pool.kept)}")


def _smoothed(average: float | None, value: float) -> float:
    return value if average is None else average + SMOOTHING * (value - average)
