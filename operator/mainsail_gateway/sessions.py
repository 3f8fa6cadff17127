"""Conversations over all replicas of a service: whose turn goes on now, and whose is held at its start. Pure.

An agent's conversation is a chain of requests, each repeating the last one's prompt. Its KV is worth its room while the
next turn is near; when all live conversations of a service want more KV than its replicas' pools have, serving every
turn at once makes each evict the others, and every turn pays its whole prompt again. So here the conversation is the
unit, as in the engine (whose sessions.py does the same for one replica)::

    first turn ──let in──▶ turn ──ends──▶ live ──returns──▶ turn ──▶ live …
                  ▲                        │ displaced (its replica's pool is full: parked), or away too long
                  └── held ◀──returns── paused

*Identity.* No client has to name its conversation: a request that begins with all messages of an earlier one is its
next turn (a chain of hashes over the messages). A name, where there is one, counts instead.

*Room.* A conversation that is live at a replica goes on there at once, and so does one of which a replica says that it
has nearly all. Any other needs room: a replica's pool, less what is live there. What tools and system prompt
conversations share counts once a replica. The sizes are the gateway's own estimates, and what engines say of themselves
if that is more: so a gateway that sees only a part of the traffic is bounded by what is there, without talking to other
gateways. No replica idles for it: one that has next to nothing to compute takes a turn that there is no room for, since
then the prompt costs nobody anything. A paused conversation waits for its own replica, where some of it may be left.

*Order.* Higher priorities first; then paused conversations, by the time of their first turn, as the engine orders them;
then new ones. Who fits may go before one who does not, but who was held for `MAX_HOLD_S` goes wherever there is
most room: none is starved. Running turns are never cut. When turns let a replica's live conversations outgrow its pool,
the youngest of those between turns are paused.

After ThunderAgent (arXiv 2602.13692: whole turns are held, paused ones first) and Continuum (arXiv 2511.02230: time to
live by the distribution of tools' times). Measured: benchmarks/gateway_balance.py. The clock is an argument.
"""

from __future__ import annotations

import enum
import itertools
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from types import MappingProxyType
from typing import NamedTuple

from mainsail_gateway.balance import FRESH_S, Load, Prefix, backlog
from mainsail_gateway.request import Chain

FULL = 0.95
"""Share of a pool that may be live before a turn is held …"""
CALM = 0.85
"""… and down to which conversations are paused once all of it is."""
IDLE = 1 / 64
"""A replica is idle that has fewer tokens to compute than this share of its pool: about one step."""
WARM = 0.8
"""A replica that has this share of a prompt is where it belongs, room or not."""
LOOKED_UP = 8
"""Of those held, the first so many are looked up for what is cached of them: it takes time, at the end of each turn."""
MAX_HOLD_S = 20.0
"""Who was held so long is let in wherever there is most room."""
LEAST_TOKENS = 256
"""A prompt shorter than this has nothing to lose: it is never held."""
FIRST_LIVE_S, LEAST_LIVE_S, MOST_LIVE_S = 10.0, 2.0, 30.0
"""How long a conversation is live after a turn: before pauses were seen, at least, and at most."""
RETURNED = 0.95
"""It is live for one and a half times as long as this part of all pauses took."""
PARKED_S = 120.0
"""A conversation that was displaced is expected back for this long."""
MANY_PAUSES = 512
MAX_SESSIONS = 20_000
"""Conversations remembered; beyond that, the one heard of longest ago is forgotten."""
FIRST_GROWTH = 512
"""Tokens that a turn is taken to add, before one was seen."""

Known = Mapping[str, int]
"""By endpoint: how many tokens of a prompt it says it has cached."""
NOTHING: Known = MappingProxyType({})


class State(enum.Enum):
    NEW = enum.auto()
    TURN = enum.auto()
    """A turn of it runs."""
    LIVE = enum.auto()
    """Between turns; its KV is counted at its home."""
    PAUSED = enum.auto()
    """Its KV is counted nowhere: its next turn needs room."""


