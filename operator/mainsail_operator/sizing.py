"""How many replicas now: spec.replicas, or what `autoscale` decides; and what the status says about it.

The status is the memory that survives the operator: the number, when it last changed, since when the service is idle,
what a full replica carried. It is written when something of that changes, not when a figure moves: a busy service must
not cost a write every few seconds. Figures that move are metrics of the operator:

    mainsail:scaling_desired_replicas{namespace,service}
    mainsail:scaling_pressure{namespace,service}          mean over the replicas; above 1 the service grows
    mainsail:scaling_decisions_total{namespace,service,reason}
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client import Counter, Gauge

from mainsail_operator import autoscale
from mainsail_operator.autoscale import Decision, Fleet, Memory
from mainsail_operator.objects import Owner
from mainsail_operator.observe import Observed, Pod
from mainsail_operator.signals import NO_QUEUE, PodLoad, Queue, Signals
from mainsail_operator.status import Finding, timed
from mainsail_operator.store import Key
from mainsail_operator.types import Capacity as CapacityStatus
from mainsail_operator.types import (
    Condition,
    InferenceServiceSpec,
    InferenceServiceStatus,
    ScalingSpec,
    ScalingStatus,
)

WAKE = "mainsail.dev/wake"
"""Annotation of an InferenceService: an RFC 3339 time at which a service at zero is to start."""
SETTLING_S = 21.0
"""Load is looked at when the newest replica has served for this long; until then, all that serve count as starting."""
REFUSED_S = 5.0
"""A pod that the scheduler has refused for this long is taken for one without a place."""
_IDLE_TOLD_S = 60.0
"""Idleness is told when it has lasted: with sporadic requests it would change with each of them."""

_LABELS = ("namespace", "service")
DESIRED = Gauge("mainsail:scaling_desired_replicas", "Replicas that the service should have.", _LABELS)
PRESSURE = Gauge("mainsail:scaling_pressure", "Mean pressure of the replicas; above 1 the service grows.", _LABELS)
DECISIONS = Counter("mainsail:scaling_decisions", "Changes of the number of replicas.", (*_LABELS, "reason"))
_LIMITS = {"GPUs": "no node has GPUs for more", "max": "spec.scaling.max is reached"}
_STATES = {
    "WithinTargets": "The load asks for no other number of replicas.",
    "Starting": "Replicas are on their way; the load is looked at again when they serve.",
    "AtZero": "Nothing is asked; the next request starts a replica.",
}


@dataclass(frozen=True, slots=True)
class Sized:
    desired: int
    status: ScalingStatus
    memory: Memory
    decision: Decision | None = None
    """None: spec.replicas is the number."""

    def effective(self, spec: InferenceServiceSpec) -> InferenceServiceSpec:
        """The spec with the number of replicas that counts."""
        return spec.model_copy(update={"replicas": self.desired})

    def told(
        self, status: InferenceServiceStatus, generation: int, old: Sequence[Condition], now: float
    ) -> InferenceServiceStatus:
        """The status, with what it says about scaling."""
        conditions = list(status.conditions)
        if self.decision is not None:
            conditions.append(timed(_active(self.decision), generation, old, now))
        return status.model_copy(update={"scaling": self.status, "conditions": conditions})


class Sizer:
    """Sizes every service, and remembers of each what one decision leaves to the next."""

    def __init__(self, signals: Signals, room: Callable[[InferenceServiceSpec], int | None]) -> None:
        self._signals = signals
        self._room = room
        self._memories: dict[Key, tuple[str, Sized]] = {}
        """With the service's UID: a new one of the same name starts anew."""

    def watches(self, key: Key) -> bool:
        """Whether its load decides its replicas."""
        return key in self._memories

    def forget(self, key: Key) -> None:
        """The service is gone, or its replicas are set by hand."""
        if self._memories.pop(key, None) is not None:
            for metric in (DESIRED, PRESSURE):
                with contextlib.suppress(KeyError):
                    metric.remove(*key)

    def size(
        self, owner: Owner, spec: InferenceServiceSpec, observed: Observed, annotations: Mapping[str, str],
        told: ScalingStatus | None, now: float,
    ) -> Sized:  # fmt: skip
        key = (owner.namespace, owner.name)
        if spec.scaling is None:
            self.forget(key)
            return size(spec, observed, _unheard, lambda since: NO_QUEUE, None, annotations, told, None, now)
        uid, last = self._memories.get(key, ("", None))
        if last is None or uid != owner.uid or _is_newer(told, last.status):
            last = None
        else:
            told = last.status  # the watch may not have brought back yet what was written last
        found = size(
            spec, observed, lambda pod, since: self._signals.load(pod.uid, now, since),
            lambda since: self._signals.queue(*key, now, since), self._room(spec), annotations, told,
            last.memory if last else None, now,
        )  # fmt: skip
        self._memories[key] = (owner.uid, found)
        DESIRED.labels(*key).set(found.desired)
        if found.decision is not None and found.decision.pressure is not None:
            PRESSURE.labels(*key).set(found.decision.pressure)
        if told is not None and told.desired != found.desired:
            DECISIONS.labels(*key, found.status.reason).inc()
        return found


def _is_newer(told: ScalingStatus | None, remembered: ScalingStatus) -> bool:
    """Another leader has decided since."""
    return (_unix(told.last_scale_time if told else None) or 0.0) > (_unix(remembered.last_scale_time) or 0.0)


