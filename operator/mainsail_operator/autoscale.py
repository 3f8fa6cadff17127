"""How many replicas the load asks for: a pure function of signals, spec, what was decided before, and the clock.

**Growing.** A replica's *pressure* is the worst of its signals, each as a share of its target: requests waiting, KV
cache held and wanted by sessions, preemptions per minute, p95 of the time to the first token. The fleet wants
`ceil(serving · mean pressure)` replicas, where the mean is more than a tolerance of 10 % above 1. Three things keep it
from overshooting: at most twice what serves in one step, replicas that are still starting being capacity to come; what
was measured before the newest replica served does not ask for another; and a queue that drains by itself within a
minute is none, nor is a late first token behind it (more replicas would not shorten it: requests do not move). Where it
is known what a full replica carries, a step may be larger: as many as the requests that arrive would fill, so that a
burst need not wait for one start after another.

**Shrinking.** One replica at a time, and only to a number that would have had a pressure below 0.8 at every moment of
the stabilization window. Queues and preemptions are blind below the point where a replica is full, so the simulation
looks at two things more: the sequences that would run at once, and the throughput, against what one replica was seen to
carry when it was full (`Capacity`, learned). Without that a service flaps: two replicas look idle, one is too few.
A step back that had to be taken back within the hour makes it more patient: the window in which the fewer replicas
would have had to do is twice as long from then on, up to an hour, and half as long again after an hour without regret.
So load that comes in bursts finds the replicas of the last one, and a day's slow curve costs nothing more.

**Doubt.** A serving replica that does not tell its load never lets the service shrink; the others go on growing it.

Requests that wait at the gateway count as every replica's queue: the gateway lets no more through than replicas keep
up with, so under load most of the queue is there.

Agents' sessions that gateways hold or park, for want of KV, show as no request anywhere that waits. While there are
any, what all sessions want together is a share of the replicas' KV like any other.

**Zero.** With `min: 0`, the last replica ends when nothing was asked for `toZero.after`. From zero, requests held at
the gateway or the annotation `mainsail.dev/wake` start as many replicas as the held requests fill.

The ideas that are others': pressure from queue and KV, and simulating one replica fewer, from llm-d's saturation
scaler; tolerance and stabilization window from Kubernetes' HorizontalPodAutoscaler. The learned capacity is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mainsail_operator.signals import NO_QUEUE, PodLoad, Queue
from mainsail_operator.types import ScalingSpec, latency_s, seconds

TOLERANCE = 0.1
CALM = 0.8
"""The pressure below which one replica fewer would still be comfortable."""
DRAINS_S = 60.0
"""A queue that will be gone in this time needs no replica: that would not have started by then."""
REGRET_S = 3600.0
"""Growing again this soon after shrinking was a mistake."""
MOST_PATIENCE = 12
"""Stabilization windows that load is remembered for at most: an hour, by default."""
LEAP = 4
"""How many times what serves there may be after one step, where arrivals and capacity are known."""
HEADROOM = 1.15
"""What a step for the requests that arrive leaves free."""
CLEARS_S = 180.0
"""In which the replicas of such a step are to clear what waits."""
_LEARNING = 0.2

Reason = Literal[
    "QueueDepth", "KvUsage", "Preemptions", "TimeToFirstToken", "HeldSessions", "HeldRequests", "Woken", "LowLoad",
    "NoRoom", "Idle", "Bounds", "WithinTargets", "Starting", "MetricsMissing", "AtZero",
]  # fmt: skip
Limit = Literal["", "GPUs", "max"]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one full replica carried."""

    requests_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision leaves to the next. What is not about shrinking is in the status, so a new leader goes on with
    it; and a new leader watches for a whole stabilization window before it shrinks anything."""

    desired: int
    idle_since: float | None = None
    """Unix seconds since which nothing was asked."""
    capacity: Capacity | None = None
    watched_since: float | None = None
    """Unix seconds since which every serving replica has told its load."""
    needs: tuple[tuple[float, int], ...] = ()
    """When how many replicas were needed, within `patience` windows: the falling maxima, the oldest first."""
    patience: int = 1
    """Stabilization windows in which fewer replicas must have been enough."""
    shrank_at: float | None = None
    """Unix seconds of the last step back that is neither regretted nor forgotten."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The service's replicas and what is asked of them, at one moment."""

    loads: Sequence[PodLoad | None]
    """One for each replica that serves; None: it does not tell."""
    starting: int = 0
    """Replicas that have a place and do not serve yet."""
    unplaced: int = 0
    """Replicas that the scheduler has no place for."""
    queue: Queue = NO_QUEUE
    """What waits for it at the gateways."""
    woken: bool = False
    """Somebody asked for it by annotation."""
    room: int | None = None
    """Further replicas that the nodes have GPUs for; None: not known, or it needs none."""
    slots: int = 256
    """Sequences that one replica runs at once (engine.maxNumSeqs)."""

    @property
    def serving(self) -> int:
        return len(self.loads)