@dataclass(slots=True, eq=False)
class Session:
    arrival: int
    """Order of first turns."""
    key: bytes = b""
    state: State = State.NEW
    home: str = ""
    """The endpoint of its last turn."""
    tokens: int = 0
    """Of its last prompt, and the answer to it once that has ended."""
    growth: float = 0.0
    """Tokens that a turn adds, on a fading average."""
    shared: bytes = b""
    shared_tokens: int = 0
    counted: tuple[int, bytes] | None = None
    """What it counts at its home for itself, and what it shares there; None: nothing."""
    finished: float | None = None
    """When its last turn ended."""
    held_since: float | None = None
    order: tuple[int, bool, int] = (0, True, 0)
    prefixes: tuple[Prefix, ...] = ()
    """By which the balancer knows its present prompt."""

    @property
    def wanted(self) -> int:
        """Tokens of KV that its next turn wants for itself."""
        return max(1, self.tokens - self.shared_tokens) + int(self.growth or FIRST_GROWTH)


@dataclass(slots=True)
class _Home:
    """What is live at one endpoint."""

    tokens: int = 0
    shared: dict[bytes, tuple[int, int]] = field(default_factory=dict[bytes, tuple[int, int]])
    """Hash → how many have it, and its tokens."""
    sessions: OrderedDict[Session, None] = field(default_factory=OrderedDict["Session", None])
    told: tuple[float, int] = (0.0, 0)
    """When the engine last said what it has, and what was live here by our own count then."""


