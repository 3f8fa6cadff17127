"""What pods say about their load, over windows of time: counters that survive restarts, gauges, histograms.

A `History` holds the last minutes of one pod's metrics, keyed by the pod's UID, so that a new pod of an old name never
inherits numbers. A `Window` answers questions about a span of it: how much a counter grew, a gauge's mean, a quantile
of a histogram. `Signals` is the collection that `scrape` fills and that decisions read; reading waits for nothing.

Counters start again at zero when a process does. Between two scrapes, one counter that shrank, or a container that was
restarted, means that all of them began anew: what the later scrape says then counts in full. What happened after the
last scrape before a crash is lost, so sums are lower bounds.

What is read (see `ENGINE` and `GATEWAY`): the engine's metrics under vLLM's names, from each engine pod; and from each
gateway pod what it counted for each engine pod, because only the gateway sees what clients saw.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mainsail_operator.exposition import Series

WAITING = "vllm:num_requests_waiting"
RUNNING = "vllm:num_requests_running"
KV_USAGE = "vllm:kv_cache_usage_perc"
PREEMPTIONS = "vllm:num_preemptions_total"
FIRST_TOKEN = "vllm:time_to_first_token_seconds"
INTER_TOKEN = "vllm:inter_token_latency_seconds"
FINISHED = "vllm:request_success_total"
GENERATED = "vllm:generation_tokens_total"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
CACHE_CONFIG = "vllm:cache_config_info"
"""Its label num_gpu_blocks is the size of the KV cache."""
SESSIONS = "mainsail:sessions_"
"""Prefix of the gauges about agents' sessions: active, acting, held, parked, and the KV blocks that they want."""
FETCH = "mainsail:fetch_"
"""Prefix of the gauges of a pod that fetches a model."""
GATEWAY = "mainsail:gateway_"
GATEWAY_REQUESTS = "mainsail:gateway_requests_total"
GATEWAY_FIRST_TOKEN = "mainsail:gateway_time_to_first_token_seconds"
GATEWAY_INTER_TOKEN = "mainsail:gateway_inter_token_seconds"
QUEUED = "mainsail:gateway_queued_requests"
"""Gauge of a gateway, labels namespace and service: requests that wait there, for a first replica or for a free one."""
HELD_SESSIONS = "mainsail:gateway_held_sessions"
"""Gauge of a gateway, the same labels: agents' sessions whose turn it holds, for want of KV."""
PARKED_SESSIONS = "mainsail:gateway_parked_sessions"
"""Gauge of a gateway, the same labels: sessions that had to make room, and are expected back."""
SESSIONS_KV = "mainsail:gateway_sessions_kv_tokens"
"""Gauge of a gateway, and the label state: tokens of KV that its live, parked and held sessions want."""
DEMAND = (QUEUED, HELD_SESSIONS, PARKED_SESSIONS, SESSIONS_KV)
"""What gateways are asked every second."""

_ENGINE_NAMES = frozenset(
    {
        *(WAITING, RUNNING, KV_USAGE, PREEMPTIONS, FINISHED, GENERATED, PREFIX_HITS, CACHE_CONFIG),
        *(f"{name}_{part}" for name in (FIRST_TOKEN, INTER_TOKEN) for part in ("bucket", "count", "sum")),
    }
)

FRESH_S = 30.0
"""A pod whose last good scrape is older says nothing any more."""
DENSE_S = 120.0
"""Every scrape of the last two minutes is kept, and before that one in `SPARSE_S`."""
SPARSE_S = 15.0
HORIZON_S = 900.0
LONG_SPARSE_S = 300.0
LONG_HORIZON_S = 24 * 3600.0
"""What gateways saw is kept longer, ever more thinly: a canary may wait for its requests for hours."""

_GROWS = ("_total", "_bucket", "_count", "_sum")


def is_engine_signal(name: str) -> bool:
    return name in _ENGINE_NAMES or name.startswith((SESSIONS, FETCH))


