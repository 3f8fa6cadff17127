"""Whether a new revision may have more of the requests: a pure judgement on what its pods showed since a step began.

    errors        share of a pod's requests that failed by its fault           ≤ maxErrorRate
    first token   90th percentile of the time to the first token, as a ratio   ≤ maxTimeToFirstTokenRatio
    inter token   the same of the time between tokens                          ≤ maxInterTokenRatio

The ratios are against the stable revision's pods taken together, in the same span of time, so that a busy hour does not
count against the newcomer. The newcomer is judged by its worst pod: one bad node among ten is a tenth of the users.

Samples are small at 10 % of the traffic, so each figure has a confidence interval (Wilson's for a share, order
statistics for a quantile; both one-sided at 95 %). Clearly bad fails at once, also before `minRequests`; clearly or
probably good passes from `minRequests` on; in between more requests are waited for, until at `DECISIVE` times
`minRequests` the point estimates decide. Differences below `RESOLUTION_S` are not seen: neither buckets nor clocks are
that good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mainsail_operator.signals import (
    GATEWAY_FIRST_TOKEN,
    GATEWAY_INTER_TOKEN,
    GATEWAY_REQUESTS,
    Distribution,
    Signals,
    Window,
    merged,
)
from mainsail_operator.types import RolloutGate

QUANTILE = 0.9
DECISIVE = 4
MIN_LATENCIES = 20
"""Fewer times than this say nothing about a 90th percentile."""
RESOLUTION_S = 0.005
_PROOF = 3
"""Failures of one pod below which a RollingUpdate is not stopped."""
_Z = 1.645
"""One-sided 95 %."""
_PATIENCE = 3
"""How many times `minReady` a pod with too few requests is watched: a service with little traffic rolls on all the
same."""
_CLIENTS_FAULT = 500
"""Below it a request failed by the client's fault, or succeeded."""