class Pauses:
    """How long conversations stay away between turns: what decides how long they are live."""

    def __init__(self) -> None:
        self._seen: list[float] = []
        self.live_s = FIRST_LIVE_S

    def add(self, pause_s: float) -> None:
        self._seen.append(pause_s)
        if len(self._seen) >= MANY_PAUSES:
            self._seen = self._seen[MANY_PAUSES // 2 :]
        if len(self._seen) % 16 == 0:
            usual = sorted(self._seen)[int(RETURNED * (len(self._seen) - 1))]
            self.live_s = min(MOST_LIVE_S, max(LEAST_LIVE_S, 1.5 * usual))


def is_idle(load: Load, now: float) -> bool:
    """Whether a prompt would cost nobody anything there."""
    return backlog(load, now) < IDLE * load.kv_tokens


class Place(NamedTuple):
    """An endpoint, as those who are held see it."""

    key: str
    room: float
    """Tokens of KV that may still be taken there; endless where it is idle."""


class Sessions:
    """One service's conversations, and those of them that are held."""

    def __init__(self) -> None:
        self.held: list[Session] = []
        """In the order in which they will be let in."""
        self._since: dict[Session, None] = {}
        """The same, who was held first first."""
        self._pauses = Pauses()
        self._by_key: OrderedDict[bytes, Session] = OrderedDict()
        self._homes: dict[str, _Home] = {}
        self._parked: OrderedDict[Session, None] = OrderedDict()
        self._arrivals = itertools.count()
        self._expiry: list[tuple[float, int, Session]] = []
        self._serial = itertools.count()
        self._num_measured = 0
        self._scale = 1.0
        """Tokens that prompts turned out to have, to what they were taken to have."""

    # -- who it is ---------------------------------------------------------------------------------------------------

    def arrive(self, chain: Chain, now: float) -> Session:
        """The conversation whose next turn this is; a new one if there is none, or if its turn runs already."""
        found = next((s for key in reversed(chain.keys) if (s := self._by_key.get(key)) is not None), None)
        if found is None or found.state is State.TURN or found.held_since is not None:
            found = Session(next(self._arrivals))
        elif found.finished is not None:
            self._pauses.add(now - found.finished)
        tokens = int(chain.tokens * self._scale)
        if found.tokens:
            grown = max(0, tokens - found.tokens)
            found.growth = (found.growth + grown) / 2 if found.growth else grown
        found.shared, found.shared_tokens = chain.shared, min(int(chain.shared_tokens * self._scale), tokens)
        found.tokens = tokens
        self._remember(found, chain.keys[-1])
        return found

    def _remember(self, session: Session, key: bytes) -> None:
        if self._by_key.get(session.key) is session:
            del self._by_key[session.key]
        session.key = key
        self._by_key[key] = session
        self._by_key.move_to_end(key)
        if len(self._by_key) > MAX_SESSIONS:
            _, old = self._by_key.popitem(last=False)
            if old.state is State.LIVE:
                self._pause(old)

    # -- room --------------------------------------------------------------------------------------------------------

    def live(self, load: Load, now: float) -> int:
        """Tokens of KV that are wanted at an endpoint now, by what is known here and what its engine says."""
        home = self._homes.get(load.key)
        if home is None:
            return load.resident if now - load.observed < FRESH_S else 0
        if now - load.observed >= FRESH_S:
            return home.tokens
        if home.told[0] != load.observed:
            home.told = load.observed, home.tokens
        return max(home.tokens, load.resident + home.tokens - home.told[1])

    def room(self, load: Load, now: float) -> float:
        """Tokens of KV that may still be taken there."""
        return FULL * load.kv_tokens - self.live(load, now)

    def fits(
        self, session: Session, loads: Collection[Load], now: float, known: Known = NOTHING
    ) -> frozenset[str] | None:
        """Where the session's turn may go now; None: anywhere. Empty: it has to be held."""
        if session.tokens < LEAST_TOKENS or not all(load.kv_tokens for load in loads):
            return None
        home = next((load for load in loads if load.key == session.home), None)
        if home is not None and session.state is State.LIVE:
            return frozenset((home.key,))
        if warm := self._warm(session, known, {load.key for load in loads}):
            return warm
        places = loads if home is None else (home,)
        return frozenset(load.key for load in places if self._takes(load, session, now))

    def _takes(self, load: Load, session: Session, now: float) -> bool:
        return is_idle(load, now) or self.room(load, now) >= self._lacks(load.key, session)

    def _warm(self, session: Session, known: Known, places: Collection[str]) -> frozenset[str]:
        """Where nearly all of its prompt is."""
        return frozenset(key for key, tokens in known.items() if tokens >= WARM * session.tokens and key in places)

    def _lacks(self, endpoint: str, session: Session) -> int:
        """Tokens of KV that its next turn wants there, besides what others share with it."""
        home = self._homes.get(endpoint)
        shares = home is not None and session.shared in home.shared
        return session.wanted + (0 if shares else session.shared_tokens)

    # -- its turns ---------------------------------------------------------------------------------------------------

    def begin(self, session: Session, endpoint: str) -> None:
        """Its turn goes to that endpoint, or on there."""
        self.leave(session)
        self._parked.pop(session, None)
        self._release(session)
        session.state, session.home = State.TURN, endpoint
        self._count(session, session.wanted)

    def measured(self, session: Session, tokens: int, estimate: int) -> None:
        """An engine says how many tokens the prompt has that was taken to have `estimate`."""
        ratio = min(4.0, max(0.25, tokens / max(1, estimate)))
        self._num_measured += 1
        self._scale += max(0.1, 1 / self._num_measured) * (ratio - self._scale)
        if session.state is State.TURN:
            self._release(session)
            session.tokens, session.shared_tokens = tokens, min(session.shared_tokens, tokens)
            self._count(session, session.wanted)

    def end(self, session: Session, answer_tokens: int, now: float) -> None:
        """Its turn is over, after an answer of so many tokens."""
        if session.state is not State.TURN:
            return
        self._release(session)
        session.tokens += answer_tokens
        session.finished, session.state = now, State.LIVE
        self._count(session, max(1, session.tokens - session.shared_tokens))
        heappush(self._expiry, (now + self._pauses.live_s, next(self._serial), session))

    def _count(self, session: Session, tokens: int) -> None:
        home = self._homes.setdefault(session.home, _Home())
        count, size = home.shared.get(session.shared, (0, session.shared_tokens))
        home.shared[session.shared] = count + 1, size
        home.tokens += tokens + (0 if count else size)
        home.sessions[session] = None
        session.counted = tokens, session.shared

    def _release(self, session: Session) -> None:
        home = self._homes.get(session.home)
        if home is None or session.counted is None:
            return
        tokens, shared = session.counted
        session.counted = None
        del home.sessions[session]
        count, size = home.shared.pop(shared)
        home.tokens -= tokens + (size if count == 1 else 0)
        if count > 1:
            home.shared[shared] = count - 1, size

    def _pause(self, session: Session) -> None:
        self._release(session)
        session.state = State.PAUSED

    # -- time passes -------------------------------------------------------------------------------------------------

    def advance(self, loads: Mapping[str, Load], now: float) -> None:
        """Pause who has been away too long, whose endpoint is gone, and the youngest where the live outgrow a pool."""
        while self._expiry and self._expiry[0][0] <= now:
            at, _, session = heappop(self._expiry)
            if session.state is State.LIVE and session.finished is not None and at > session.finished:
                late = session.finished + self._pauses.live_s
                if late <= now:
                    self._pause(session)
                else:
                    heappush(self._expiry, (late, next(self._serial), session))
        for key in [key for key in self._homes if key not in loads]:
            for session in [s for s in self._homes[key].sessions if s.state is State.LIVE]:
                self._pause(session)
            if not self._homes[key].sessions:
                del self._homes[key]
        for load in loads.values():
            if load.kv_tokens and self.live(load, now) > load.kv_tokens:
                self._calm(load, now)
        while self._parked and now - (next(iter(self._parked)).finished or 0.0) > PARKED_S:
            self._parked.popitem(last=False)

    def _calm(self, load: Load, now: float) -> None:
        home = self._homes.get(load.key)
        between = [s for s in home.sessions if s.state is State.LIVE] if home is not None else []
        for session in sorted(between, key=lambda s: s.arrival, reverse=True):
            if self.live(load, now) <= CALM * load.kv_tokens:
                break
            self._pause(session)
            self._parked[session] = None

    # -- those who are held ------------------------------------------------------------------------------------------

    def hold(self, session: Session, priority: int, now: float) -> None:
        session.held_since = now
        session.order = -priority, session.state is State.NEW, session.arrival
        insort(self.held, session, key=lambda held: held.order)
        self._since[session] = None
        self._parked.pop(session, None)

    def leave(self, session: Session) -> None:
        """It is held no longer: let in, refused, or its client has gone."""
        if session.held_since is not None:
            session.held_since = None
            self.held.remove(session)
            del self._since[session]

    def next(
        self, loads: Collection[Load], now: float, known: Callable[[Session], Known]
    ) -> tuple[Session, frozenset[str] | None] | None:
        """Who may start next, and where; None: nobody. The caller then owes a `begin` or a `leave`."""
        if not loads or not self.held:
            return None
        if not all(load.kv_tokens for load in loads):
            return self.held[0], None
        oldest = next(iter(self._since))
        places = [Place(load.key, inf if is_idle(load, now) else self.room(load, now)) for load in loads]
        if now - (oldest.held_since or 0.0) >= MAX_HOLD_S:
            return oldest, frozenset((max(places, key=lambda place: place.room).key,))
        return self._first_that_fits(places, known)

    def _first_that_fits(
        self, places: Collection[Place], known: Callable[[Session], Known]
    ) -> tuple[Session, frozenset[str]] | None:
        most = max((place.room for place in places), default=0.0)
        keys = {place.key for place in places}
        for number, session in enumerate(self.held):
            if number < LOOKED_UP and (warm := self._warm(session, known(session), keys)):
                return session, warm
            if session.wanted <= most:
                at = [place for place in places if place.key == session.home] or places
                if found := [place.key for place in at if place.room >= self._lacks(place.key, session)]:
                    return session, frozenset(found)
        return None

    # -- what is wanted ----------------------------------------------------------------------------------------------

    @property
    def num_parked(self) -> int:
        """Conversations between turns that had to make room, and are expected back."""
        return len(self._parked)

    def kv_tokens(self) -> dict[str, int]:
        """Tokens of KV that conversations want: of those that are live, parked and held."""
        return {
            "live": sum(home.tokens for home in self._homes.values()),
            "parked": sum(session.wanted for session in self._parked),
            "held": sum(session.wanted for session in self.held),
        }