def is_gateway_signal(name: str) -> bool:
    return name.startswith(GATEWAY)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram's growth over a window."""

    bounds: tuple[float, ...] = ()
    """Upper bounds, ascending, the last one infinite."""
    counts: tuple[float, ...] = ()
    """Observations at most that large: cumulative, as in Prometheus."""
    sum: float = 0.0

    @property
    def count(self) -> float:
        return self.counts[-1] if self.counts else 0.0

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count > 0 else None

    def quantile(self, q: float) -> float | None:
        """Interpolated within the bucket, as Prometheus' histogram_quantile does; None without observations.

        In the last, infinite bucket it is the largest finite bound: the truth is at least that."""
        if self.count <= 0:
            return None
        rank = q * self.count
        index = bisect_left(self.counts, rank)
        if self.bounds[index] == float("inf"):
            return self.bounds[index - 1] if index else None
        low, below = (self.bounds[index - 1], self.counts[index - 1]) if index else (0.0, 0.0)
        inside = self.counts[index] - below
        return low + (self.bounds[index] - low) * ((rank - below) / inside if inside > 0 else 1.0)


def merged(parts: Iterable[Distribution]) -> Distribution:
    """Several pods' observations as one distribution. Raises ValueError when their bounds differ."""
    found = [part for part in parts if part.counts]
    if not found:
        return Distribution()
    if any(part.bounds != found[0].bounds for part in found):
        raise ValueError("histograms with different bounds cannot be added")
    counts = tuple(sum(column) for column in zip(*(part.counts for part in found), strict=True))
    return Distribution(found[0].bounds, counts, sum(part.sum for part in found))


@dataclass(frozen=True, slots=True)
class Window:
    """One pod's metrics between two of its scrapes."""

    start: float
    end: float
    """Unix seconds of the first and the last scrape; equal when there was only one."""
    _columns: Mapping[Series, int]
    _rows: Sequence[array[float]]

    @property
    def span_s(self) -> float:
        return self.end - self.start

    def series(self, name: str, **labels: str) -> list[Series]:
        """The series of that name whose labels include the given ones."""
        asked = labels.items()
        return [series for series in self._columns if series[0] == name and asked <= dict(series[1]).items()]

    def increase(self, name: str, **labels: str) -> float:
        """By how much the counter grew, over all series that match; 0 for one that is not there."""
        return sum(self._grown(series) for series in self.series(name, **labels))

    def rise(self, name: str) -> float:
        """By how much the gauge is higher at the end than at the start."""
        return sum(self._grown(series) for series in self.series(name))

    def last(self, name: str, **labels: str) -> float | None:
        """The gauge's sum over the matching series at the end; None when it is not there."""
        found = self.series(name, **labels)
        return sum(_at(self._rows[-1], self._columns[series]) for series in found) if found else None

    def mean(self, name: str, **labels: str) -> float | None:
        """The gauge's mean over the window's scrapes."""
        found = self.series(name, **labels)
        if not found:
            return None
        total = sum(_at(row, self._columns[series]) for row in self._rows for series in found)
        return total / len(self._rows)

    def trend(self, name: str, **labels: str) -> float:
        """By how much the gauge grows each second: from the mean of the first third of the scrapes to the last."""
        third = len(self._rows) // 3
        if third == 0:
            return 0.0
        ends = [self._columns[series] for series in self.series(name, **labels)]
        first, last = (
            sum(_at(row, column) for row in rows for column in ends) / third
            for rows in (self._rows[:third], self._rows[-third:])
        )
        return (last - first) / (self.span_s * (1 - third / len(self._rows)))

    def distribution(self, name: str, **labels: str) -> Distribution:
        """The histogram's growth, over all series that match."""
        counts: dict[float, float] = {}
        for series in self.series(f"{name}_bucket", **labels):
            bound = float(dict(series[1])["le"])
            counts[bound] = counts.get(bound, 0.0) + self._grown(series)
        bounds = tuple(sorted(counts))
        return Distribution(bounds, tuple(counts[bound] for bound in bounds), self.increase(f"{name}_sum", **labels))

    def _grown(self, series: Series) -> float:
        column = self._columns[series]
        return max(0.0, _at(self._rows[-1], column) - _at(self._rows[0], column))


