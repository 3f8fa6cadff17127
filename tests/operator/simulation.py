"""A small cluster for histories: Deployments as Kubernetes runs them, gateways that route by weight, and an operator
that can be killed anywhere in a pass.

Pods appear, are placed while there is room, load, serve, crash, drain. What a revision is like is decided by its model:
`good` ones serve, `broken` ones cannot load, `stuck` ones never become ready, `crashing` ones serve and die again,
`slow` and `failing` ones serve, badly.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from mainsail_operator import objects
from mainsail_operator.gate import Evidence, Watch, judge, judge_errors, together
from mainsail_operator.objects import Owner, deployment_name, revision_of
from mainsail_operator.observe import Observed, Pod, Revision, Trouble
from mainsail_operator.plan import Apply, Delete, Plan, Scale, plan
from mainsail_operator.rollout import Decision, Situation, decide, judged
from mainsail_operator.settings import Settings
from mainsail_operator.signals import Distribution
from mainsail_operator.status import status
from mainsail_operator.types import InferenceServiceSpec, InferenceServiceStatus, RolloutStatus

OWNER = Owner("demo", "default", "uid-1")
SETTINGS = Settings(engine_image="engine:1")
TICK_S = 5.0
NO_GPU = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
BAD = ("broken", "stuck", "crashing", "slow", "failing")


def spec_of(model: object, replicas: int, **rollout: Any) -> InferenceServiceSpec:
    """Another model is another revision."""
    return InferenceServiceSpec.model_validate(
        {"model": {"uri": f"pvc://models/{model}"}, "replicas": replicas, "rollout": rollout}
    )


def name_of(spec: InferenceServiceSpec) -> str:
    return deployment_name(OWNER, revision_of(spec))


def times(count: float, seconds: float) -> Distribution:
    """That many observations, all of them that long."""
    bounds = (0.01, 0.05, 0.1, 0.5, 1.0, float("inf"))
    return Distribution(bounds, tuple(count if seconds <= bound else 0.0 for bound in bounds), count * seconds)


@dataclass
class Cluster:
    room: int
    requests_per_tick: float = 40.0
    now: float = 1_800_000_000.0
    like: dict[str, str] = field(default_factory=dict)
    """What a revision is like; good when it is not here."""
    refusal: str = NO_GPU
    applied: dict[str, str] = field(default_factory=dict)
    revisions: dict[str, Revision] = field(default_factory=dict)
    written: InferenceServiceStatus = field(default_factory=InferenceServiceStatus)
    command: str = ""
    seen: dict[tuple[str, str], float] = field(default_factory=dict)
    """Requests by Deployment and pod since the step began."""
    watched_since: float = 0.0
    """When the operator that is alive now began."""
    ever: dict[str, float] = field(default_factory=dict)
    """The same since the beginning."""
    events: list[str] = field(default_factory=list)
    _count: int = 0

    def observed(self) -> Observed:
        there = [revision for revision in self.revisions.values() if revision.replicas >= 0]
        return Observed(tuple(sorted(there, key=lambda r: r.created, reverse=True)), self.applied)

    # --- the operator

    def situation(self, spec: InferenceServiceSpec) -> Situation:
        return Situation(
            spec=spec.rollout, target=name_of(spec), desired=spec.replicas, observed=self.observed(),
            command=self.command, verdict=self.verdict(spec), watch=self.watch(), now=self.now,
        )  # fmt: skip

    def watch(self) -> Watch:
        requests = {pod: count for (_, pod), count in self.seen.items()}
        return Watch(since=self.watched_since, until=self.now, requests=requests)

    def verdict(self, spec: InferenceServiceSpec):
        rollout = self.written.rollout
        asked = judged(rollout, spec.rollout, name_of(spec))
        if rollout is None or asked == "Nothing":
            return None
        canary = self.evidence(rollout.target)
        ever = spec.rollout.strategy == "BlueGreen"
        before = [self.shown(rollout.stable, "before", self.ever.get(rollout.stable, 0.0))]
        stable = together(before if ever else self.evidence(rollout.stable), "stable")
        return (judge if asked == "Everything" else judge_errors)(spec.rollout.gate, canary, stable)

    def evidence(self, name: str) -> list[Evidence]:
        return [self.shown(name, pod, count) for (of, pod), count in self.seen.items() if of == name]

    def shown(self, name: str, pod: str, requests: float) -> Evidence:
        like = self.like.get(name, "good")
        return Evidence(
            pod=pod,
            requests=requests,
            errors=requests / 4 if like == "failing" else 0.0,
            first_token=times(requests, 0.4 if like == "slow" else 0.04),
            inter_token=times(requests, 0.02),
        )

    def decision(self, spec: InferenceServiceSpec) -> Decision:
        return decide(self.written.rollout, self.situation(spec))

    def pass_over(self, spec: InferenceServiceSpec, *, killed_after: int | None = None) -> Plan:
        """One pass of the operator. killed_after: writes that it still gets to do, the status being the first."""
        seen, decision = self.observed(), self.decision(spec)
        todo = plan(OWNER, spec, seen, SETTINGS, decision, {})
        told = status(OWNER, spec, 1, seen, decision, self.written.conditions, self.now, settings=SETTINGS)
        writes = len(todo.actions) + 1 if killed_after is None else killed_after
        if writes > 0 and told != self.written:
            before, after = self.written.rollout, told.rollout
            if before is None or after is None or before.since != after.since:
                self.seen.clear()
            if before is None or after is None or (before.since, before.phase) != (after.since, after.phase):
                self.events.append(f"{after.phase}/{after.step}" if after else "")
            self.written = told
        for action in todo.actions[: max(writes - 1, 0)]:
            self.execute(action)
        if killed_after is not None:
            self.watched_since = self.now
        return todo

    def execute(self, action) -> None:
        if isinstance(action, Apply):
            self._apply(action.manifest)
        elif isinstance(action, Scale):
            self.revisions[action.name] = replace(self.revisions[action.name], replicas=action.replicas)
        elif isinstance(action, Delete):
            self.revisions[action.name] = replace(self.revisions[action.name], replicas=-1)

    def _apply(self, manifest) -> None:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind != "Deployment":
            self.applied[f"{kind}/{name}"] = objects.digest_of(manifest)
            return
        assert name not in self.revisions or self.revisions[name].replicas < 0, "a Deployment is rendered once"
        self._count += 1
        self.revisions[name] = Revision(
            revision=manifest["metadata"]["labels"][objects.REVISION_LABEL],
            name=name,
            replicas=manifest["spec"]["replicas"],
            created=f"{self._count:06}",
        )

    # --- the cluster

    def advance(self) -> None:
        """Some seconds: requests are answered, ending pods end, then pods are made, placed and loaded."""
        self._route()
        self.now += TICK_S
        for name, revision in list(self.revisions.items()):
            alive = [pod for pod in revision.pods if not pod.ending]
            if revision.replicas < 0 and not revision.pods:
                del self.revisions[name]
                continue
            wanted = max(revision.replicas, 0)
            excess = sorted(alive, key=lambda pod: (pod.serving, pod.scheduled))[: max(len(alive) - wanted, 0)]
            kept = [self._lived(name, pod) for pod in alive if pod not in excess]
            made = [Pod(f"{name}-{self.now}-{i}", False, False, False) for i in range(wanted - len(kept))]
            ending = [replace(pod, ending=True, serving=False) for pod in excess if pod.scheduled]
            self.revisions[name] = replace(revision, pods=(*kept, *made, *ending))
        self._place()

    def _route(self) -> None:
        """As the gateway does: by weight among those that serve; without any of them, whoever serves."""
        serving = {name: revision.serving for name, revision in self.revisions.items() if revision.serving}
        weights = {r.name: r.weight for r in self.written.revisions if r.name in serving and r.weight > 0} or serving
        for name, weight in weights.items():
            share = self.requests_per_tick * weight / sum(weights.values())
            self.ever[name] = self.ever.get(name, 0.0) + share
            pods = [pod.name for pod in self.revisions[name].alive if pod.serving]
            for pod in pods:
                self.seen[name, pod] = self.seen.get((name, pod), 0.0) + share / len(pods)

    def _lived(self, name: str, pod: Pod) -> Pod:
        like = self.like.get(name, "good")
        if not pod.scheduled or like == "stuck":
            return pod
        if like == "broken":
            return replace(pod, trouble=Trouble("MissingTensor", "no tensor", load_failure=True, told=True))
        if like == "crashing" and pod.serving:
            return replace(pod, serving=False, restarts=pod.restarts + 1)
        return pod if pod.serving else replace(pod, serving=True, progress=self.now)

    def _place(self) -> None:
        used = sum(pod.scheduled for revision in self.revisions.values() for pod in revision.pods)
        for name, revision in sorted(self.revisions.items(), key=lambda item: item[1].created):
            pods: list[Pod] = []
            for pod in revision.pods:
                if not pod.scheduled and used < self.room:
                    used += 1
                    pod = replace(pod, scheduled=True, unschedulable_since=None, trouble=None, progress=self.now)
                elif not pod.scheduled:
                    since = pod.unschedulable_since or self.now
                    pod = replace(pod, unschedulable_since=since, trouble=Trouble("Unschedulable", self.refusal))
                pods.append(pod)
            self.revisions[name] = replace(revision, pods=tuple(pods))

    # --- what is looked at

    @property
    def rollout(self) -> RolloutStatus:
        """Once the operator has written one."""
        assert self.written.rollout is not None
        return self.written.rollout

    @property
    def phase(self) -> str:
        return self.written.rollout.phase if self.written.rollout else ""

    @property
    def serving(self) -> int:
        return sum(revision.serving for revision in self.revisions.values())

    @property
    def names(self) -> set[str]:
        return set(self.revisions)

    def weight(self, name: str) -> int:
        return next((r.weight for r in self.written.revisions if r.name == name), 0)

    def check(self) -> None:
        """What must hold at every moment."""
        weights = [r.weight for r in self.written.revisions]
        assert sum(weights) in (0, 100)
        conditions = {c.type: c.status for c in self.written.conditions}
        assert not (conditions.get("Reconciling") == "True" and conditions.get("Stalled") == "True")

    def settle(self, spec: InferenceServiceSpec, *, least: int = 0, ticks: int = 300) -> None:
        """Passes until nothing moves; never fewer serving pods than `least` on the way."""
        quiet = 0
        for _ in range(ticks):
            before = self.written
            actions = self.pass_over(spec).actions
            self.advance()
            self.check()
            assert self.serving >= least, f"{self.serving} serving, {least} promised; {self.events}"
            quiet = quiet + 1 if not actions and self.written.rollout == before.rollout else 0
            stalled = any(condition.type == "Stalled" for condition in self.written.conditions)
            if quiet > 10 and (self.phase == "Complete" or stalled or not spec.replicas):
                return
        raise AssertionError(f"it never settles: {self.written.rollout} {self.events[-10:]}")


def settled(model: object, replicas: int, room: int, **rollout: Any) -> tuple[Cluster, InferenceServiceSpec]:
    """A cluster whose first revision serves."""
    cluster, spec = Cluster(room), spec_of(model, replicas, **rollout)
    if replicas <= room:
        cluster.settle(spec)
        assert cluster.phase == "Complete"
    else:
        for _ in range(10):
            cluster.pass_over(spec)
            cluster.advance()
    assert cluster.serving == min(replicas, room)
    return cluster, spec
