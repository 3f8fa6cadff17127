"""Who runs, waits and is refused: order, shares, bounds, and what overload costs, in simulated time."""

import heapq
import random
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainsail_gateway.balance import Load, observe
from mainsail_gateway.gradient import Gradient, class_of
from mainsail_gateway.shed import Policy, Refused, Shedder, Ticket, Verdict


def ticket(key: str = "", priority: int = 0, tokens: int = 100, timeout_s: float | None = None) -> Ticket:
    return Ticket(key, priority, tokens, True, timeout_s)


def reason(verdict: Verdict) -> str:
    assert isinstance(verdict, Refused), verdict
    return verdict.reason


def displaced(shedder: Shedder) -> Ticket:
    found = shedder.displace(0.0)
    assert found is not None
    return found[0]


def full(policy: Policy | None = None) -> tuple[Shedder, Ticket]:
    """A service of one place, and who has it."""
    shedder = Shedder(policy or Policy(max_running=1), 1)
    first = ticket()
    assert shedder.offer(first, 0.0) == "start"
    return shedder, first


def serve_all(shedder: Shedder, running: Ticket, now: float = 1.0) -> list[Ticket]:
    """One after the other until the queue is empty."""
    order = []
    while True:
        shedder.finish(running, now)
        started = [t for t, refused in shedder.ready(now) if refused is None]
        if not started:
            return order
        assert len(started) == 1
        order += started
        running = started[0]


def test_one_keys_requests_keep_their_order():
    shedder, first = full()
    waiting = [ticket(tokens=n) for n in (5, 500, 1, 50)]
    assert [shedder.offer(t, 0.0) for t in waiting] == ["wait"] * 4
    assert serve_all(shedder, first) == waiting


def test_priorities_first_then_shares():
    shedder, first = full()
    greedy = [ticket("greedy") for _ in range(6)]
    modest = [ticket("modest") for _ in range(2)]
    batch, urgent = ticket("x", -100), ticket("y", 100)
    for t in (*greedy, batch, *modest, urgent):
        assert shedder.offer(t, 0.0) == "wait"
    order = serve_all(shedder, first)
    assert order[0] is urgent
    assert order[-1] is batch
    assert [t.key for t in order[1:5]].count("modest") == 2, "two keys take turns"


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([-1, 0, 1]), st.integers(1, 1000)), max_size=60),
    st.integers(1, 4),
    st.integers(0, 20),
)
def test_nobody_is_lost_or_served_twice(offers, places, queue):
    shedder = Shedder(Policy(max_running=places, max_queued_requests=queue), 1)
    running, waiting, refused = [], [], []
    for key, priority, tokens in offers:
        t = ticket(key, priority, tokens)
        verdict = shedder.offer(t, 0.0)
        {"start": running, "wait": waiting}.get(verdict if isinstance(verdict, str) else "", refused).append(t)
        if (out := shedder.displace(0.0)) is not None:
            waiting.remove(out[0])
            refused.append(out[0])
            assert out[0].priority <= priority
        assert shedder.waiting == len(waiting) <= queue
        assert shedder.running == len(running) <= places
    served = list(running)
    while running:
        shedder.finish(running.pop(), 1.0)
        started = [t for t, no in shedder.ready(1.0) if no is None]
        running += started
        served += started
    assert shedder.running == shedder.waiting == 0
    assert len(served) + len(refused) == len(offers)
    assert len({id(t) for t in served + refused}) == len(offers)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=80))
def test_shares_are_fair_whatever_the_arrivals(keys):
    shedder, first = full()
    for key in keys:
        shedder.offer(ticket(key), 0.0)
    order = serve_all(shedder, first)
    left = Counter(keys)
    got: Counter[str] = Counter()
    for t in order:
        got[t.key] += 1
        left[t.key] -= 1
        hungry = [key for key in left if left[key] > 0]
        assert all(got[t.key] <= got[key] + 1 for key in hungry), "nobody is two ahead of one who waits"


def test_a_full_queue_gives_way_to_more_claim_only():
    shedder, _ = full(Policy(max_running=1, max_queued_requests=2))
    batch = [ticket("a", -100), ticket("a", -100)]
    assert [shedder.offer(t, 0.0) for t in batch] == ["wait", "wait"]
    assert isinstance(shedder.offer(ticket("a", -100), 0.0), Refused)
    assert shedder.offer(ticket("b", -100), 0.0) == "wait", "a key with less in the queue"
    assert displaced(shedder) is batch[1]
    assert shedder.offer(ticket("a", 0), 0.0) == "wait"
    assert displaced(shedder).priority == -100
    assert shedder.displace(0.0) is None


