"""Windows over scraped metrics: what grew, across restarts and gaps; and what a pod has to do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mainsail_operator.exposition import parse
from mainsail_operator.signals import (
    CACHE_CONFIG,
    DEMAND,
    DENSE_S,
    FINISHED,
    FIRST_TOKEN,
    FRESH_S,
    HELD_SESSIONS,
    HORIZON_S,
    KV_USAGE,
    LONG_HORIZON_S,
    LONG_SPARSE_S,
    PARKED_SESSIONS,
    PREEMPTIONS,
    QUEUED,
    RUNNING,
    SESSIONS_KV,
    WAITING,
    Distribution,
    History,
    Queue,
    Signals,
    Waiting,
    merged,
    pod_load,
    waiting,
)


def total(value: float, name: str = FINISHED, **labels: str):
    return {(name, tuple(sorted(labels.items()))): value}


def idle(**more: float):
    names = {"waiting": WAITING, "running": RUNNING, "kv": KV_USAGE, "preemptions": PREEMPTIONS}
    return {(name, ()): more.get(short, 0.0) for short, name in names.items()}


def history_of(samples) -> History:
    history = History()
    for now in (0.0, 5.0, 10.0, 15.0):
        history.add(now, samples)
    return history


@given(st.text(max_size=30), st.floats(allow_nan=False))
def test_reads_what_the_client_library_writes(label: str, value: float) -> None:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_waiting", "w", ("model_name",), registry=registry).labels(label).set(value)
    Counter("other", "not asked for", registry=registry).inc()
    found = dict(parse(generate_latest(registry).decode(), lambda name: name.startswith("vllm:")))
    assert found == {(WAITING, (("model_name", label),)): value}


@pytest.mark.parametrize("line", ["x{a=1} 2", 'x{a="b" 2', "x", "x{} y", 'x{a="b"}'])
def test_half_a_page_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match="not a s"):
        list(parse(line, lambda _: True))


def test_a_counter_survives_a_restart_of_its_process() -> None:
    history = History()
    for now, value in ((0, 100), (5, 110), (10, 3), (15, 7)):
        history.add(float(now), total(value))
    window = history.window(0)
    assert window is not None
    assert window.increase(FINISHED) == 10 + 3 + 4


def test_a_restart_is_seen_though_the_counter_is_higher_already() -> None:
    history = History()
    history.add(0.0, total(10), restarts=0)
    history.add(5.0, total(12), restarts=1)
    window = history.window(0)
    assert window is not None
    assert window.increase(FINISHED) == 12


def test_one_shrunken_counter_means_that_all_began_anew() -> None:
    history = History()
    history.add(0.0, total(10) | total(5, PREEMPTIONS))
    history.add(5.0, total(2) | total(6, PREEMPTIONS))
    window = history.window(0)
    assert window is not None
    assert (window.increase(FINISHED), window.increase(PREEMPTIONS)) == (2, 6)


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=60))
def test_growth_is_never_negative_and_loses_nothing_between_scrapes(steps: list[tuple[int, bool]]) -> None:
    history, raw, truth = History(), 0, 0
    history.add(0.0, total(0))
    for number, (more, restart) in enumerate(steps, start=1):
        raw = more if restart else raw + more
        truth += more
        history.add(5.0 * number, total(raw), restarts=sum(flag for _, flag in steps[:number]))
    window = history.window(0)
    assert window is not None
    assert window.increase(FINISHED) == truth


def test_series_that_appear_later_grew_from_zero() -> None:
    history = History()
    history.add(0.0, total(4, code="200"))
    history.add(5.0, total(6, code="200") | total(3, code="500"))
    window = history.window(0)
    assert window is not None
    assert window.increase(FINISHED, code="500") == 3
    assert window.increase(FINISHED) == 5


def test_series_of_pods_that_are_gone_leave_no_columns() -> None:
    history = History()
    for number in range(500):
        history.add(5.0 * number, total(number, pod=f"p{number // 2}") | total(number, pod="stays"))
    window = history.window(0)
    assert window is not None
    assert len(window._columns) <= 70
    assert window.increase(FINISHED, pod="stays") == pytest.approx(window.span_s / 5.0)


def test_old_scrapes_are_thinned_and_end() -> None:
    history = History()
    for number in range(2000):
        history.add(5.0 * number, total(number))
    window = history.window(0)
    assert window is not None
    assert HORIZON_S - 20 <= window.span_s <= HORIZON_S
    assert len(window._rows) <= DENSE_S / 5 + HORIZON_S / 15 + 2
    assert window.increase(FINISHED) == pytest.approx(window.span_s / 5)


def test_what_gateways_saw_is_kept_for_a_day_and_thinly() -> None:
    """A step that began hours ago is judged on all that came since."""
    history = History(LONG_HORIZON_S)
    for number in range(4 * 720):
        history.add(5.0 * number, total(number))
    since = 2 * 3600.0
    window = history.window(since)
    assert window is not None
    assert since - LONG_SPARSE_S - 10 <= window.start <= since
    assert window.increase(FINISHED) == pytest.approx(window.span_s / 5)
    assert len(window._rows) < 150


@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], q: float) -> None:
    bounds = (0.1, 0.5, 1.0, 5.0, 10.0)
    registry = CollectorRegistry()
    histogram = Histogram("t", "t", registry=registry, buckets=bounds)
    history = History()
    history.add(0.0, dict(parse(generate_latest(registry).decode(), lambda _: True)))
    for value in values:
        histogram.observe(value)
    history.add(5.0, dict(parse(generate_latest(registry).decode(), lambda _: True)))
    window = history.window(0)
    assert window is not None
    found = window.distribution("t").quantile(q)
    rank = max(1, -int(-q * len(values) // 1))
    true = sorted(values)[min(rank, len(values)) - 1]
    upper = next((bound for bound in bounds if true <= bound), None)
    assert found is not None
    if upper is None:
        assert found == bounds[-1]
    else:
        lower = max((bound for bound in bounds if bound < true), default=0.0)
        assert lower - 1e-9 <= found <= upper + 1e-9


def test_distributions_add_up_and_only_if_they_can() -> None:
    one = Distribution((0.1, float("inf")), (1, 2), 0.5)
    assert merged([one, Distribution(), one]) == Distribution((0.1, float("inf")), (2, 4), 1.0)
    with pytest.raises(ValueError, match="different bounds"):
        merged([one, Distribution((0.2, float("inf")), (1, 2), 0.5)])


def test_load_of_a_pod() -> None:
    history = History()
    for number in range(13):
        history.add(100.0 + 5 * number, idle(waiting=4.0, running=2.0, kv=0.5, preemptions=number / 2))
    load = pod_load("u", history, 165.0)
    assert load is not None
    assert (load.waiting, load.running, load.kv_usage) == (4.0, 2.0, 0.5)
    assert load.preemptions_per_minute == pytest.approx(6.0, rel=0.1)
    assert load.first_token_p95_s is None


def test_sessions_want_kv_wherever_theirs_is() -> None:
    history = History()
    sessions = {("mainsail:sessions_kv_wanted_blocks", ()): 300.0, ("mainsail:sessions_parked", ()): 4.0,
                ("mainsail:sessions_acting", ()): 2.0,
                ("vllm:cache_config_info", (("block_size", "16"), ("num_gpu_blocks", "200"))): 1.0}  # fmt: skip
    for number in range(4):
        history.add(100.0 + 5 * number, idle() | sessions)
    load = pod_load("u", history, 116.0)
    assert load is not None
    assert (load.kv_wanted, load.sessions) == (1.5, 6.0)


def test_one_preemption_at_the_start_is_one_a_minute() -> None:
    history = History()
    for number in range(4):
        history.add(100.0 + 5 * number, idle(preemptions=float(number > 0)))
    load = pod_load("u", history, 116.0)
    assert load is not None
    assert load.preemptions_per_minute == 1.0


def test_the_trend_of_a_queue() -> None:
    history = History()
    for number in range(13):
        history.add(100.0 + 5 * number, idle(waiting=60.0 - 4 * number))
    load = pod_load("u", history, 160.0)
    assert load is not None
    assert load.waiting_trend == pytest.approx(-0.8, rel=0.1)


def test_stale_silent_or_foreign_pods_say_nothing() -> None:
    signals = Signals()
    assert signals.load("u", 0.0) is None
    signals.engines["u"] = History()
    signals.engines["u"].add(80.0, idle())
    signals.engines["u"].add(90.0, idle())
    assert signals.load("u", 92.0) is None, "not seen for long enough"
    signals.engines["u"].add(100.0, idle())
    assert signals.load("u", 100.0) is not None
    assert signals.load("u", 100.0, since=89.0) is None, "not seen for long enough since then"
    assert signals.load("u", 100.0 + FRESH_S) is not None
    assert signals.load("u", 101.0 + FRESH_S) is None
    signals.engines["other"] = History()
    signals.engines["other"].add(100.0, total(1, FIRST_TOKEN + "_count"))
    assert signals.load("other", 100.0) is None


def test_queues_add_up_over_gateways_and_grow_stale() -> None:
    signals, key = Signals(), ("d", "s")
    signals.queued("g1", 100.0, {key: Waiting(2.0)})
    signals.queued("g2", 90.0, {key: Waiting(1.0)})
    assert signals.queue("d", "s", 101.0) == Queue(3.0, 0.0)
    assert signals.queue("d", "s", 125.0) == Queue(2.0, 0.0)
    assert signals.queue("d", "other", 101.0) == Queue()
    signals.retain(set(), {"g2"})
    assert signals.queue("d", "s", 101.0).length == 1.0


def test_a_session_that_two_gateways_know_counts_once_and_a_held_one_where_it_is() -> None:
    signals, key = Signals(), ("d", "s")
    signals.queued("g1", 100.0, {key: Waiting(held=2.0, parked=3.0, held_kv=200.0, other_kv=5000.0)})
    signals.queued("g2", 100.0, {key: Waiting(held=1.0, parked=4.0, held_kv=100.0, other_kv=4500.0)})
    assert signals.queue("d", "s", 101.0) == Queue(sessions=7.0, kv_tokens=5300.0)


def test_what_sessions_want_is_read_by_state() -> None:
    page = "".join(
        f'{name}{{namespace="d",service="s"{state}}} {value}\n'
        for name, state, value in (
            (HELD_SESSIONS, "", 2), (PARKED_SESSIONS, "", 1), (QUEUED, "", 0),
            (SESSIONS_KV, ',state="held"', 7), (SESSIONS_KV, ',state="live"', 20), (SESSIONS_KV, ',state="parked"', 5),
        )
    )  # fmt: skip
    assert waiting(parse(page, DEMAND.__contains__)) == {("d", "s"): Waiting(0.0, 2.0, 1.0, 7.0, 25.0)}


def test_an_engine_says_what_its_pool_holds() -> None:
    info = ("block_size", "16"), ("num_gpu_blocks", "500")
    signals = history_of(idle() | {(CACHE_CONFIG, info): 1.0})
    found = pod_load("u", signals, 15.0)
    assert found is not None
    assert found.kv_tokens == 8000


def test_a_queue_is_a_mean_with_a_trend_since_a_time() -> None:
    signals = Signals()
    for number in range(31):
        signals.queued("g", 100.0 + number, {("d", "s"): Waiting(60.0 - number)} if number < 30 else {})
    found = signals.queue("d", "s", 130.0, since=120.0)
    assert found.length == pytest.approx(sum(60 - n for n in range(20, 30)) / 11)
    assert found.trend < -1
    assert signals.queue("d", "s", 130.0, since=131.0).length == 0.0
    assert len(signals.queues["g"]) == 21
