"""docs/metrics.md: every metric that a component shows, from its own registry. `python -m tests.docs.metrics_page`
writes it; a test fails when it is not what the registries say.

A family says its name, its help and its labels. prometheus_client keeps the labels to itself until something is
counted, so they are read where it keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric

from mainsail_engine.config import CacheConfig
from mainsail_engine.metrics import COUNTERS, OLDER_NAMES, OLDER_RATES
from mainsail_engine.metrics import Metrics as EngineMetrics
from mainsail_engine.protocol import AdapterUse, Ready
from mainsail_fetch import progress
from mainsail_gateway.app import Gateway
from mainsail_gateway.kv_events import Listener
from mainsail_gateway.merge import WORKERS
from mainsail_gateway.settings import Settings
from mainsail_operator import sizing

PAGE = Path(__file__).parents[2] / "docs/metrics.md"
OLDER = {*OLDER_NAMES, *OLDER_RATES}
HEAD = """\
# Metrics

Made by `python -m tests.docs.metrics_page` from the registries themselves. Times are in seconds, shares from 0 to 1.
A histogram has the series `…_bucket{le}`, `…_sum` and `…_count`. What ends in `_created` says
when a series began.

The chart makes PodMonitors (of the Prometheus Operator) for operator, gateway and all engines with
`metrics.podMonitors.enabled`. Engines' series then carry `mainsail_dev_service` and `mainsail_dev_revision`. The
namespace of Prometheus must be among `networkPolicy.metricsNamespaces` to reach engines.
"""
OLDER_HEAD = """\
## Names that vLLM has given up

The engine shows them beside those that took their place.

| name | now |
|---|---|"""
PARTS = {
    "Engine": "`/metrics` on the port of the API (8000 in the cluster). Names under `vllm:` are vLLM's and mean the "
    "same; what it has given up stands at the end.",
    "Gateway": "`/metrics` on the health port (8081). `key_…` only with `--auth keys`, `kv_…` unless `--no-kv-events`, "
    "`workers` with `--workers` above 1.",
    "Operator": "`/metrics` on the health port (8081), besides what prometheus_client says of any Python process.",
    "Fetching a model": "`/metrics` on port 8002 of a pod that fetches, while it does; gauges without labels.",
}


def engine() -> Iterator[Metric]:
    """What an engine with adapters shows."""
    metrics = EngineMetrics("m", 8192)
    metrics.max_num_seqs = 1
    metrics.set_cache_info(Ready(8192, 100, 16, 256, [2], "cpu", "float32"), CacheConfig())
    metrics.set_adapters(1, lambda: AdapterUse())
    yield from metrics.registry.collect()


def gateway() -> CollectorRegistry:
    """What a gateway with API keys shows, but for WORKERS."""
    app = Gateway(Settings(auth="keys"))
    app.metrics.registry.register(Listener(app.fleet))
    return app.metrics.registry


def families(registry: CollectorRegistry) -> Iterator[tuple[Metric, tuple[str, ...]]]:
    """Every family, with its labels."""
    for collector in list(registry._collector_to_names):
        for family in collector.collect():
            yield family, labels_of(collector if isinstance(collector, MetricWrapperBase) else family)


def labels_of(kept: Any) -> tuple[str, ...]:
    return tuple(kept._labelnames)


def wire_name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


def _table(found: Iterable[tuple[Metric, tuple[str, ...]]]) -> str:
    rows = sorted(
        (wire_name(f), f.type, ", ".join(f"`{name}`" for name in names), f.documentation) for f, names in found
    )
    lines = [f"| `{name}` | {kind} | {names or '–'} | {help_} |" for name, kind, names, help_ in rows]
    return "\n".join(["| name | kind | labels | what |", "|---|---|---|---|", *lines])


def parts() -> dict[str, list[tuple[Metric, tuple[str, ...]]]]:
    """All of it, by heading. The older names are left out."""
    workers = Metric(WORKERS, "Processes behind the port that answer.", "gauge")
    operator = [
        (family, labels_of(metric))
        for metric in (sizing.DESIRED, sizing.PRESSURE, sizing.DECISIONS)
        if metric in REGISTRY._collector_to_names
        for family in metric.collect()
    ]
    helps = {
        progress.BYTES: "Bytes of the model that are there.",
        progress.TOTAL_BYTES: "Bytes of the model; 0: not known yet.",
        progress.COMPLETE: "1 when it is whole.",
    }
    return {
        "Engine": [(family, labels_of(family)) for family in engine() if family.name not in OLDER],
        "Gateway": [*families(gateway()), (workers, ())],
        "Operator": operator,
        "Fetching a model": [(Metric(name, help_, "gauge"), ()) for name, help_ in helps.items()],
    }


def names() -> set[str]:
    """Every series' name, as it is on the wire."""
    found = {wire_name(family) for group in parts().values() for family, _ in group}
    return found | {wire_name(family) for family in engine()}


def _suffix(name: str) -> str:
    return "_total" if name in COUNTERS else ""


def render() -> str:
    """The page."""
    sections = [f"## {title}\n\n{PARTS[title]}\n\n{_table(found)}\n" for title, found in parts().items()]
    older = [f"| `{old}{_suffix(new)}` | `{new}{_suffix(new)}` |" for old, new in sorted(OLDER_NAMES.items())]
    older += [f"| `{old}` | `{part}_total` / `{whole}_total` |" for old, (part, whole) in sorted(OLDER_RATES.items())]
    end = "\n".join([OLDER_HEAD, *older])
    return "\n".join([HEAD, *sections, end, ""])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