def busy(rate_per_s: int = 2) -> Shedder:
    """One place, half a second for each request, and a history that says so."""
    shedder, running = full(Policy(max_running=1, max_queue_time_s=5.0))
    for i in range(20):
        shedder.finish(running, (i + 1) / rate_per_s)
        running = ticket()
        assert shedder.offer(running, (i + 1) / rate_per_s) == "start"
    return shedder


def test_who_would_wait_in_vain_is_refused_at_once():
    shedder = busy()
    verdicts = [shedder.offer(ticket(), 10.0) for _ in range(12)]
    assert verdicts[:4] == ["wait"] * 4, "with room for what may come in between"
    refused = verdicts[-1]
    assert isinstance(refused, Refused)
    assert refused.reason == "queue_time"
    assert 2.0 <= refused.retry_after_s <= 3.0, "what is ahead takes that long"


def test_the_next_in_line_is_not_refused_for_the_sake_of_caution():
    shedder, running = full(Policy(max_running=1, max_queue_time_s=5.0))
    for i in range(1, 5):  # four seconds each
        shedder.finish(running, 4.0 * i)
        running = ticket()
        assert shedder.offer(running, 4.0 * i) == "start"
    assert shedder.offer(ticket(), 16.0) == "wait"
    assert reason(shedder.offer(ticket(), 16.0)) == "queue_time"


def test_a_queue_that_stands_still_refuses_newcomers():
    shedder = busy()
    for _ in range(4):
        shedder.offer(ticket(), 10.0)
    assert reason(shedder.offer(ticket(), 20.5)) == "queue_time", "nobody has left it for ten seconds"


def test_a_deadline_that_cannot_be_kept():
    shedder = busy()
    for _ in range(3):
        shedder.offer(ticket(), 10.0)
    assert reason(shedder.offer(ticket(timeout_s=1.0), 10.0)) == "deadline"
    assert shedder.offer(ticket(timeout_s=4.5), 10.0) == "wait"


def test_waiting_ends_in_time():
    shedder, _ = full(Policy(max_running=1, max_queue_time_s=3.0))
    patient, hurried = ticket(), ticket(timeout_s=1.0)
    shedder.offer(patient, 0.0)
    shedder.offer(hurried, 0.0)
    assert [(t, r.reason) for t, r in shedder.sweep(1.5)] == [(hurried, "deadline")]
    assert [(t, r.reason) for t, r in shedder.sweep(3.5)] == [(patient, "queue_time")]
    assert shedder.waiting == 0


def test_held_requests_wait_for_a_replica_and_their_clocks_start_then():
    policy = Policy(hold_requests=3, hold_for_s=600, max_queue_time_s=5, max_running=2)
    shedder = Shedder(policy, 0)
    held = [ticket(timeout_s=10) for _ in range(3)]
    assert [shedder.offer(t, 0.0) for t in held] == ["wait"] * 3
    assert reason(shedder.offer(ticket(), 0.0)) == "hold_full"
    assert shedder.sweep(300.0) == []
    shedder.update(policy, 1, 300.0)
    assert [t for t, _ in shedder.ready(300.0)] == held[:2]
    shedder.finish(held[0], 309.0)
    assert [(t, r) for t, r in shedder.ready(309.0)] == [(held[2], None)]


def test_holding_ends_in_time_and_needs_to_be_allowed():
    shedder = Shedder(Policy(hold_requests=3, hold_for_s=60), 0)
    t = ticket()
    shedder.offer(t, 0.0)
    assert [(x, r.reason) for x, r in shedder.sweep(61.0)] == [(t, "hold_time")]
    assert reason(Shedder(Policy(), 0).offer(ticket(), 0.0)) == "no_replica"


def test_a_client_that_left_is_forgotten():
    shedder, first = full()
    gone, stays = ticket(), ticket()
    shedder.offer(gone, 0.0)
    shedder.offer(stays, 0.0)
    shedder.leave(gone)
    shedder.leave(gone)
    assert serve_all(shedder, first) == [stays]


# An engine in simulated time: `slots` requests at once, the others wait inside it, first come first served.


def told(running: int, waiting: int, max_running: int, kv_tokens: int, now: float) -> Load:
    """An engine that says what it has."""
    load = Load("a", 0.0, kv_tokens=kv_tokens, max_running=max_running)
    observe(load, running=running, waiting=waiting, kv_usage=0.5, now=now)
    return load