def _at(row: array[float], column: int) -> float:
    """A series that appeared after a row was taken was 0 then."""
    return row[column] if column < len(row) else 0.0


@dataclass(slots=True)
class History:
    """One pod's scrapes of the last minutes. Counters are stored as sums that never shrink."""

    horizon_s: float = HORIZON_S
    restarts: int = 0
    """Restarts of the pod's container when it was scraped last."""
    _columns: dict[Series, int] = field(default_factory=dict[Series, int])
    _times: list[float] = field(default_factory=list[float])
    _rows: list[array[float]] = field(default_factory=list["array[float]"])
    _raw: dict[Series, float] = field(default_factory=dict[Series, float])
    _before: dict[Series, float] = field(default_factory=dict[Series, float])
    """What counters had reached before the last restart."""

    @property
    def last_scrape(self) -> float | None:
        return self._times[-1] if self._times else None

    def add(self, now: float, samples: Mapping[Series, float], restarts: int = 0) -> None:
        """A scrape. Times must not go back; one that does is ignored."""
        if self._times and now <= self._times[-1]:
            return
        if restarts != self.restarts or any(
            series[0].endswith(_GROWS) and value < self._raw.get(series, 0.0) for series, value in samples.items()
        ):
            for series, value in self._raw.items():
                if series[0].endswith(_GROWS):
                    self._before[series] = self._before.get(series, 0.0) + value
        self.restarts = restarts
        self._raw = dict(samples)
        if len(self._columns) > 2 * len(samples) + 64:
            self._compact(samples)
        for series in samples:
            self._columns.setdefault(series, len(self._columns))
        row = array("d", bytes(8 * len(self._columns)))
        for series, column in self._columns.items():
            row[column] = self._before.get(series, 0.0) + samples.get(series, 0.0)
        self._times.append(now)
        self._rows.append(row)
        self._forget(now)

    def _compact(self, samples: Mapping[Series, float]) -> None:
        """Drop the columns of series that are no longer told: a gateway's pods come and go for months."""
        old = [(series, column) for series, column in self._columns.items() if series in samples]
        self._rows = [array("d", (_at(row, column) for _, column in old)) for row in self._rows]
        self._columns = {series: column for column, (series, _) in enumerate(old)}
        self._before = {series: value for series, value in self._before.items() if series in samples}

    def _forget(self, now: float) -> None:
        """Older scrapes are thinned out, and end at the horizon."""
        keep: list[int] = []
        dense = bisect_left(self._times, now - DENSE_S)
        for index in range(dense):
            age = now - self._times[index]
            gap = SPARSE_S if age <= HORIZON_S else LONG_SPARSE_S
            near = keep and self._times[index] - self._times[keep[-1]] < gap
            if age <= self.horizon_s and not near:
                keep.append(index)
        if len(keep) == dense:
            return
        self._times = [self._times[index] for index in keep] + self._times[dense:]
        self._rows = [self._rows[index] for index in keep] + self._rows[dense:]

    def window(self, since: float, until: float = float("inf")) -> Window | None:
        """From the last scrape at or before `since` (else the first one) to the last one before `until`."""
        end = bisect_right(self._times, until)
        if end == 0:
            return None
        start = max(bisect_right(self._times, since, 0, end) - 1, 0)
        return Window(self._times[start], self._times[end - 1], self._columns, self._rows[start:end])

    def after(self, since: float) -> Window | None:
        """The scrapes at or after `since` alone; None without any."""
        start = bisect_left(self._times, since)
        if start == len(self._times):
            return None
        return Window(self._times[start], self._times[-1], self._columns, self._rows[start:])