Outcome = Literal["Pass", "Fail", "Inconclusive"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one pod, or several taken together, showed."""

    pod: str
    requests: float = 0.0
    errors: float = 0.0
    """Requests that failed by the fault of the pod."""
    first_token: Distribution = field(default_factory=Distribution)
    inter_token: Distribution = field(default_factory=Distribution)


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: Outcome
    reason: str
    """A stable word."""
    message: str


def collect(signals: Signals, namespace: str, service: str, revision: str, since: float) -> list[Evidence]:
    """What the gateways saw of each pod of a revision since then (Unix seconds), all gateways added up."""
    windows = signals.gateway_windows(since)
    labels = {"namespace": namespace, "service": service, "revision": revision}
    series = {s for window in windows for s in window.series(GATEWAY_REQUESTS, **labels)}
    pods = sorted({dict(labelled)["pod"] for _, labelled in series} - {""})
    return [_of_pod(windows, pod, labels | {"pod": pod}) for pod in pods]


def _of_pod(windows: Sequence[Window], pod: str, labels: dict[str, str]) -> Evidence:
    requests = errors = 0.0
    for window in windows:
        for code in {dict(labelled)["code"] for _, labelled in window.series(GATEWAY_REQUESTS, **labels)}:
            count = window.increase(GATEWAY_REQUESTS, **labels, code=code)
            # A client that left says nothing about the pod.
            requests += count if code != "499" else 0.0
            errors += count if code.isdigit() and int(code) >= _CLIENTS_FAULT else 0.0
    return Evidence(
        pod=pod,
        requests=requests,
        errors=errors,
        first_token=merged(window.distribution(GATEWAY_FIRST_TOKEN, **labels) for window in windows),
        inter_token=merged(window.distribution(GATEWAY_INTER_TOKEN, **labels) for window in windows),
    )


def together(evidence: Iterable[Evidence], name: str) -> Evidence:
    """Several pods as if they were one."""
    found = list(evidence)
    return Evidence(
        pod=name,
        requests=sum(one.requests for one in found),
        errors=sum(one.errors for one in found),
        first_token=merged(one.first_token for one in found),
        inter_token=merged(one.inter_token for one in found),
    )


def judge(gate: RolloutGate, canary: Sequence[Evidence], stable: Evidence) -> Verdict:
    """canary: the new revision's pods. stable: the old one's, taken together."""
    whole = together(canary, "all of them")
    enough = whole.requests >= gate.min_requests
    decisive = whole.requests >= DECISIVE * gate.min_requests
    verdicts = [_errors(gate, pod, decisive) for pod in canary] + [
        _slower(what, limit, pod, canary_times, stable_times, decisive)
        for what, limit, pick in (
            ("time to the first token", gate.max_time_to_first_token_ratio, _first_token),
            ("time between tokens", gate.max_inter_token_ratio, _inter_token),
        )
        for pod, canary_times, stable_times in [(one.pod, pick(one), pick(stable)) for one in (*canary, whole)]
    ]
    failed = next((verdict for verdict in verdicts if verdict.outcome == "Fail"), None)
    if failed:
        return failed
    if not enough:
        message = f"{whole.requests:.0f} of {gate.min_requests} requests seen"
        return Verdict("Inconclusive", "WaitingForRequests", message)
    unsure = next((verdict for verdict in verdicts if verdict.outcome == "Inconclusive"), None)
    if unsure:
        return unsure
    return Verdict("Pass", "GatePassed", _summary(whole, stable))


def judge_errors(gate: RolloutGate, canary: Sequence[Evidence], stable: Evidence) -> Verdict:
    """What a RollingUpdate is judged by: whether a new pod clearly fails, by the gate's limit and beside the old ones.

    Times say nothing while old pods drain and new ones are cold. A few failures are no proof: there are requests that
    break whoever answers them."""
    tolerated = max(gate.max_error_rate, stable.errors / stable.requests if stable.requests else 0.0)
    for pod in canary:
        if pod.errors >= _PROOF and wilson_lower(pod.errors, pod.requests) > tolerated:
            return _errors(gate, pod, decisive=True)
    return Verdict("Pass", "ErrorRate", "")


@dataclass(frozen=True, slots=True)
class Watch:
    """How far a RollingUpdate's new pods have been watched. Times are Unix seconds."""

    since: float = 0.0
    """Since when this operator asks the gateways about them: what another one saw before is not known."""
    until: float | None = None
    """When all gateways had last told; None: none is known, so there is nothing to wait for."""
    requests: Mapping[str, float] = field(default_factory=dict[str, float])
    """What each pod has answered, by name; the old revision's too."""


def proven(pod: str, serving_since: float, watch: Watch, gate: RolloutGate, min_ready_s: float, now: float) -> bool:
    """Whether a pod that serves, and was not found to fail, has been watched for long enough to replace another.

    That is `min_ready_s` with `minRequests` answered, or where nobody has answered any; else `longest_proof`: requests
    may be few, or long. What the gateways have not told of does not count: while they are silent, nobody knows, and
    nobody is served either."""
    watched_s = (now if watch.until is None else min(now, watch.until)) - max(serving_since, watch.since)
    enough = watch.requests.get(pod, 0.0) >= gate.min_requests or not any(watch.requests.values())
    return watched_s >= (min_ready_s if enough else longest_proof(min_ready_s))


def longest_proof(min_ready_s: float) -> float:
    """Seconds after which a pod that was not found to fail is taken for good."""
    return _PATIENCE * min_ready_s


def _first_token(evidence: Evidence) -> Distribution:
    return evidence.first_token


def _inter_token(evidence: Evidence) -> Distribution:
    return evidence.inter_token


def _errors(gate: RolloutGate, pod: Evidence, decisive: bool) -> Verdict:
    if not pod.errors:
        return Verdict("Pass", "ErrorRate", "")
    rate = pod.errors / pod.requests
    message = (
        f"{pod.errors:.0f} of {pod.requests:.0f} requests of pod {pod.pod} failed: {rate:.1%}, "
        f"and maxErrorRate is {gate.max_error_rate:.1%}"
    )
    if rate <= gate.max_error_rate:
        return Verdict("Pass", "ErrorRate", "")
    sure = wilson_lower(pod.errors, pod.requests) > gate.max_error_rate
    return Verdict("Fail" if sure or decisive else "Inconclusive", "ErrorRate", message)


def wilson_lower(errors: float, requests: float) -> float:
    """The lower end of Wilson's interval for a share (E. B. Wilson, 1927)."""
    if requests <= 0:
        return 0.0
    share, z2 = errors / requests, _Z * _Z
    centre = share + z2 / (2 * requests)
    spread = _Z * math.sqrt(share * (1 - share) / requests + z2 / (4 * requests * requests))
    return max(0.0, (centre - spread) / (1 + z2 / requests))


def _slower(
    what: str, limit: float, pod: str, canary: Distribution, stable: Distribution, decisive: bool
) -> Verdict:  # fmt: skip
    if min(canary.count, stable.count) < MIN_LATENCIES:
        return Verdict("Pass", "TooFewTimes", "")
    here, there = canary.quantile(QUANTILE), stable.quantile(QUANTILE)
    if here is None or there is None or here <= max(limit * there, there + RESOLUTION_S):
        return Verdict("Pass", "Latency", "")
    low, high = _bounds(canary)[0], _bounds(stable)[1]
    sure = low > max(limit * high, high + RESOLUTION_S)
    ratio = here / there if there else math.inf
    message = (
        f"the {what} of pod {pod} is {here * 1000:.0f} ms (90th percentile), {ratio:.1f} times the stable revision's "
        f"{there * 1000:.0f} ms, and {limit:g} times is allowed"
    )
    return Verdict("Fail" if sure or decisive else "Inconclusive", "Latency", message)


def _bounds(times: Distribution) -> tuple[float, float]:
    """An interval for the quantile: the observations between whose ranks it lies with 95 % on either side."""
    spread = _Z * math.sqrt(QUANTILE * (1 - QUANTILE) / times.count)
    low, high = times.quantile(max(0.0, QUANTILE - spread)), times.quantile(min(1.0, QUANTILE + spread))
    return low or 0.0, high or 0.0


def _summary(canary: Evidence, stable: Evidence) -> str:
    parts = [f"{canary.requests:.0f} requests, {canary.errors:.0f} failed"]
    for what, here, there in (
        ("first token", canary.first_token, stable.first_token),
        ("between tokens", canary.inter_token, stable.inter_token),
    ):
        a, b = here.quantile(QUANTILE), there.quantile(QUANTILE)
        if a is not None and b is not None:
            parts.append(f"{what} {a * 1000:.0f} ms beside {b * 1000:.0f} ms")
    return ", ".join(parts)