def simulate(load: float, *, slots: int = 16, service_s: float = 1.0, shed: bool = True, last_s: float = 80.0,
             wanted_s: float = 3.0, warm_s: float = 40.0, seed: int = 1, says: tuple[int, int] | None = None,
             ) -> tuple[float, float, float]:  # fmt: skip
    """Requests per second answered within `wanted_s`, the part of the refused that had waited, the limit at the end.
    says: how many the engine claims to run at once, and how many tokens its KV holds; told every two seconds."""
    rng = random.Random(seed)
    shedder = Shedder(Policy(max_running=256, max_queue_time_s=1.5), 1)
    asked = -2.0
    events: list[tuple[float, int, str, Ticket, float]] = []
    number = iter(range(10**9))
    inside: deque[tuple[Ticket, float]] = deque()
    free, good, swept = slots, 0, 0.0
    refusals = Counter[str]()

    def begin(now: float) -> None:
        nonlocal free
        while free and inside:
            t, sent = inside.popleft()
            free -= 1
            took = service_s * rng.uniform(0.7, 1.3)
            heapq.heappush(events, (now + 0.1 * took, next(number), "first", t, sent))
            heapq.heappush(events, (now + took, next(number), "done", t, sent))

    def send(t: Ticket, now: float) -> None:
        inside.append((t, now))
        begin(now)

    def let_in(now: float) -> None:
        for t, refused in shedder.ready(now) if shed else ():
            refusals["late"] += refused is not None and t.since > warm_s
            if refused is None:
                send(t, now)

    at = 0.0
    while at < last_s:
        at += rng.expovariate(load * slots / service_s)
        heapq.heappush(events, (at, next(number), "arrives", ticket(tokens=rng.choice([100, 130])), at))
    while events:
        now, _, what, t, sent = heapq.heappop(events)
        if what == "arrives":
            t.since = now
            verdict = shedder.offer(t, now) if shed else "start"
            if verdict == "start":
                send(t, now)
            refusals["at once"] += isinstance(verdict, Refused) and now > warm_s
        elif what == "first":
            good += now - t.since <= wanted_s and t.since > warm_s
            if shed:
                shedder.answered(t, now - sent, now)
                let_in(now)
        else:
            free += 1
            begin(now)
            if shed:
                shedder.finish(t, now)
                let_in(now)
        if says is not None and now - asked >= 2.0:
            asked = now
            shedder.hear([told(slots - free, len(inside), *says, now)], now)
            let_in(now)
        if shed and now - swept >= 0.25:
            swept = now
            for late, _ in shedder.sweep(now):
                refusals["late"] += late.since > warm_s
            let_in(now)
    return good / (last_s - warm_s), refusals["late"] / max(1, refusals.total()), shedder.limit


@pytest.mark.parametrize("slots", [4, 16])
def test_goodput_at_four_times_the_load(slots):
    peak = max(simulate(load, slots=slots)[0] for load in (0.7, 0.85, 1.0))
    over, _, limit = simulate(4.0, slots=slots)
    assert over >= 0.95 * peak
    assert slots * 0.8 <= limit <= slots * 2.5
    assert simulate(4.0, slots=slots, shed=False)[0] < 0.5 * peak, "without it, everybody waits and nobody is served"


LOTS = 1_000_000


@pytest.mark.parametrize("says", [(16, LOTS), (256, LOTS), (256, 16 * 115), (256, 40 * 115), (1000, 1)])
def test_what_engines_say_of_their_room_costs_no_goodput(says):
    """Right, far too much in slots or in memory, and nonsense: overload is served as well as by latency alone, soon
    after a cold start."""
    peak = max(simulate(load)[0] for load in (0.85, 1.0))
    assert simulate(4.0, warm_s=20.0, last_s=60.0, says=says)[0] >= 0.95 * peak
    assert simulate(0.85, says=says)[0] >= 0.99 * simulate(0.85)[0]


def bursts(*, says: bool, replicas: int = 2, slots: int = 32, prefill_s: float = 0.1, size: int = 50) -> list[int]:
    """Ten requests, then two bursts, to engines that compute one prompt after the other, as on a CPU; how many of a
    burst start at once."""
    shedder = Shedder(Policy(max_running=slots), replicas)
    now, found = 0.0, list[int]()

    def speak() -> None:
        if says:
            each = shedder.running // replicas
            shedder.hear([told(each, 0, slots, 8192, now) for _ in range(replicas)], now)

    speak()
    for number in (10, size, size):
        offered = [ticket(tokens=80) for _ in range(number)]
        started = [t for t in offered if shedder.offer(t, now) == "start"]
        found.append(len(started))
        answered = 0
        while answered < number:
            now += prefill_s / replicas if answered < len(started) else 0.25
            if answered < len(started):
                t = started[answered]
                shedder.answered(t, now - t.started, now)
                answered += 1
            shedder.sweep(now)
            started += [t for t, refused in shedder.ready(now) if refused is None]
            if answered % 20 == 0:
                speak()
        for t in started:
            shedder.finish(t, now)
        now += 5.0
        speak()
    return found[1:]