@dataclass(frozen=True, slots=True)
class PodLoad:
    """What one engine pod has to do, in the numbers that scaling looks at."""

    uid: str
    waiting: float
    running: float
    kv_usage: float
    """Share of the KV blocks that running requests hold."""
    preemptions_per_minute: float
    first_token_p95_s: float | None = None
    """None: too few first tokens in the window to tell."""
    waiting_trend: float = 0.0
    """By how much `waiting` grows each second; below 0, the queue drains."""
    kv_wanted: float = 0.0
    """KV blocks of all live sessions, wherever they are now, as a share of this pod's blocks: may be above 1."""
    requests_per_s: float = 0.0
    """Finished requests."""
    tokens_per_s: float = 0.0
    """Generated tokens."""
    warmth: float = 0.0
    """Prompt tokens per second that the prefix cache saved: what would be lost with the pod."""
    sessions: float = 0.0
    """Agents' sessions that are live: a turn runs or is held, or the next one is expected."""
    kv_tokens: float = 0.0
    """What its KV pool holds; 0: it does not say."""


GAUGE_WINDOW_S = 20.0
RATE_WINDOW_S = 60.0
LEAST_SPAN_S = 14.0
"""A load is told once it has been seen for this long: three scrapes or four."""
_ENOUGH_FIRST_TOKENS = 5


def pod_load(uid: str, history: History | None, now: float, since: float = 0.0) -> PodLoad | None:
    """Measured not before `since`. None: not seen for long enough, not for too long, or no engine that says what it
    does."""
    last = history.last_scrape if history else None
    if history is None or last is None or now - last > FRESH_S:
        return None
    rates, gauges = (history.after(max(since, last - window)) for window in (RATE_WINDOW_S, GAUGE_WINDOW_S))
    if rates is None or gauges is None or rates.span_s < LEAST_SPAN_S:
        return None
    waiting, running, usage = gauges.mean(WAITING), gauges.mean(RUNNING), gauges.mean(KV_USAGE)
    if waiting is None or running is None or usage is None:
        return None
    first_tokens = rates.distribution(FIRST_TOKEN)
    return PodLoad(
        uid=uid,
        waiting=waiting,
        running=running,
        kv_usage=usage,
        # Over a minute at least, so that one preemption right after the start is not a rate of twelve.
        preemptions_per_minute=rates.increase(PREEMPTIONS) * 60.0 / max(rates.span_s, RATE_WINDOW_S),
        first_token_p95_s=first_tokens.quantile(0.95) if first_tokens.count >= _ENOUGH_FIRST_TOKENS else None,
        waiting_trend=rates.trend(WAITING),
        kv_wanted=_kv_wanted(gauges),
        requests_per_s=rates.increase(FINISHED) / rates.span_s,
        tokens_per_s=rates.increase(GENERATED) / rates.span_s,
        warmth=rates.increase(PREFIX_HITS) / rates.span_s,
        kv_tokens=_kv_tokens(gauges),
        sessions=sum(gauges.last(SESSIONS + state) or 0.0 for state in ("active", "acting", "held", "parked")),
    )


def _kv_wanted(gauges: Window) -> float:
    wanted = gauges.mean(SESSIONS + "kv_wanted_blocks")
    sizes = [dict(labels).get("num_gpu_blocks", "") for _, labels in gauges.series(CACHE_CONFIG)]
    blocks = sum(int(size) for size in sizes if size.isdigit())
    return wanted / blocks if wanted and blocks else 0.0


def _kv_tokens(gauges: Window) -> float:
    pools = [dict(labels) for _, labels in gauges.series(CACHE_CONFIG)]
    sizes = [(pool.get("num_gpu_blocks", ""), pool.get("block_size", "")) for pool in pools]
    return float(sum(int(blocks) * int(size) for blocks, size in sizes if blocks.isdigit() and size.isdigit()))


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for one service at one gateway."""

    requests: float = 0.0
    held: float = 0.0
    parked: float = 0.0
    """Sessions."""
    held_kv: float = 0.0
    other_kv: float = 0.0
    """Tokens of KV that its held sessions want, and its live and parked ones."""


Queues = dict[tuple[str, str], Waiting]
"""By namespace and service; for whom nothing waits is not in it."""


def waiting(samples: Iterable[tuple[Series, float]]) -> Queues:
    """What a gateway's page says; see `DEMAND`."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for (name, series_labels), value in samples:
        labels = dict(series_labels)
        if value > 0 and {"namespace", "service"} <= labels.keys():
            held = name == SESSIONS_KV and labels.get("state") == "held"
            field_name = "held_kv" if held else _WAITING_FIELDS.get(name)
            if field_name is not None:
                one = found.setdefault((labels["namespace"], labels["service"]), {})
                one[field_name] = one.get(field_name, 0.0) + value
    return {key: Waiting(**values) for key, values in found.items()}


