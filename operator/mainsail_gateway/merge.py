"""Health, metrics and debug of several workers as those of one gateway. Each worker tells its own on a Unix socket.

Metrics are asked for when somebody asks here, so they are those of that moment. Counters, histograms and gauges add up,
except for what every worker says of the same thing (`SAME`). What a worker had counted when it was last asked stays in
the sums when it dies, so that no counter of the pod goes backwards; what it counted after that is lost with it.
"""

import http.client
import logging
import socket
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from urllib.parse import parse_qs, urlencode

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from mainsail_gateway.health import Checks, Health, checks

log = logging.getLogger(__name__)

ASK_S = 2.0
SAME = frozenset(
    "mainsail:gateway_" + name
    for name in ("endpoints", "name_conflicts", "invalid_keys", "parked_sessions", "kv_known_endpoints",
                 "kv_known_blocks")
)  # fmt: skip
"""Gauges that say (nearly) the same in every worker: the highest counts."""
SESSIONS_KV = "mainsail:gateway_sessions_kv_tokens"
"""So does this one, but for held sessions, each of which is held by one worker."""
WORKERS = "mainsail:gateway_workers"

Series = tuple[str, tuple[tuple[str, str], ...]]
"""Name and labels of a sample."""


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("worker", timeout=ASK_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ASK_S)
        self.sock.connect(str(self._path))


def ask(path: Path, target: str) -> tuple[int, bytes]:
    """GET from a worker. Raises OSError and HTTPException."""
    connection = _Connection(path)
    try:
        connection.request("GET", target)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def merged(families: Iterable[Metric], gone: Mapping[Series, float]) -> list[Metric]:
    """All workers' families as one of each name. gone: what dead workers had counted. Pure."""
    kinds: dict[str, Metric] = {}
    sums: dict[str, dict[Series, float]] = {}
    for family in families:
        kinds.setdefault(family.name, family)
        values = sums.setdefault(family.name, {})
        for sample in family.samples:
            series = sample.name, tuple(sorted(sample.labels.items()))
            if series not in values:
                values[series] = sample.value + gone.get(series, 0.0)
            else:
                values[series] = _joined(family, sample, values[series])
    for name, values in sums.items():
        for series in gone.keys() - values.keys():
            if _family_of(series[0]) == name:
                values[series] = gone[series]
    return [_family(kinds[name], values) for name, values in sums.items()]


def _joined(family: Metric, sample: Sample, known: float) -> float:
    if family.name.endswith("_created"):
        return min(known, sample.value)
    same = family.name in SAME or (family.name == SESSIONS_KV and sample.labels.get("state") != "held")
    return max(known, sample.value) if same else known + sample.value


def _family(kind: Metric, values: Mapping[Series, float]) -> Metric:
    family = Metric(kind.name, kind.documentation, kind.type)
    for (name, labels), value in values.items():
        family.add_sample(name, dict(labels), value)
    return family


def _family_of(sample: str) -> str:
    for suffix in ("_total", "_bucket", "_count", "_sum"):
        if sample.endswith(suffix):
            return sample.removesuffix(suffix)
    return sample


def counted(families: Iterable[Metric]) -> dict[Series, float]:
    """What only ever grows."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


class _Told(Collector):
    """Families that somebody else has collected."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


class Merged:
    """The workers, as the health port shows them. Used from its threads."""

    def __init__(self, sockets: Mapping[str, Path]) -> None:
        self.health = Health()
        """`draining` is told before any worker is asked."""
        self._sockets = sockets
        self._lock = threading.Lock()
        self._seen: dict[str, dict[Series, float]] = {}
        self._gone: dict[Series, float] = {}

    def lost(self, worker: str) -> None:
        """A worker died: what it had counted stays."""
        with self._lock:
            for series, value in self._seen.pop(worker, {}).items():
                self._gone[series] = self._gone.get(series, 0.0) + value

    def checks(self) -> Checks:
        return checks(lambda: self._all("live"), self._ready)

    def _ready(self) -> tuple[bool, str]:
        return (False, "draining") if self.health.draining else self._all("ready")

    def _all(self, what: str) -> tuple[bool, str]:
        """Whether all workers are; a client's connection may reach any of them."""
        for worker, path in self._sockets.items():
            try:
                status, text = ask(path, f"/health/{what}")
            except (OSError, http.client.HTTPException) as error:
                if what == "live":  # it is being started again: no reason to restart the others
                    continue
                return False, f"worker {worker}: {str(error) or type(error).__name__}"
            if status != 200:
                return False, f"worker {worker}: {text.decode(errors='replace').strip()}"
        return True, "ok"

    def metrics(self, names: Sequence[str]) -> bytes:
        """All workers' metrics, or only those of these names, in Prometheus' text form."""
        target = "/metrics?" + urlencode([("name[]", name) for name in names])
        answers = {worker: self._told_by(worker, target) for worker in self._sockets}
        told = [families for families in answers.values() if families is not None]
        gone = self._not_told({worker for worker, families in answers.items() if families is None})
        result = merged((family for families in told for family in families), gone)
        if not names or WORKERS in names:
            workers = GaugeMetricFamily(WORKERS, "Processes behind this port that answer.")
            workers.add_metric((), len(told))
            result.append(workers)
        registry = CollectorRegistry()
        registry.register(_Told(result))
        return generate_latest(registry)

    def _not_told(self, silent: Set[str]) -> dict[Series, float]:
        """What workers had counted that have died, or do not answer now."""
        with self._lock:
            gone = Counter(self._gone)
            for worker in silent:
                gone.update(self._seen.get(worker, {}))
        return dict(gone)

    def _told_by(self, worker: str, target: str) -> list[Metric] | None:
        """What one worker counts, which is remembered; None: it does not answer."""
        try:
            status, text = ask(self._sockets[worker], target)
        except (OSError, http.client.HTTPException) as error:
            log.warning("worker %s does not tell its metrics: %s", worker, str(error) or type(error).__name__)
            return None
        if status != 200:
            return None
        families = list(text_string_to_metric_families(text.decode()))
        with self._lock:
            self._seen.setdefault(worker, {}).update(counted(families))
        return families

    def debug(self, query: str) -> tuple[int, bytes]:
        """What one worker says; `worker=N` names which, without it the first."""
        worker = parse_qs(query).get("worker", ["0"])[-1]
        path = self._sockets.get(worker)
        if path is None:
            return 404, b'{"error": {"message": "there is no such worker"}}'
        try:
            return ask(path, "/debug/routes?" + query)
        except (OSError, http.client.HTTPException):
            return 503, b'{"error": {"message": "the worker does not answer"}}'
