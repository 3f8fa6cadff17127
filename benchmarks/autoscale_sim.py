"""Days of traffic through simulated replicas: Mainsail's autoscaler beside Kubernetes' HorizontalPodAutoscaler.

    python -m benchmarks.autoscale_sim            every scenario and policy → a table, and results/autoscale_sim.json

The autoscaler is the operator's own code (`mainsail_operator.autoscale`), fed every 5 s with what the simulated engines
would tell. The HPA is its documented algorithm (kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale):
every 15 s, tolerance 10 %, pods that are not ready count with no load when growing, at most +100 % or +4 in 15 s, and
the largest recommendation of the last 5 minutes when shrinking. It gets the same signal (the mean pressure), or the
queue alone, as the usual KEDA scaler of vLLM has it.

An engine is modelled as what decides queueing: at most `slots` sequences at once, a total speed that they share
(tokens per second, with a limit for each), and a KV pool; a sequence that outgrows the pool throws out the youngest,
which starts anew later. The router sends each request to the replica with the fewest. One step is a second.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path

from mainsail_operator.autoscale import Fleet, Memory, autoscale, pressure_of, victims
from mainsail_operator.signals import GAUGE_WINDOW_S, LEAST_SPAN_S, RATE_WINDOW_S, PodLoad
from mainsail_operator.sizing import SETTLING_S
from mainsail_operator.types import ScalingSpec

EVALUATE_S = 5
HPA_PERIOD_S = 15
HPA_WINDOW_S = 300
SLO_S = 2.0
RESULT = Path(__file__).parent / "results/autoscale_sim.json"


@dataclass(slots=True)
class Request:
    arrived: float
    prompt: int
    answer: int


@dataclass(frozen=True, slots=True)
class Engine:
    """What a replica can do."""

    slots: int = 32
    tokens_per_s: float = 1600.0
    """Of all sequences together."""
    tokens_per_s_each: float = 80.0
    prefill_per_s: float = 20_000.0
    kv_tokens: int = 80_000


@dataclass(slots=True)
class Told:
    """A scrape."""

    at: float
    waiting: int
    running: int
    kv: float
    preemptions: int
    finished: int
    tokens: float


@dataclass(slots=True)
class Replica:
    engine: Engine
    ready_at: float
    uid: str
    draining: bool = False
    queue: deque[Request] = field(default_factory=deque[Request])
    _work: float = 0.0
    """Tokens that each running sequence has generated since the replica began, were it there from the start."""
    _ends: list[tuple[float, int, float, Request]] = field(default_factory=list["tuple[float, int, float, Request]"])
    """Heap: the work at which a sequence is done, a number, the work at which it began, the request."""
    _began: float = 0.0
    _prompts: int = 0
    _count: int = 0
    preemptions: int = 0
    finished: int = 0
    tokens: float = 0.0
    scrapes: deque[Told] = field(default_factory=lambda: deque[Told](maxlen=int(RATE_WINDOW_S) // EVALUATE_S + 1))
    first_tokens: deque[tuple[float, float]] = field(default_factory=deque["tuple[float, float]"])

    @property
    def running(self) -> int:
        return len(self._ends)

    @property
    def load(self) -> int:
        return len(self._ends) + len(self.queue)

    @property
    def kv_tokens(self) -> float:
        """Prompts, and what each running sequence has generated since it began."""
        return self._prompts + len(self._ends) * self._work - self._began

    def step(self, now: float, met: Callable[[float], None]) -> None:
        """One second; `met` is told each time to a first token."""
        engine = self.engine
        while self.queue and self.running < engine.slots and self.kv_tokens + self.queue[0].prompt < engine.kv_tokens:
            self._begin(self.queue.popleft(), now, met)
        if not self._ends:
            return
        speed = min(engine.tokens_per_s_each, engine.tokens_per_s / self.running)
        self._work += speed
        self.tokens += speed * self.running
        while self._ends and self._ends[0][0] <= self._work:
            self._end()
            self.finished += 1
        while self.kv_tokens > engine.kv_tokens and self.running > 1:
            self._preempt()

    def _begin(self, request: Request, now: float, met: Callable[[float], None]) -> None:
        self._count += 1
        heappush(self._ends, (self._work + request.answer, self._count, self._work, request))
        self._prompts += request.prompt
        self._began += self._work
        if request.arrived >= 0:
            waited = now - request.arrived + request.prompt / self.engine.prefill_per_s
            self.first_tokens.append((now, waited))
            met(waited)

    def _end(self) -> Request:
        _, _, began, request = heappop(self._ends)
        self._prompts -= request.prompt
        self._began -= began
        return request

    def _preempt(self) -> None:
        """The youngest starts anew later, its answer so far being part of its prompt."""
        youngest = max(self._ends, key=lambda end: end[1])
        self._ends.remove(youngest)
        end, _, began, request = youngest
        self._ends.sort()
        self._prompts -= request.prompt
        self._began -= began
        done = int(self._work - began)
        self.queue.appendleft(Request(-1.0, request.prompt + done, max(1, int(end - self._work))))
        self.preemptions += 1

    def scrape(self, now: float) -> None:
        kv = self.kv_tokens / self.engine.kv_tokens
        self.scrapes.append(Told(now, len(self.queue), self.running, kv, self.preemptions, self.finished, self.tokens))
        while self.first_tokens and self.first_tokens[0][0] < now - RATE_WINDOW_S:
            self.first_tokens.popleft()

    def told(self, since: float) -> PodLoad | None:
        """As `signals.pod_load` would have it; since: when the newest replica began to serve."""
        seen = [one for one in self.scrapes if one.at >= since]
        if not seen or seen[-1].at - seen[0].at < LEAST_SPAN_S:
            return None
        last, first = seen[-1], seen[0]
        recent = [one for one in seen if one.at >= last.at - GAUGE_WINDOW_S]
        span = max(last.at - first.at, 1.0)
        third = len(seen) // 3
        ends = [sum(one.waiting for one in part) / third for part in (seen[:third], seen[-third:])]
        waits = sorted(wait for at, wait in self.first_tokens if at >= since)
        return PodLoad(
            uid=self.uid,
            waiting=sum(one.waiting for one in recent) / len(recent),
            running=sum(one.running for one in recent) / len(recent),
            kv_usage=min(1.0, sum(one.kv for one in recent) / len(recent)),
            preemptions_per_minute=(last.preemptions - first.preemptions) * 60.0 / max(span, RATE_WINDOW_S),
            first_token_p95_s=waits[int(0.95 * (len(waits) - 1))] if len(waits) >= 5 else None,
            waiting_trend=(ends[1] - ends[0]) / (span * (1 - third / len(seen))),
            requests_per_s=(last.finished - first.finished) / span,
            tokens_per_s=(last.tokens - first.tokens) / span,
        )


Policy = Callable[[float, "Cluster"], int]
"""(now, cluster) → the number of replicas that there should be."""


@dataclass(slots=True)
class Outcome:
    requests: int = 0
    misses: int = 0
    """First tokens later than the objective, and requests never begun."""
    gpu_hours: float = 0.0
    changes: int = 0
    turns: int = 0
    """Times that growing followed shrinking within ten minutes: flapping."""
    most: int = 0
    preemptions: int = 0


class Cluster:
    """Replicas that start slowly and drain before they end."""

    def __init__(self, engine: Engine, start_s: float, replicas: int = 1) -> None:
        self.engine, self.start_s = engine, start_s
        self.count = 0
        self.replicas: list[Replica] = []
        self.outcome = Outcome()
        self.now = 0.0
        self._shrank = -math.inf
        for _ in range(replicas):
            self._add(0.0)

    def _add(self, ready_at: float) -> None:
        self.count += 1
        self.replicas.append(Replica(self.engine, ready_at, f"{self.count:06}"))

    @property
    def active(self) -> list[Replica]:
        return [replica for replica in self.replicas if not replica.draining]

    @property
    def serving(self) -> list[Replica]:
        return [replica for replica in self.active if replica.ready_at <= self.now]

    def advance(self, now: float, arrivals: Sequence[Request]) -> None:
        self.now = now
        outcome, serving = self.outcome, self.serving
        for request in arrivals:
            outcome.requests += 1
            min(serving, key=lambda replica: replica.load).queue.append(request)
        for replica in self.replicas:
            if replica.ready_at <= now:
                before = replica.preemptions
                replica.step(now, self._met)
                outcome.preemptions += replica.preemptions - before
        self.replicas = [replica for replica in self.replicas if not (replica.draining and replica.load == 0)]
        outcome.gpu_hours += len(self.replicas) / 3600
        outcome.most = max(outcome.most, len(self.replicas))

    def _met(self, wait: float) -> None:
        self.outcome.misses += wait > SLO_S

    def resize(self, wanted: int) -> None:
        active = self.active
        if wanted == len(active):
            return
        self.outcome.changes += 1
        if wanted > len(active) and self.now - self._shrank < 600:
            self.outcome.turns += 1
        for _ in range(wanted - len(active)):
            self._add(self.now + self.start_s)
        if wanted < len(active):
            self._shrank = self.now
            for victim in self._victims(len(active) - wanted):
                victim.draining = True

    def _victims(self, count: int) -> list[Replica]:
        """As Kubernetes: those that do not serve first, then by deletion cost."""
        starting = [replica for replica in self.active if replica.ready_at > self.now]
        loads = {r.uid: r for r in self.serving}
        told = victims([load for r in loads.values() if (load := r.told(0.0)) is not None])
        return (starting[::-1] + [loads[load.uid] for load in told])[:count]


class Mainsail:
    def __init__(self, spec: ScalingSpec) -> None:
        self.spec = spec
        self.memory = Memory(spec.min)

    def __call__(self, now: float, cluster: Cluster) -> int:
        if now % EVALUATE_S == 0:
            serving = cluster.serving
            newest = max((replica.ready_at for replica in serving), default=0.0)
            settled = serving if now - newest > SETTLING_S else []
            fleet = Fleet(
                loads=[replica.told(newest) for replica in settled],
                starting=len(cluster.active) - len(settled),
                slots=cluster.engine.slots,
            )
            self.memory = autoscale(self.spec, fleet, self.memory, now).memory
        return self.memory.desired


class Hpa:
    """The HorizontalPodAutoscaler on one pods metric with the target 1."""

    def __init__(self, spec: ScalingSpec, metric: Callable[[PodLoad, ScalingSpec], float]) -> None:
        self.spec, self.metric = spec, metric
        self.recommended: deque[tuple[float, int]] = deque()
        self.changes: deque[tuple[float, int]] = deque()

    def __call__(self, now: float, cluster: Cluster) -> int:
        current = len(cluster.active)
        if now % HPA_PERIOD_S:
            return current
        told = [load for replica in cluster.serving if (load := replica.told(0.0)) is not None]
        wanted = min(max(self._ratio(told, current), self.spec.min), self.spec.max)
        self.recommended.append((now, wanted))
        while self.recommended[0][0] < now - HPA_WINDOW_S:
            self.recommended.popleft()
        if wanted < current:
            wanted = min(current, max(count for _, count in self.recommended))
        elif wanted > current:
            while self.changes and self.changes[0][0] <= now - HPA_PERIOD_S:
                self.changes.popleft()
            before = current - sum(change for _, change in self.changes)
            wanted = min(wanted, max(2 * before, before + 4))
        if wanted > current:
            self.changes.append((now, wanted - current))
        return wanted

    def _ratio(self, told: Sequence[PodLoad], current: int) -> int:
        if not told:
            return current
        total = sum(self.metric(load, self.spec) for load in told)
        ratio = total / len(told)
        if abs(ratio - 1) <= 0.1:
            return current
        unready = current - len(told)
        if unready and ratio > 1:
            ratio = total / current
            return math.ceil(ratio * current) if ratio > 1.1 else current
        return math.ceil(ratio * len(told))


def static(count: int) -> Policy:
    return lambda now, cluster: count


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    hours: float
    rate: Callable[[float], float]
    """Seconds → requests per second."""
    prompt: tuple[int, int] = (200, 1500)
    answer: tuple[int, int] = (50, 350)
    start_s: float = 90.0
    engine: Engine = Engine()
    enough: int = 9
    """Replicas that hold the objective at the peak: what a fixed number would have to be."""

    def arrivals(self, seed: int) -> Iterator[list[Request]]:
        """Poisson, second by second."""
        draw = random.Random(seed)
        for second in range(int(self.hours * 3600)):
            rate, count, left = self.rate(second), 0, math.inf
            left = draw.expovariate(rate) if rate > 0 else math.inf
            while left < 1:
                count += 1
                left += draw.expovariate(rate)
            yield [Request(float(second), draw.randint(*self.prompt), draw.randint(*self.answer)) for _ in range(count)]


def day(second: float) -> float:
    """Quiet at night, two humps by day."""
    hour = second / 3600
    return 2 + 44 * max(0.0, math.sin((hour - 6) / 12 * math.pi)) ** 1.5 + 6 * math.exp(-((hour - 20.5) ** 2))


def bursts(second: float) -> float:
    """A steady stream, five times as much for six minutes in every half hour."""
    return 40.0 if second % 1800 >= 1440 else 8.0


def plateau(second: float) -> float:
    """Up to a level that is a little too much for two replicas, for hours: where flapping shows."""
    return min(18.0, 2 + second / 300)


SCENARIOS = (
    Scenario("day", 24, day),
    Scenario("bursts", 6, bursts),
    Scenario("plateau", 6, plateau, enough=4),
    Scenario("long contexts", 6, lambda s: 1.5 + 1.5 * math.sin(s / 3600 * math.pi) ** 2, prompt=(4000, 16_000),
             answer=(800, 2400), enough=13),
)  # fmt: skip

SPEC = ScalingSpec.model_validate({"min": 1, "max": 16, "targets": {"timeToFirstTokenP95": "2s"}})


def policies(scenario: Scenario) -> dict[str, Policy]:
    return {
        "mainsail": Mainsail(SPEC),
        "hpa on pressure": Hpa(SPEC, lambda load, spec: pressure_of(load, spec).value),
        "hpa on queue": Hpa(SPEC, lambda load, spec: load.waiting / spec.targets.queue_depth),
        f"fixed at {scenario.enough}": static(scenario.enough),
    }


def simulate(scenario: Scenario, policy: Policy, seed: int = 1, replicas: int = 1) -> Outcome:
    cluster = Cluster(scenario.engine, scenario.start_s, replicas)
    for second, arrivals in enumerate(scenario.arrivals(seed)):
        cluster.advance(float(second), arrivals)
        if second % EVALUATE_S == 0:
            for replica in cluster.serving:
                replica.scrape(float(second))
        cluster.resize(policy(float(second), cluster))
    outcome = cluster.outcome
    outcome.misses += sum(request.arrived >= 0 for replica in cluster.replicas for request in replica.queue)
    return outcome


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autoscale_sim", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    found: list[dict[str, object]] = []
    titles = ("late", "GPU-hours", "most", "changes", "flaps", "preempt")
    print(f"{'scenario':14} {'policy':16} " + " ".join(f"{title:>9}" for title in titles))
    for scenario in SCENARIOS:
        for name, policy in policies(scenario).items():
            fixed = scenario.enough if name.startswith("fixed") else 1
            one = simulate(scenario, policy, replicas=fixed)
            late = one.misses / one.requests
            numbers = (one.most, one.changes, one.turns, one.preemptions)
            told = f"{late:9.2%} {one.gpu_hours:9.1f} " + " ".join(f"{number:9}" for number in numbers)
            print(f"{scenario.name:14} {name:16} {told}", flush=True)
            found.append({"scenario": scenario.name, "policy": name, "requests": one.requests, "late": round(late, 5),
                          "gpu_hours": round(one.gpu_hours, 2), "most_replicas": one.most, "changes": one.changes,
                          "flaps": one.turns, "preemptions": one.preemptions})  # fmt: skip
    options.out.parent.mkdir(exist_ok=True)
    settings = {"objective_s": SLO_S, "start_s": 90.0, "scaling": SPEC.model_dump(mode="json", by_alias=True)}
    options.out.write_text(json.dumps({"settings": settings, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
