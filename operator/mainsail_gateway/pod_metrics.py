"""What every pod gave: codes, time to the first token, time between tokens. Rollouts judge revisions by these.

A chunk of a stream is observed in well under a microsecond: no lock, no label look-up, no parsing (an engine sends a
chunk for each step, so the gaps between chunks are the gaps between tokens as a client sees them). Only the event
loop writes; the thread that is scraped reads whole integers, and a total may lag a bucket by one observation.

A pod's series stay for `LINGER_S` after its endpoint has left the table, so that the end of a drain is still seen and
an endpoint that is unready for a moment does not start from zero; then they go.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Set
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

LINGER_S = 120.0
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
"""vLLM's bounds for the time to the first token, so that both can be laid over one another, with finer ones below."""
INTER_TOKEN_BUCKETS = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
                       0.75, 1, 2.5, 5, 10)  # fmt: skip
"""vLLM's bounds for the time between tokens, with finer ones below 100 ms: a rollout compares ratios there."""

PodKey = tuple[str, str, str, str]
"""Namespace, service, revision, pod. Without a pod: answered by the gateway itself."""
LABELS = ("namespace", "service", "revision", "pod")


class Buckets:
    """A histogram without a lock."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus' form: each bound and how many are at most it."""
        bounds = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(bounds, accumulate(self.counts), strict=True))


class Stream:
    """The times of one stream's chunks: the first from when the request was sent, the others from the one before."""

    __slots__ = ("_gaps", "_last", "_next", "_on_first")

    def __init__(self, pod: "PodMetrics", sent: float, on_first: Callable[[float], None] | None = None) -> None:
        self._on_first = on_first
        self._next = pod.first_token
        self._gaps = pod.inter_token
        self._last = sent

    def arrived(self, now: float) -> None:
        gap = now - self._last
        self._next.observe(gap)
        if self._on_first is not None:
            self._on_first(gap)
            self._on_first = None
        self._next = self._gaps
        self._last = now


class PodMetrics:
    """What is counted for one pod."""

    __slots__ = ("codes", "first_token", "gone_at", "inter_token", "key")

    def __init__(self, key: PodKey) -> None:
        self.key = key
        self.codes: dict[int, int] = {}
        self.first_token = Buckets(FIRST_TOKEN_BUCKETS)
        self.inter_token = Buckets(INTER_TOKEN_BUCKETS)
        self.gone_at: float | None = None

    def count(self, code: int) -> None:
        self.codes[code] = self.codes.get(code, 0) + 1

    def stream(self, sent: float, on_first: Callable[[float], None] | None = None) -> Stream:
        """The clock of a stream whose request was sent at `sent`. on_first: told the time to the first chunk."""
        return Stream(self, sent, on_first)


class PodsCollector(Collector):
    """All pods' counts, as Prometheus reads them."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._pods: dict[PodKey, PodMetrics] = {}

    def of(self, key: PodKey) -> PodMetrics:
        found = self._pods.get(key)
        if found is None:
            found = self._pods[key] = PodMetrics(key)
        return found

    def retain(self, pods: Set[PodKey], services: Set[tuple[str, str]], now: float) -> None:
        """Forget the pods that are not among these, after a while, and at once what belongs to no service any more."""
        for key, pod in list(self._pods.items()):
            if not key[0]:
                continue
            if key[:2] not in services:
                del self._pods[key]
            elif key in pods or not key[3]:
                pod.gone_at = None
            elif pod.gone_at is None:
                pod.gone_at = now
            elif now - pod.gone_at >= LINGER_S:
                del self._pods[key]

    def describe(self) -> Iterator[Metric]:
        return iter(self._families())

    def collect(self) -> Iterator[Metric]:
        requests, first_token, inter_token = self._families()
        for key, pod in list(self._pods.items()):
            for code, count in sorted(pod.codes.items()):
                requests.add_metric((*key, str(code)), count)
            if key[3]:
                first_token.add_metric(key, pod.first_token.cumulative(), pod.first_token.sum)
                inter_token.add_metric(key, pod.inter_token.cumulative(), pod.inter_token.sum)
        yield from (requests, first_token, inter_token)

    def _families(self) -> tuple[CounterMetricFamily, HistogramMetricFamily, HistogramMetricFamily]:
        requests = CounterMetricFamily(
            self._prefix + "requests",
            "Requests by the pod that had them and HTTP status. 499: the client left first. 502 and 504 of a pod: it "
            "broke the exchange, or never answered, also where a retry hid that from the client. Without a pod: the "
            "gateway's own answers; without a service: none was found.",
            labels=(*LABELS, "code"),
        )
        first_token = HistogramMetricFamily(
            self._prefix + "time_to_first_token_seconds",
            "From the sending of a streamed request to a pod to the first chunk of its answer.",
            labels=LABELS,
        )
        inter_token = HistogramMetricFamily(
            self._prefix + "inter_token_seconds", "Between two chunks of a streamed answer.", labels=LABELS
        )
        return requests, first_token, inter_token
