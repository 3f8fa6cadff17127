"""The balancing rules, as properties over many fleets."""

from hypothesis import given
from hypothesis import strategies as st

from mainsail_gateway import balance
from mainsail_gateway.balance import Load, Prefix, PrefixIndex
from mainsail_gateway.fleet import Flight

NOW = 1000.0
PREFIX = [Prefix(b"12345678", 500)]

loads = st.lists(st.integers(0, 100_000), min_size=1, max_size=20).map(
    lambda tokens: [Load(f"e{i}", 0.0, prefill=n, picked=i) for i, n in enumerate(tokens)]
)
weights = st.integers(1, 50_000)


def pick(fleet: list[Load], weight: int, prefixes: list[Prefix], index: PrefixIndex, now: float) -> Load:
    found = balance.pick(fleet, weight, prefixes, index, now)
    assert found is not None
    return found[0]


def test_none_without_endpoints():
    assert balance.pick([], 1, PREFIX, PrefixIndex(), NOW) is None


@given(loads, weights)
def test_without_prefix_the_least_loaded(fleet, weight):
    chosen = pick(fleet, weight, [], PrefixIndex(), NOW)
    assert chosen.prefill == min(load.prefill for load in fleet)


@given(loads, weights, st.integers(0, 19), st.data(), st.booleans())
def test_affinity_costs_no_more_than_a_cache_is_worth(fleet, prompt, home, data, alone):
    """Once what it saves, and more for a conversation's next turn."""
    served = data.draw(st.integers(0, prompt))
    index = PrefixIndex()
    prefix = Prefix(b"12345678", served)
    index.learn([prefix], f"e{home % len(fleet)}")
    found = balance.pick(fleet, prompt, [prefix], index, NOW, alone=alone)
    assert found is not None
    chosen, remaining = found
    least = min(load.prefill for load in fleet)
    worth = served * (balance.STICKINESS if alone else 1)
    assert chosen.prefill <= least + worth
    at_home = chosen is fleet[home % len(fleet)]
    assert remaining == (max(1, prompt - served) if at_home else prompt)
    if fleet[home % len(fleet)].prefill < least + worth:
        assert at_home