def test_a_burst_is_let_in_as_far_as_the_engines_have_room():
    assert bursts(says=True) == [50, 50]
    assert min(bursts(says=False)) < 50, "latency alone takes a burst for overload"


def test_a_cold_service_lets_in_what_its_engines_have_room_for():
    for kv_tokens, most in ((LOTS, 200), (50 * 100, 50), (0, 32)):
        shedder = Shedder(Policy(max_running=256), 1)
        shedder.hear([told(0, 0, 200, kv_tokens, 0.0)], 0.0)
        assert Counter(shedder.offer(ticket(tokens=100), 0.0) for _ in range(300))["start"] == most


def test_others_requests_take_room():
    shedder = Shedder(Policy(max_running=256), 2)
    shedder.hear([told(80, 0, 100, LOTS, 0.0), told(100, 0, 100, LOTS, 0.0)], 0.0)
    assert shedder.room_limit == 20


def test_an_engine_whose_requests_wait_has_shown_its_slots():
    shedder = Shedder(Policy(max_running=256), 1)
    seen = []
    for now, (running, waiting) in enumerate([(0, 0), (12, 30), (12, 0), (3, 0), (19, 0), (24, 1), (9, 9)]):
        for other in (now, now):  # what has been heard once counts once
            shedder.hear([told(running, waiting, 200, LOTS, now)], other)
        seen.append(shedder.room.slots)
    assert seen == [200, 12, 16, 16, 24.75, 31.9375, 9]


def test_what_was_said_long_ago_says_nothing():
    shedder = Shedder(Policy(max_running=256), 1)
    for now, limit in ((1.0, 200.0), (9.0, 200.0), (12.0, 0.0)):
        shedder.hear([told(0, 0, 200, LOTS, 1.0)], now)
        assert shedder.room_limit == limit


@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(0, 200), st.integers(0, 10_000)), max_size=20
    )
)
def test_room_is_never_more_than_slots_or_memory(readings):
    shedder = Shedder(Policy(max_running=100), 3)
    for now, (running, waiting, max_running, kv_tokens) in enumerate(readings):
        shedder.hear([told(running, waiting, max_running, kv_tokens, now)], now)
        shedder.offer(ticket(tokens=50), now)
        assert 0 <= shedder.room_limit <= 3 * max_running
        assert shedder.room_limit <= max(shedder.running, 3 * kv_tokens / 50)
        assert shedder.limit <= 300


@pytest.mark.parametrize("load", [1.5, 4.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_who_is_refused_is_refused_on_arrival(load, seed):
    _, waited, _ = simulate(load, seed=seed)
    assert waited < 0.01


def test_long_streams_do_not_hold_the_limit_down():
    shedder, offered = Shedder(Policy(max_running=1000, max_queued_requests=1000), 1), [ticket() for _ in range(900)]
    for t in offered:
        shedder.offer(t, 0.0)
    started = [t for t in offered if not t.waiting]
    for i in range(1, 30):
        for t in started:
            if not t.answered:
                shedder.answered(t, 0.05, i * 0.25)
        shedder.sweep(i * 0.25)
        started = [t for t, _ in shedder.ready(i * 0.25)]
    assert shedder.running == 900


def test_streams_without_a_first_token_do():
    shedder, offered = Shedder(Policy(max_running=1000, max_queued_requests=1000), 1), [ticket() for _ in range(900)]
    for t in offered:
        shedder.offer(t, 0.0)
    for i in range(1, 30):
        shedder.sweep(i * 0.25)
        assert not shedder.ready(i * 0.25)


def test_a_lone_long_prompt_is_no_overload():
    gradient = Gradient()
    for i in range(400):
        long = i % 10 == 0
        gradient.sample(class_of(True, 30_000 if long else 100), 20.0 if long else 0.1, 30, 256.0, i * 0.1)
    assert gradient.limit >= 32


def test_the_limit_follows_the_latency_down_and_up():
    gradient = Gradient(limit=100.0, ramping=False, baselines={class_of(True, 100): 0.5})
    for i in range(400):
        gradient.sample(class_of(True, 100), 5.0, 100, 256.0, i * 0.05)
    assert gradient.limit < 10
    for i in range(4000):
        gradient.sample(class_of(True, 100), 0.4, gradient.limit, 256.0, 20 + i * 0.05)
    assert gradient.limit > 100


@given(st.lists(st.tuples(st.floats(0, 1000), st.integers(1, 500), st.booleans()), max_size=200))
def test_the_limit_stays_within_its_bounds(samples):
    gradient = Gradient()
    for i, (latency, running, streamed) in enumerate(samples):
        gradient.sample(class_of(streamed, running), latency, running, 128.0, i * 0.1)
        assert 2 <= gradient.limit <= 128