_WAITING_FIELDS = {QUEUED: "requests", HELD_SESSIONS: "held", PARKED_SESSIONS: "parked", SESSIONS_KV: "other_kv"}


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits at the gateways: the mean of the last seconds."""

    length: float = 0.0
    """Requests."""
    trend: float = 0.0
    """By how much that grows each second."""
    sessions: float = 0.0
    """Agents' sessions that are held or parked."""
    kv_tokens: float = 0.0
    """What all sessions want that the gateways know, those included. One that several gateways know counts once: of the
    live and the parked the gateway that knows most is taken, of the held, who are at one gateway each, the sum."""


NO_QUEUE = Queue()
_NOTHING_WAITS = Waiting()


@dataclass(slots=True)
class Signals:
    """The histories of all pods that are scraped. Written by `scrape`, read by everybody else."""

    engines: dict[str, History] = field(default_factory=dict[str, History])
    """By pod UID."""
    gateways: dict[str, History] = field(default_factory=dict[str, History])
    queues: dict[str, deque[tuple[float, Queues]]] = field(default_factory=dict[str, "deque[tuple[float, Queues]]"])
    """By gateway pod UID: what it was asked in the last seconds, the oldest first."""

    def load(self, uid: str, now: float, since: float = 0.0) -> PodLoad | None:
        """What the engine pod has to do now, measured not before `since`; None when it does not say."""
        return pod_load(uid, self.engines.get(uid), now, since)

    def queued(self, uid: str, now: float, queues: Queues) -> None:
        """A gateway's answer: who waits there."""
        kept = self.queues.setdefault(uid, deque())
        kept.append((now, queues))
        while kept[0][0] < now - GAUGE_WINDOW_S:
            kept.popleft()

    def queue(self, namespace: str, service: str, now: float, since: float = 0.0) -> Queue:
        """What waits for a service at all gateways. What a silent gateway said last counts while fresh."""
        length, trend, key = 0.0, 0.0, (namespace, service)
        held, parked, held_kv, other_kv = 0.0, 0.0, 0.0, 0.0
        for kept in self.queues.values():
            last = kept[-1][0]
            if now - last > FRESH_S:
                continue
            told = [(at, queues.get(key, _NOTHING_WAITS)) for at, queues in kept if at >= min(since, last)]
            seen = [(at, one.requests) for at, one in told]
            length += sum(count for _, count in seen) / len(seen)
            held += sum(one.held for _, one in told) / len(told)
            held_kv += sum(one.held_kv for _, one in told) / len(told)
            parked = max(parked, sum(one.parked for _, one in told) / len(told))
            other_kv = max(other_kv, sum(one.other_kv for _, one in told) / len(told))
            third = len(seen) // 3
            if third:
                first, final = (sum(count for _, count in part) / third for part in (seen[:third], seen[-third:]))
                trend += (final - first) / ((seen[-1][0] - seen[0][0]) * (1 - third / len(seen)))
        return Queue(length, trend, held + parked, held_kv + other_kv)

    def gateway_windows(self, since: float) -> list[Window]:
        """One window for each gateway pod: what clients met, by namespace, service, revision and pod."""
        found = (history.window(since) for history in self.gateways.values())
        return [window for window in found if window is not None]

    def gateways_until(self, now: float) -> float | None:
        """Until when every gateway has told what clients met (Unix seconds), those aside that have long been silent
        while others tell. None: no gateway is known."""
        told = [history.last_scrape for history in self.gateways.values() if history.last_scrape is not None]
        fresh = [at for at in told if now - at <= FRESH_S]
        return min(fresh) if fresh else max(told, default=None)

    def retain(self, engines: set[str], gateways: set[str]) -> None:
        """Forget pods that are gone."""
        for known, alive in ((self.engines, engines), (self.gateways, gateways), (self.queues, gateways)):
            for uid in known.keys() - alive:
                del known[uid]
