"""Agent sessions: who comes back, when, and how long their KV is worth its room meanwhile.

An agent's run is a chain of requests. Each repeats the last one's prompt, adds its answer and a tool's result, and
comes a moment after it: while the tool runs, the session's KV looks idle. Here the session is the unit:

    turn 1 ──finished──▶ acting ──returns──▶ turn 2 ──▶ acting ──▶ …        no return within HORIZON_S: forgotten
                          kept ──time to live over, or displaced──▶ parked (its KV goes to the host as room is needed)

*Recognition.* A request whose prompt goes on where the last prompt of a session ended is that session's next turn; no
client has to say so. An id (`session_id`) only sharpens it: history that was rewritten is still the same session. Whole
blocks are compared by a chain of hashes, the rest token by token; a collision could cost a wrong guess, never a wrong
token, since sharing itself goes by the prefix tree.

*Time to live.* From past pauses (of all, first turns and later ones apart, and of the session itself) come hazards: the
probability of returning within the next stretch of time, having stayed away so long. The value of keeping is the
best ratio, over all ends of the wait, of the probability of the return to the expected time that the room is held: an
index as Gittins's. KV is kept as long as that beats `threshold`: one over the time that it takes to bring back a whole
pool, for then the engine wins by keeping what it would otherwise lose by holding others off. Where nobody ever returns
(plain traffic) hazards are zero, nothing is kept, and all that is left is the least recently used.

Pure: the clock is an argument, and what is kept is the caller's to do (residency.py). After Continuum (arXiv
2511.02230: time to live by expected return) and ThunderAgent (arXiv 2602.13692: whole turns are held, none is cut).
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.kv.packed_tokens import KEY_BYTES, pack_tokens

EDGES_S = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0)
"""Pauses are counted in these stretches: fine where tools are, coarse where people are."""
STRETCHES = len(EDGES_S) - 1
HORIZON_S = EDGES_S[-1]
DOUBT = 4.0
"""Pauses without a return that every stretch is credited with before any was seen."""
GENERAL = 4.0
"""How many pauses of its own a session needs to count as much as all others."""
SURE = 0.98
"""From this probability on a session is taken for ended."""
MEMORY = 2000.0
"""Pauses remembered, fading."""
MAX_SESSIONS = 20_000
"""Sessions remembered: beyond that, who has been away longest is forgotten before the horizon."""
MAX_ALIKE = 64
"""Sessions with the very same prompt that are told apart."""


def stretch_of(pause_s: float) -> int:
    return min(max(bisect_right(EDGES_S, pause_s) - 1, 0), STRETCHES - 1)


class ReturnTimes:
    """How pauses ended, by stretch: so many were still away at its beginning, so many returned in it."""

    def __init__(self) -> None:
        self._away = [0.0] * STRETCHES
        self._returned = [0.0] * STRETCHES

    def stayed(self, stretch: int) -> None:
        """A session was away through the whole of it."""
        self._away[stretch] += 1

    def came_back(self, stretch: int) -> None:
        self._away[stretch] += 1
        self._returned[stretch] += 1
        if self._away[0] > MEMORY:
            self._away = [value / 2 for value in self._away]
            self._returned = [value / 2 for value in self._returned]

    def hazards(self, own: Sequence[int] = ()) -> list[float]:
        """Probability of returning in each stretch, for who is away at its beginning. `own`: stretches of returns."""
        general = [r / (a + DOUBT) for r, a in zip(self._returned, self._away, strict=True)]
        if not own:
            return general
        hazards: list[float] = []
        for stretch, hazard in enumerate(general):
            away = sum(1 for each in own if each >= stretch)
            returned = sum(1 for each in own if each == stretch)
            hazards.append((returned + GENERAL * hazard) / (away + GENERAL))
        return hazards


def value_of_keeping(hazards: Sequence[float], stretch: int) -> float:
    """Returns per second of holding on, from the beginning of this stretch, for the best time to give up."""
    best, probability, held_s, away = 0.0, 0.0, 0.0, 1.0
    for each in range(stretch, STRETCHES):
        length_s, hazard = EDGES_S[each + 1] - EDGES_S[each], hazards[each]
        probability += away * hazard
        held_s += away * length_s * (1 - hazard / 2)
        away *= 1 - hazard
        best = max(best, probability / held_s)
    return best


@dataclass(slots=True, frozen=True)
class Forecast:
    """Seconds after the end of a turn."""

    keep_s: float
    """Time to live: so long KV is worth its room on the device. 0: not at all."""
    fetch_s: float | None
    """From then on it is worth being there again. None: no more."""
    is_last: bool = False
    """Who has not returned by the end of the time to live is hardly expected any more."""


def forecast(hazards: Sequence[float], threshold: float) -> Forecast:
    """threshold: returns per second that make keeping pay."""
    if not any(hazards):
        return Forecast(0.0, None)
    pays = [value_of_keeping(hazards, stretch) >= threshold for stretch in range(STRETCHES)]
    end = pays.index(False) if False in pays else STRETCHES
    again = next((stretch for stretch in range(end, STRETCHES) if pays[stretch]), None)
    stays_away = prod(1 - hazard for hazard in hazards[end:])
    return Forecast(EDGES_S[end], None if again is None else EDGES_S[again], stays_away > SURE)


class SessionState(enum.Enum):
    TURN = enum.auto()
    """A request of it waits or runs."""
    ACTING = enum.auto()
    """Between two turns."""
    GONE = enum.auto()
    """Not expected any more."""


@dataclass(slots=True, eq=False)
class Session:
    arrival: int
    """Order of first turns: who was here first is served first, turn after turn."""
    state: SessionState = SessionState.TURN
    num_turns: int = 1
    prompt_len: int = 0
    tail: tuple[int, ...] = ()
    """The last prompt's tokens after its last full block."""
    anchor: int = 0
    """Chain of hashes over the last prompt's full blocks."""
    session_id: tuple[str, str] | None = None
    """(salt, the client's id)."""
    finished_s: float = 0.0
    """End of the last turn."""
    pauses: list[int] = field(default_factory=list[int])
    """Stretches of its own past returns."""
    num_tokens: int = 0
    """At the end of the last turn."""
    growth: float = 0.0
    """Tokens that a turn adds, on a fading average."""

    @property
    def is_new(self) -> bool:
        return self.num_turns == 1