@dataclass(frozen=True, slots=True)
class Decision:
    desired: int
    reason: Reason
    message: str
    memory: Memory
    limited_by: Limit = ""
    pressure: float | None = None
    """Mean over the replicas that tell; None: none does."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """The worst signal of one replica."""

    value: float
    reason: Reason
    told: str


def pressure_of(load: PodLoad, spec: ScalingSpec) -> Pressure:
    """Each signal as a share of its target; the largest."""
    targets = spec.targets
    waiting = _undrained(load.waiting, load.waiting_trend)
    kv = max(load.kv_usage, load.kv_wanted)
    found = [
        Pressure(waiting / targets.queue_depth, "QueueDepth",
                 f"{load.waiting:.1f} requests wait, target {targets.queue_depth:g}"),
        Pressure(kv / targets.kv_usage, "KvUsage",
                 f"{kv:.0%} of the KV cache is wanted, target {targets.kv_usage:.0%}"),
        Pressure(load.preemptions_per_minute / targets.preemptions_per_minute, "Preemptions",
                 f"{load.preemptions_per_minute:.1f} preemptions a minute, target {targets.preemptions_per_minute:g}"),
    ]  # fmt: skip
    drains = load.waiting_trend * DRAINS_S < -targets.queue_depth / 4
    if targets.time_to_first_token_p95 is not None and load.first_token_p95_s is not None and not drains:
        target = latency_s(targets.time_to_first_token_p95)
        told = f"first tokens take {load.first_token_p95_s:.2f} s (p95), target {target:g} s"
        found.append(Pressure(load.first_token_p95_s / target, "TimeToFirstToken", told))
    return max(found, key=lambda pressure: pressure.value)


def _undrained(length: float, trend: float) -> float:
    """What will be left of a queue by when another replica could help with it."""
    return max(0.0, length + min(0.0, trend) * DRAINS_S)


def _queue_pressure(fleet: Fleet, spec: ScalingSpec) -> Pressure:
    """Each replica's share of the requests that wait at the gateways."""
    share = fleet.queue.length / max(1, fleet.serving)
    waits = _undrained(fleet.queue.length, fleet.queue.trend) / max(1, fleet.serving)
    target = spec.targets.queue_depth
    return Pressure(waits / target, "QueueDepth", f"{share:.1f} requests for each replica wait, target {target:g}")


def _session_pressure(fleet: Fleet, told: Sequence[PodLoad], spec: ScalingSpec) -> Pressure:
    """What agents' sessions want of the KV, while gateways hold or park some of them for want of it."""
    queue, pools = fleet.queue, sum(load.kv_tokens for load in told)
    if queue.sessions <= 0 or pools <= 0:
        return Pressure(0.0, "HeldSessions", "no session is held")
    share = queue.kv_tokens / (pools * fleet.serving / len(told))
    message = f"{queue.sessions:.0f} agent sessions are held or parked, and all want {share:.0%} of the KV cache"
    return Pressure(share / spec.targets.kv_usage, "HeldSessions", f"{message}, target {spec.targets.kv_usage:.0%}")


def autoscale(spec: ScalingSpec, fleet: Fleet, before: Memory, now: float) -> Decision:
    """now: Unix seconds."""
    current = min(max(before.desired, spec.min), spec.max)
    told = [load for load in fleet.loads if load is not None]
    memory = replace(before, desired=current, capacity=_learned(before.capacity, told, spec, fleet.slots))
    if current == 0:
        return _from_zero(spec, fleet, _unwatched(memory))
    if current != before.desired:
        message = f"scaling allows {spec.min} to {spec.max} replicas"
        return _changed(_unwatched(memory), current, "Bounds", message)
    if not told:
        if fleet.serving == 0:
            return Decision(current, "Starting", "no replica serves yet", _unwatched(memory))
        return Decision(
            current, "MetricsMissing", f"none of {fleet.serving} replicas tells its load", _unwatched(memory)
        )
    pressures = [pressure_of(load, spec) for load in told]
    at_gateway = _queue_pressure(fleet, spec)
    worst = max([*pressures, at_gateway], key=lambda pressure: pressure.value)
    mean = sum(pressure.value for pressure in pressures) / len(told) + at_gateway.value
    sessions = _session_pressure(fleet, told, spec)
    if sessions.value > mean:
        mean, worst = sessions.value, sessions
    silent = fleet.serving - len(told)
    memory = _unwatched(memory) if silent else _watched(spec, fleet, told, memory, mean, now)
    if mean > 1 + TOLERANCE:
        decision = _grow(spec, fleet, told, replace(memory, idle_since=None), mean, worst, now)
    elif silent:
        decision = Decision(current, "MetricsMissing", f"{silent} of {fleet.serving} replicas do not tell", memory)
    else:
        decision = _shrink(spec, fleet, told, memory, mean, now)
    return replace(decision, pressure=mean)