def _unheard(pod: Pod, since: float) -> None:
    """Nobody asks the pods."""


def size(
    spec: InferenceServiceSpec, observed: Observed, load: Callable[[Pod, float], PodLoad | None],
    queue: Callable[[float], Queue],
    room: int | None, annotations: Mapping[str, str], told: ScalingStatus | None, known: Memory | None, now: float,
) -> Sized:  # fmt: skip
    """Pure. load, queue: a pod's load, and who waits at the gateways, measured since a time. told: the status that is
    there.

    known: what the last pass of this process left; without it, the status and the pods are asked. now: Unix seconds."""
    if spec.scaling is None:
        status = ScalingStatus(desired=spec.replicas, reason="Replicas", message="spec.replicas is the number")
        return Sized(spec.replicas, status, Memory(spec.replicas))
    before = known or _remembered(spec.scaling, observed, told)
    fleet = _fleet(spec, observed, load, queue, room, _woken(annotations, told, now), now)
    decision = autoscale.autoscale(spec.scaling, fleet, before, now)
    return Sized(decision.desired, _status(decision, told, now), decision.memory, decision)


def _active(decision: Decision) -> Finding:
    """The condition ScalingActive. Its words change with the state, not with the figures."""
    if decision.reason == "MetricsMissing":
        return Finding("ScalingActive", "False", "MetricsMissing", "Replicas that serve do not tell their load (GET "
                       "/metrics on port 8000): the service does not shrink.")  # fmt: skip
    if decision.limited_by:
        return Finding("ScalingActive", "True", f"LimitedBy{decision.limited_by.capitalize()}",
                       f"The load asks for more replicas: {_LIMITS[decision.limited_by]}.")  # fmt: skip
    if decision.reason in _STATES:
        return Finding("ScalingActive", "True", decision.reason, _STATES[decision.reason])
    return Finding("ScalingActive", "True", "Starting", _STATES["Starting"])


def _remembered(scaling: ScalingSpec, observed: Observed, told: ScalingStatus | None) -> Memory:
    """What a new leader starts from: the status; without one, the replicas that are there."""
    if told is None or told.reason == "Replicas":
        replicas = sum(revision.replicas for revision in observed.revisions)
        return Memory(min(max(replicas, scaling.min, 1), scaling.max))
    capacity = told.capacity
    return Memory(
        desired=told.desired,
        idle_since=_unix(told.idle_since),
        capacity=autoscale.Capacity(capacity.requests_per_second, capacity.tokens_per_second) if capacity else None,
    )


def _fleet(
    spec: InferenceServiceSpec, observed: Observed, load: Callable[[Pod, float], PodLoad | None],
    queue: Callable[[float], Queue],
    room: int | None, woken: bool, now: float,
) -> Fleet:  # fmt: skip
    alive = [pod for revision in observed.revisions for pod in revision.alive]
    serving = [pod for pod in alive if pod.serving]
    # What was measured before the newest replica served is no reason for another one.
    newest = max((pod.progress for pod in serving), default=0.0)
    settled = serving if now - newest > SETTLING_S else []
    return Fleet(
        loads=[load(pod, newest) for pod in settled],
        starting=sum(pod.scheduled for pod in alive) - len(settled),
        unplaced=sum(
            pod.unschedulable_since is not None and now - pod.unschedulable_since > REFUSED_S for pod in alive
        ),
        queue=queue(newest if serving else now - 3.0),
        woken=woken,
        room=room,
        slots=spec.engine.max_num_seqs,
    )


def _woken(annotations: Mapping[str, str], told: ScalingStatus | None, now: float) -> bool:
    """The annotation's time has come, and the number has not changed since then."""
    at = _unix(annotations.get(WAKE))
    return at is not None and at <= now + 1 and at >= (_unix(told.last_scale_time if told else None) or 0.0)


def _status(decision: Decision, told: ScalingStatus | None, now: float) -> ScalingStatus:
    old = told if told is not None and told.reason != "Replicas" else None
    found = old or ScalingStatus(desired=decision.desired, reason=decision.reason, message=decision.message)
    if old is not None and old.desired != decision.desired:
        message = f"{old.desired} → {decision.desired}: {decision.message}"
        found = old.model_copy(
            update={"desired": decision.desired, "reason": decision.reason, "message": message[:512],
                    "last_scale_time": _stamp(now)}
        )  # fmt: skip
    idle = decision.memory.idle_since
    return found.model_copy(
        update={
            "limited_by": decision.limited_by,
            "idle_since": _stamp(idle) if idle is not None and now - idle >= _IDLE_TOLD_S else None,
            "capacity": _capacity(decision.memory.capacity, found.capacity),
        }
    )


def _capacity(found: autoscale.Capacity | None, told: CapacityStatus | None) -> CapacityStatus | None:
    """What is told already, unless it is more than a tenth off."""
    if found is None:
        return told
    new = CapacityStatus(
        requests_per_second=float(f"{found.requests_per_s:.3g}"), tokens_per_second=float(f"{found.tokens_per_s:.3g}")
    )
    if told is None:
        return new
    pairs = (
        (new.requests_per_second, told.requests_per_second),
        (new.tokens_per_second, told.tokens_per_second),
    )
    return told if all(abs(one - other) <= 0.1 * max(one, other) for one, other in pairs) else new


def _stamp(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unix(timestamp: str | None) -> float | None:
    try:
        return datetime.fromisoformat(timestamp).timestamp() if timestamp else None
    except ValueError:
        return None