class SessionTable:
    """All sessions of the last HORIZON_S seconds; recognises them, and learns how they return."""

    def __init__(self) -> None:
        self._by_anchor: dict[int, dict[tuple[int, ...], deque[Session]]] = {}
        self._by_id: dict[tuple[str, str], Session] = {}
        self._times = {True: ReturnTimes(), False: ReturnTimes()}
        """Of first turns, and of later ones."""
        self._away: list[deque[tuple[float, Session]]] = [deque() for _ in range(STRETCHES)]
        """Acting sessions by the stretch that they are in, in the order in which they will leave it."""
        self._gone: list[Session] = []
        self.num_sessions = 0

    def arrive(self, prompt: Sequence[int], *, salt: str, session_id: str, arrival: int, now: float) -> Session:
        """The session whose next turn this prompt is; a new one if there is none."""
        chain = _chain(prompt, salt)
        named = (salt, session_id) if session_id else None
        session = self._named(named) or self._continued(prompt, chain)
        if session is None:
            session = Session(arrival)
            self.num_sessions += 1
        else:
            self._came_back(session, now)
        session.prompt_len, session.anchor = len(prompt), chain[-1]
        session.tail = tuple(prompt[len(prompt) // BLOCK_SIZE * BLOCK_SIZE :])
        if named is not None:
            session.session_id = named
            self._by_id[named] = session
        return session

    def _named(self, named: tuple[str, str] | None) -> Session | None:
        session = self._by_id.get(named) if named is not None else None
        return session if session is not None and session.state is SessionState.ACTING else None

    def _continued(self, prompt: Sequence[int], chain: list[int]) -> Session | None:
        """The acting session with the longest last prompt that this one begins with."""
        for num_blocks in range(len(chain) - 1, 0, -1):
            tails, start = self._by_anchor.get(chain[num_blocks]), num_blocks * BLOCK_SIZE
            if tails is None:
                continue
            longest = min(BLOCK_SIZE, len(prompt) - start) - 1
            for length in range(longest, -1, -1):  # not one tail after another: there may be thousands
                sessions = tails.get(tuple(prompt[start : start + length]))
                if sessions is not None:
                    return sessions[-1]
        return None

    def _came_back(self, session: Session, now: float) -> None:
        stretch = stretch_of(now - session.finished_s)
        self._times[session.is_new].came_back(stretch)
        session.pauses = [*session.pauses[-7:], stretch]
        self._unlist(session)
        session.state = SessionState.TURN
        session.num_turns += 1

    def finished(self, session: Session, num_tokens: int, now: float) -> None:
        """Its turn is over, at so many tokens of prompt and answer."""
        if session.num_tokens:
            grown = max(0, num_tokens - session.num_tokens)
            session.growth = grown if not session.growth else (session.growth + grown) / 2
        session.num_tokens, session.finished_s, session.state = num_tokens, now, SessionState.ACTING
        self._away[0].append((now, session))
        if session.prompt_len >= BLOCK_SIZE:
            alike = self._by_anchor.setdefault(session.anchor, {}).setdefault(session.tail, deque())
            alike.append(session)
            if len(alike) > MAX_ALIKE:
                self.forget(alike[0])
        if self.num_sessions > MAX_SESSIONS:
            self._forget_longest_away()

    def forecast(self, session: Session, threshold: float) -> Forecast:
        return forecast(self._times[session.is_new].hazards(session.pauses), threshold)

    def advance(self, now: float) -> list[Session]:
        """Learn from who stayed away until now. Returns the sessions that are not expected any more."""
        for stretch, away in enumerate(self._away):
            while away and now - away[0][0] >= EDGES_S[stretch + 1]:
                finished_s, session = away.popleft()
                if session.state is not SessionState.ACTING or session.finished_s != finished_s:
                    continue
                self._times[session.is_new].stayed(stretch)
                if stretch + 1 < STRETCHES:
                    self._away[stretch + 1].append((finished_s, session))
                else:
                    self.forget(session)
        gone, self._gone = self._gone, []
        return gone

    def _forget_longest_away(self) -> None:
        for away in reversed(self._away):
            while away:
                finished_s, session = away.popleft()
                if session.state is SessionState.ACTING and session.finished_s == finished_s:
                    self.forget(session)
                    return

    def forget(self, session: Session) -> None:
        if session.state is SessionState.ACTING:
            self._unlist(session)
        if session.session_id is not None and self._by_id.get(session.session_id) is session:
            del self._by_id[session.session_id]
        if session.state is not SessionState.GONE:
            self.num_sessions -= 1
            self._gone.append(session)
        session.state = SessionState.GONE

    def _unlist(self, session: Session) -> None:
        tails = self._by_anchor.get(session.anchor, {})
        alike = tails.get(session.tail)
        if alike is None or session not in alike:
            return
        alike.remove(session)
        if not alike:
            del tails[session.tail]
        if not tails:
            del self._by_anchor[session.anchor]


def _chain(prompt: Sequence[int], salt: str) -> list[int]:
    """Hashes of the prompt's first 0, 1, 2 … full blocks, each with all before it."""
    packed, chain = pack_tokens(prompt), [hash(salt)]
    for position in range(0, len(packed) - KEY_BYTES + 1, KEY_BYTES):
        chain.append(hash((chain[-1], packed[position : position + KEY_BYTES])))
    return chain