def _regretted(memory: Memory, now: float) -> Memory:
    """It grows. Soon after it shrank, that was too hasty."""
    if memory.shrank_at is None or now - memory.shrank_at >= REGRET_S:
        return memory
    return replace(memory, patience=min(2 * memory.patience, MOST_PATIENCE), shrank_at=None)


def _changed(memory: Memory, desired: int, reason: Reason, message: str, limited_by: Limit = "") -> Decision:
    return Decision(desired, reason, message, replace(memory, desired=desired), limited_by)


def _unwatched(memory: Memory) -> Memory:
    """The load is not known: nothing may shrink before a whole window has been seen again."""
    return replace(memory, watched_since=None, idle_since=None)


def _watched(
    spec: ScalingSpec, fleet: Fleet, told: Sequence[PodLoad], memory: Memory, mean: float, now: float
) -> Memory:
    """Notes how many replicas this moment needs; what is older than the windows that count is forgotten."""
    if memory.shrank_at is not None and now - memory.shrank_at >= REGRET_S:
        memory = replace(memory, patience=max(1, memory.patience // 2), shrank_at=None)
    need = needed(fleet, told, memory.capacity, mean)
    since = now - seconds(spec.scale_down.stabilization) * memory.patience
    kept = [(at, count) for at, count in memory.needs if count > need and at >= since]
    watched = memory.watched_since if memory.watched_since is not None else now
    return replace(memory, needs=(*kept, (now, need)), watched_since=watched)


def needed(fleet: Fleet, told: Sequence[PodLoad], capacity: Capacity | None, mean: float) -> int:
    """The smallest number of replicas that would have a pressure below `CALM`, were everything spread over them."""
    sequences = sum(load.running + load.waiting for load in told) + fleet.queue.length
    demand = [mean * fleet.serving, sequences / fleet.slots]
    if capacity is not None:
        requests, tokens = _throughput(told)
        demand += [requests / capacity.requests_per_s] if capacity.requests_per_s > 0 else []
        demand += [tokens / capacity.tokens_per_s] if capacity.tokens_per_s > 0 else []
    # A throughput next to nothing divides to infinity; a million is more than anybody has.
    return math.floor(min(max(demand), 1e6) / CALM) + 1


def _from_zero(spec: ScalingSpec, fleet: Fleet, memory: Memory) -> Decision:
    if fleet.queue.length <= 0 and not fleet.woken:
        return Decision(0, "AtZero", "nothing is asked", memory)
    wanted = min(max(1, math.ceil(fleet.queue.length / fleet.slots)), spec.max)
    if spec.without_gpu == "Wait" and fleet.room is not None:
        wanted = min(wanted, max(1, fleet.room))  # the first one is worth waiting for, Pending or not
    if fleet.queue.length > 0:
        return _changed(memory, wanted, "HeldRequests", f"the gateway holds {fleet.queue.length:.0f} requests")
    return _changed(memory, wanted, "Woken", "woken by annotation")


def filled(fleet: Fleet, told: Sequence[PodLoad], capacity: Capacity | None) -> int:
    """Replicas that the requests that arrive would fill, with what waits cleared in `CLEARS_S`; 0: not known.

    What arrives is what is finished and what the queues grow by."""
    if capacity is None or capacity.requests_per_s <= 0 or not told:
        return 0
    alike = fleet.serving / len(told)
    arriving = sum(load.requests_per_s + max(0.0, load.waiting_trend) for load in told) * alike
    waiting = sum(load.waiting for load in told) * alike + fleet.queue.length
    rate = HEADROOM * (arriving + max(0.0, fleet.queue.trend)) + waiting / CLEARS_S
    return min(math.ceil(min(rate / capacity.requests_per_s, 1e6)), LEAP * fleet.serving)


def _grow(
    spec: ScalingSpec, fleet: Fleet, told: Sequence[PodLoad], memory: Memory, mean: float, worst: Pressure, now: float
) -> Decision:  # fmt: skip
    current = memory.desired
    step = max(2 * fleet.serving, filled(fleet, told, memory.capacity))
    wanted = min(math.ceil(fleet.serving * mean - 1e-9), step)
    most, limit = _most(spec, fleet)
    if fleet.unplaced > 1 and most < current:
        return _changed(memory, most, "NoRoom", f"{worst.told}; no node has a GPU for more", limit)
    limit = limit if max(wanted, current) > most or fleet.unplaced else ""
    if wanted <= current and fleet.serving < current:
        message = f"{worst.told}; {current - fleet.serving} of {current} replicas are on their way"
        return Decision(current, "Starting", message, memory, limit)
    if wanted <= current:
        return Decision(current, "WithinTargets", worst.told, memory)
    if min(wanted, most) <= current:
        return Decision(current, worst.reason, f"{worst.told}; {wanted} replicas would do", memory, limit)
    told_why = f"{worst.told} (worst of {fleet.serving})"
    return _changed(_regretted(memory, now), min(wanted, most), worst.reason, told_why, limit)


def _most(spec: ScalingSpec, fleet: Fleet) -> tuple[int, Limit]:
    """The most replicas that may be asked for, and what limits them."""
    if spec.without_gpu == "Create" or fleet.room is None:
        return spec.max, "max"
    # Of those that are Pending one stays: it is first in the queue for a GPU, and what a node autoscaler waits for.
    room = 1 if fleet.unplaced else fleet.room
    placed = max(fleet.serving + fleet.starting + room, spec.min)
    return (placed, "GPUs") if placed < spec.max else (spec.max, "max")


def _shrink(
    spec: ScalingSpec, fleet: Fleet, told: Sequence[PodLoad], memory: Memory, mean: float, now: float
) -> Decision:
    current = memory.desired
    idle = _idle_since(spec, fleet, told, memory, now)
    memory = replace(memory, idle_since=idle)
    if current <= max(spec.min, 1):
        if idle is not None and now - idle >= seconds(spec.to_zero.after):
            return _changed(memory, 0, "Idle", f"nothing was asked for {spec.to_zero.after}")
        return Decision(current, "WithinTargets", f"pressure {mean:.2f}", memory)
    if fleet.unplaced and fleet.serving < current and mean <= 1:
        fewer = max(current - fleet.unplaced, fleet.serving, spec.min)
        return _changed(memory, fewer, "NoRoom", f"{fleet.unplaced} replicas have no place and are not needed any more")
    window = seconds(spec.scale_down.stabilization)
    most = max(count for _, count in memory.needs)
    watched = now - (memory.watched_since if memory.watched_since is not None else now)
    long = f"{window * memory.patience // 60} minutes" if memory.patience > 1 else spec.scale_down.stabilization
    if most >= current or watched < window:
        return Decision(current, "WithinTargets", f"pressure {mean:.2f}; needed in the last {long}: {most}", memory)
    # What was simulated is now to be seen: the next step waits for a whole window of it.
    after = replace(_unwatched(memory), shrank_at=now)
    return _changed(after, current - 1, "LowLoad", f"{most} would have carried the load of the last {long}")


def _throughput(told: Sequence[PodLoad]) -> tuple[float, float]:
    return sum(load.requests_per_s for load in told), sum(load.tokens_per_s for load in told)


def _learned(known: Capacity | None, told: Sequence[PodLoad], spec: ScalingSpec, slots: int) -> Capacity | None:
    """What full replicas carry, as a moving average; one that carries more without being full corrects it at once."""
    full = [load for load in told if load.tokens_per_s > 0 and pressure_of(load, spec).value >= 1]
    if full:
        requests, tokens = (total / len(full) for total in _throughput(full))
        if known is None:
            known = Capacity(requests, tokens)
        known = Capacity(
            known.requests_per_s + _LEARNING * (requests - known.requests_per_s),
            known.tokens_per_s + _LEARNING * (tokens - known.tokens_per_s),
        )
    if known is None:
        return None
    better = [load for load in told if load.tokens_per_s > known.tokens_per_s and load not in full]
    if not better:
        return known
    best = max(better, key=lambda load: load.tokens_per_s)
    # With few of its sequences running it could carry up to twice that.
    spare = 2 - min(1.0, best.running / slots)
    return Capacity(max(known.requests_per_s, best.requests_per_s * spare), best.tokens_per_s * spare)


def _idle_since(spec: ScalingSpec, fleet: Fleet, told: Sequence[PodLoad], memory: Memory, now: float) -> float | None:
    """Since when nothing is asked: nothing runs, waits, finished or is held, and no agent's session is open."""
    busy = fleet.queue.length > 0 or fleet.queue.sessions > 0 or fleet.woken or fleet.serving < memory.desired
    busy = busy or any(load.running or load.waiting or load.requests_per_s or load.sessions for load in told)
    if spec.min > 0 or busy:
        return None
    return memory.idle_since if memory.idle_since is not None else now


def victims(loads: Sequence[PodLoad]) -> list[PodLoad]:
    """Who should go first: the fewest requests, then the fewest sessions, then the coldest prefix cache."""
    return sorted(loads, key=lambda load: (round(load.running + load.waiting), load.sessions, load.warmth, load.uid))