@given(st.integers(2, 8), st.integers(1, 200), st.integers(0, 60_000), st.booleans())
def test_streams_that_begin_alike_spread_however_short_they_are(engines, streams, prompt_bytes, answering):
    """By no more than one copy of their beginning is worth; afterwards all have it, and all get as many."""
    fleet = [Load(f"e{i}", 0.0) for i in range(engines)]
    index, text = PrefixIndex(), b"x" * prompt_bytes
    prefixes = balance.prefix_keys(text, anchor=text)
    tokens = prompt_bytes // 4
    for number in range(streams):
        found = balance.pick(fleet, tokens, prefixes, index, NOW, alone=not number)
        assert found is not None
        chosen, prefill = found
        index.learn(prefixes, chosen.key)
        chosen.picked = number + 1
        flight = Flight(chosen, prefill)
        if answering:
            flight.answering()
        running = [load.requests for load in fleet]
        assert max(running) - min(running) <= tokens // balance.ANSWERING_TOKENS + 1
        if all(running):  # everybody has its beginning
            least = min(balance.burden(load, NOW) for load in fleet if load is not chosen)
            assert balance.burden(chosen, NOW) - balance.ANSWERING_TOKENS - prefill <= least
    running = [load.requests for load in fleet]
    if answering and streams >= engines * (tokens // balance.ANSWERING_TOKENS + 2):
        assert max(running) - min(running) <= 1


def test_a_next_turn_stays_where_a_new_one_like_it_would_not():
    index = PrefixIndex()
    index.learn([Prefix(b"12345678", 1000)], "a")
    fleet = [Load("a", 0.0, requests=10), Load("b", 0.0)]
    for alone, where, prefill in ((False, "b", 1000), (True, "a", 1)):
        found = balance.pick(fleet, 1000, [Prefix(b"12345678", 1000)], index, NOW, alone=alone)
        assert found is not None
        assert (found[0].key, found[1]) == (where, prefill)


def test_questions_about_one_document_go_where_the_document_is():
    """Though each of them is a conversation of its own, whose hash says something else."""
    document = b"a long document " * 5000
    index, fleet = PrefixIndex(), [Load(f"e{i}", 0.0) for i in range(8)]
    homes = set()
    for number in range(20):
        question = document + b"question %d" % number
        prefixes = balance.prefix_keys(question, anchor=question)
        chosen = pick(fleet, len(question) // 4, prefixes, index, NOW)
        index.learn(prefixes, chosen.key)
        homes.add(chosen.key)
    assert len(homes) == 1


@given(weights, st.integers(0, 50_000))
def test_what_a_newcomer_has_cached_does_not_flood_it(prompt, others_tokens):
    """Its share divides what it has to do; it must not multiply what it saves."""
    index = PrefixIndex()
    index.learn([Prefix(b"12345678", prompt)], "new")
    index.learn([Prefix(b"12345678", prompt)], "old")
    fleet = [Load("old", 0.0, prefill=others_tokens), Load("new", NOW, prefill=others_tokens // 10 + 1)]
    found = balance.pick(fleet, prompt, [Prefix(b"12345678", prompt)], index, NOW)
    assert found is not None
    assert found[0].key == "old"


@given(st.integers(1, 16), st.integers(1, 64))
def test_who_runs_more_at_once_gets_more(few, many):
    """One waits for its turn only where that is shorter than what it would lose among the many."""
    fleet = [Load("a", 0.0, max_running=few), Load("b", 0.0, max_running=few + many)]
    for number in range(2 * few + many):
        chosen = pick(fleet, 10, [], PrefixIndex(), NOW)
        chosen.requests += 1
        chosen.picked = number + 1
    waiting = fleet[0].requests - few
    assert 0 <= waiting <= many * few * balance.ANSWERING_TOKENS // balance.SLOT_TOKENS + 1


def test_nothing_of_a_new_prefix_is_counted_as_cached():
    """It has a home, which draws it, but all of it is still to be computed there."""
    found = balance.pick([Load("a", 0.0), Load("b", 0.0)], 700, PREFIX, PrefixIndex(), NOW)
    assert found is not None
    assert found[1] == 700


@given(loads, st.binary(min_size=8, max_size=8))
def test_gateways_agree_on_a_new_prefix_and_a_departure_moves_only_its_own(fleet, key):
    for load in fleet:
        load.prefill = 0
    prefix = [Prefix(key, 100)]
    first = pick(fleet, 10, prefix, PrefixIndex(), NOW)
    assert pick(fleet[::-1], 10, prefix, PrefixIndex(), NOW) is first
    for gone in fleet:
        rest = [load for load in fleet if load is not gone]
        if gone is not first and rest:
            assert pick(rest, 10, prefix, PrefixIndex(), NOW) is first


def test_where_the_conversation_was_beats_where_its_beginning_was():
    fleet = [Load("a", 0.0), Load("b", 0.0)]
    index = PrefixIndex()
    index.learn([Prefix(b"short", 100)], "a")
    index.learn([Prefix(b"talk", 900)], "b")
    assert pick(fleet, 1000, [Prefix(b"short", 100), Prefix(b"talk", 1000)], index, NOW).key == "b"


def test_of_those_who_have_a_prefix_the_least_loaded():
    fleet = [Load("a", 0.0, prefill=400), Load("b", 0.0, prefill=300), Load("c", 0.0)]
    index = PrefixIndex()
    for name in "ab":
        index.learn([Prefix(b"short", 500)], name)
    assert index.saved([Prefix(b"short", 500)]) == {"a": 500, "b": 500}
    assert pick(fleet, 600, [Prefix(b"short", 500)], index, NOW).key == "b"


def test_what_an_engine_says_counts_while_it_is_fresh():
    fleet = [Load("a", 0.0), Load("b", 0.0, prefill=1000)]
    balance.observe(fleet[0], running=3, waiting=2, kv_usage=0.5, now=NOW)
    assert pick(fleet, 10, [], PrefixIndex(), NOW + 1).key == "b"
    assert pick(fleet, 10, [], PrefixIndex(), NOW + balance.FRESH_S).key == "a"


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_our_own_requests_are_not_counted_twice(own, running, waiting):
    load = Load("a", 0.0, requests=own, prefill=own * 100)
    alone = balance.burden(load, NOW)
    balance.observe(load, running=running, waiting=waiting, kv_usage=0.0, now=NOW)
    assert (balance.burden(load, NOW) == alone) == (running + waiting <= own)


def test_an_engine_without_room_comes_last_whatever_it_has_cached():
    fleet = [Load("a", 0.0), Load("b", 0.0, prefill=50_000)]
    index = PrefixIndex()
    index.learn(PREFIX, "a")
    balance.observe(fleet[0], running=4, waiting=1, kv_usage=0.97, now=NOW)
    assert pick(fleet, 600, PREFIX, index, NOW).key == "b"


def test_a_trickle_goes_round():
    fleet = [Load("a", 0.0), Load("b", 0.0), Load("c", 0.0)]
    seen = []
    for n in range(6):
        chosen = pick(fleet, 10, [], PrefixIndex(), NOW)
        chosen.picked = n + 1
        seen.append(chosen.key)
    assert seen == ["a", "b", "c"] * 2


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_ejection_has_a_floor(ejected):
    fleet = [Load(f"e{i}", 0.0, ejected_until=NOW + 1 if out else 0.0) for i, out in enumerate(ejected)]
    left = balance.usable(fleet, NOW)
    assert len(left) * 2 >= len(fleet)
    if sum(ejected) * 2 <= len(ejected):
        assert all(load.ejected_until <= NOW for load in left)
    else:
        assert left == fleet  # panic: everybody


def test_ejected_after_failures_in_a_row_longer_each_time_and_back_by_degrees():
    load = Load("a", 0.0)
    now, pauses = NOW, []
    for _ in range(6):
        for _ in range(balance.EJECT_AFTER):
            assert load.ejected_until <= now
            balance.failed(load, now)
        pauses.append(load.ejected_until - now)
        now = load.ejected_until
        assert balance.share(load, now) == balance.SLOW_START_FLOOR
        assert balance.SLOW_START_FLOOR < balance.share(load, now + balance.SLOW_START_S / 2) < 1
        assert balance.share(load, now + balance.SLOW_START_S) == 1
    assert pauses == [5, 10, 20, 40, 60, 60]
    balance.failed(load, now)
    balance.succeeded(load)
    balance.failed(load, now)
    balance.failed(load, now)
    assert load.ejected_until <= now
    balance.failed(load, now)
    assert load.ejected_until == now + balance.EJECT_S


def test_a_newcomer_gets_little_at_first():
    fleet = [Load("old", 0.0), Load("new", NOW)]
    counts = {"old": 0, "new": 0}
    for n in range(110):
        chosen = pick(fleet, 100, [], PrefixIndex(), NOW)
        chosen.prefill += 100
        chosen.picked = n + 1
        counts[chosen.key] += 1
    assert counts == {"old": 100, "new": 10}


@given(st.binary(max_size=40_000), st.binary(max_size=1000))
def test_equal_beginnings_have_equal_keys(prompt, more):
    keys = balance.prefix_keys(prompt)
    assert balance.prefix_keys(prompt + more)[: len(keys)] == keys
    assert len(keys) == sum(len(prompt) >= length for length in balance.PREFIX_LENGTHS)


def test_a_named_session_is_its_longest_prefix():
    assert len(balance.prefix_keys(b"", "s")) == 1
    assert balance.prefix_keys(b"a" * 600, "s")[1] != balance.prefix_keys(b"a" * 600, "t")[1]


def test_turns_of_a_conversation_have_its_anchor_in_common():
    first = balance.prefix_keys(b"a" * 600, anchor=b"b" * 600)
    later = balance.prefix_keys(b"a" * 900, anchor=b"b" * 600)
    assert first[-1].key == later[-1].key
    assert (first[-1].tokens, later[-1].tokens) == (150, 225)
    assert len(balance.prefix_keys(b"a" * 600, anchor=b"short")) == 1


@given(st.lists(st.binary(min_size=1, max_size=2), max_size=50))
def test_the_index_is_bounded_and_keeps_the_newest(prefixes):
    index = PrefixIndex(capacity=5)
    for prefix in prefixes:
        index.learn([Prefix(prefix, 1)], "e")
    newest = list(dict.fromkeys(reversed(prefixes)))[:5]
    assert len(index) == len(newest)
    assert all(index.get(prefix) == (("e", 1),) for prefix in newest)
