"""spec.scaling: how many replicas, when the load decides."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from mainsail_operator.types.schema import Duration, Model, rule, rules

_LATENCY = re.compile(r"([0-9]{1,7})(ms|s)")


def latency_s(text: str) -> float:
    """`500ms` → 0.5. Raises ValueError for anything but whole milliseconds or seconds."""
    match = _LATENCY.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{text!r} is not a latency: write it as 500ms or 2s")
    return int(match[1]) / (1000 if match[2] == "ms" else 1)


def _check_latency(value: str) -> str:
    latency_s(value)
    return value


Latency = Annotated[
    str,
    AfterValidator(_check_latency),
    Field(
        max_length=9,
        json_schema_extra=rules(rule("self.matches('^0*[1-9][0-9]{0,6}(ms|s)$')", "write a latency as 500ms or 2s")),
    ),
]


class ScalingTargets(Model):
    """What one replica should have to bear. The worst of them, as a share of its target, is the replica's pressure:
    above 1 the service grows, and it shrinks when the others could carry everything below 0.8."""

    queue_depth: float = Field(
        default=4.0,
        ge=0.1,
        le=100_000,
        description="Requests that wait in one replica. They wait because its sequences or its KV cache are all taken; "
        "a small target keeps the time to the first token short, a large one saves replicas.",
    )
    kv_usage: float = Field(
        default=0.8,
        ge=0.05,
        le=1,
        description="Share of one replica's KV cache that running requests hold and agents' sessions want, 0 to 1. "
        "Near 1, requests are preempted and sessions lose their cache.",
    )
    preemptions_per_minute: float = Field(
        default=1.0,
        ge=0.1,
        le=100_000,
        description="Requests per minute that lose their KV cache to others in one replica. Long contexts in a small "
        "cache preempt long before a queue builds: the sign that queue and usage alone do not show.",
    )
    time_to_first_token_p95: Latency | None = Field(
        default=None,
        description="Of 20 requests, 19 should get their first token within this time, as 500ms or 2s. Default: not "
        "looked at. It must be above what an idle replica needs for your longest usual prompt, else no number of "
        "replicas reaches it and the service grows to its maximum.",
    )


class ScaleDownSpec(Model):
    """How the service shrinks: one replica at a time, the least loaded and coldest first, drained before it ends."""

    stabilization: Duration = Field(
        default="5m",
        description="How long the load must have been low enough for one replica fewer before one goes, as 90s, 5m or "
        "1h. Shorter than the usual lull between bursts, replicas come and go with every burst.",
    )


class ToZeroSpec(Model):
    """How the service stops altogether, where `min` is 0, and comes back when it is asked for."""

    after: Duration = Field(
        default="30m",
        description="How long nothing may have been asked before the last replica ends. The next request waits for "
        "the model to load, so let it be well above the usual pause.",
    )
    hold_requests: int = Field(
        default=200,
        ge=0,
        le=100_000,
        description="Requests that each gateway holds while the first replica starts. Further ones are refused with "
        "503 and Retry-After.",
    )
    hold_for: Duration = Field(
        default="10m",
        description="How long a held request waits at most. Longer than the model's slowest start; clients of streams "
        "get comments meanwhile, so that nothing on the way takes the connection for dead.",
    )


class ScalingSpec(Model):
    """Between how many replicas, and on which signs, the service grows and shrinks."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("self.min <= self.max", "scaling.min is above scaling.max: lower min or raise max", path=".min"),
        )
    )

    min: int = Field(
        default=1,
        ge=0,
        le=10_000,
        description="Fewest replicas. 0 lets the service stop when nobody asks (see toZero); the gateway then holds "
        "the next request while a replica starts.",
    )
    max: int = Field(
        ge=1,
        le=10_000,
        description="Most replicas: the bound on what this service may cost.",
    )
    targets: ScalingTargets = Field(
        default_factory=ScalingTargets,
        description="What one replica should have to bear. The worst of them decides.",
    )
    scale_down: ScaleDownSpec = Field(default_factory=ScaleDownSpec, description="How the service shrinks.")
    to_zero: ToZeroSpec = Field(
        default_factory=ToZeroSpec, description="How the service stops and comes back. Used only where min is 0."
    )
    without_gpu: Literal["Wait", "Create"] = Field(
        default="Wait",
        description="What happens to replicas for which no node has GPUs free. Wait: they are not created, and "
        "status.scaling.limitedBy says GPUs. Create: they are, and stay Pending, which is what a node autoscaler waits "
        "for before it adds nodes.",
    )
