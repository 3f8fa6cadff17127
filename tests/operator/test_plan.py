"""The plan, by table, and over whole histories on a simulated cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mainsail_operator import objects
from mainsail_operator.objects import Owner, revision_of
from mainsail_operator.observe import Observed, Pod, Revision, Trouble
from mainsail_operator.plan import NO_ROOM_AFTER_S, Apply, Delete, Plan, Scale, plan
from mainsail_operator.settings import Settings
from mainsail_operator.status import status
from mainsail_operator.types import InferenceServiceSpec

OWNER = Owner("demo", "default", "uid-1")
SETTINGS = Settings(engine_image="engine:1")


def spec_of(number: int, replicas: int) -> InferenceServiceSpec:
    return InferenceServiceSpec.model_validate(
        {"model": {"uri": f"pvc://models/{number}"}, "replicas": replicas}
    )  # fmt: skip


class Cluster:
    """Deployments as Kubernetes runs them: pods appear, are placed while there is room, load, serve, drain."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.now = 1000.0
        self.applied: dict[str, str] = {}
        self.revisions: dict[str, Revision] = {}
        self.broken: set[str] = set()
        self.refusal = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
        self._count = 0

    def observed(self) -> Observed:
        return Observed(tuple(sorted(self.revisions.values(), key=lambda r: r.created, reverse=True)), self.applied)

    def execute(self, todo: Plan) -> None:
        for action in todo.actions:
            if isinstance(action, Apply):
                self._apply(action.manifest)
            elif isinstance(action, Scale):
                self.revisions[action.name] = replace(self.revisions[action.name], replicas=action.replicas)
            else:
                self.revisions[action.name] = replace(self.revisions[action.name], replicas=-1)

    def _apply(self, manifest) -> None:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind != "Deployment":
            self.applied[f"{kind}/{name}"] = objects.digest_of(manifest)
            return
        self._count += 1
        known = self.revisions.get(name)
        self.revisions[name] = Revision(
            revision=manifest["metadata"]["labels"][objects.REVISION_LABEL],
            name=name,
            replicas=manifest["spec"]["replicas"],
            image="engine:1",
            applied=objects.digest_of(manifest),
            created=known.created if known else f"{self._count:06}",
            pods=known.pods if known else (),
        )

    def advance(self) -> None:
        """Some seconds: ending pods end, then pods are made, placed and loaded."""
        self.now += 5.0
        for name, revision in list(self.revisions.items()):
            alive = [pod for pod in revision.pods if not pod.ending]
            if revision.replicas < 0 and not revision.pods:
                del self.revisions[name]
                continue
            wanted = max(revision.replicas, 0)
            excess = sorted(alive, key=lambda pod: pod.serving)[: max(len(alive) - wanted, 0)]
            kept = [self._loaded(name, pod) for pod in alive if pod not in excess]
            kept += [Pod(f"{name}-{self.now}-{i}", False, False, False) for i in range(wanted - len(kept))]
            ending = [replace(pod, ending=True, serving=False) for pod in excess if pod.scheduled]
            self.revisions[name] = replace(revision, pods=(*kept, *ending))
        self._place()

    def _loaded(self, name: str, pod: Pod) -> Pod:
        if not pod.scheduled:
            return pod
        if name in self.broken:
            return replace(pod, trouble=Trouble("MissingTensor", "no tensor", load_failure=True))
        return replace(pod, serving=True)

    def _place(self) -> None:
        used = sum(pod.scheduled for revision in self.revisions.values() for pod in revision.pods)
        for name, revision in sorted(self.revisions.items(), key=lambda item: item[1].created):
            pods: list[Pod] = []
            for pod in revision.pods:
                if not pod.scheduled and used < self.room:
                    pod, used = replace(pod, scheduled=True, unschedulable_since=None, trouble=None), used + 1
                elif not pod.scheduled:
                    refused = Trouble("Unschedulable", self.refusal)
                    pod = replace(pod, unschedulable_since=pod.unschedulable_since or self.now, trouble=refused)
                pods.append(pod)
            self.revisions[name] = replace(revision, pods=tuple(pods))

    @property
    def serving(self) -> int:
        return sum(revision.serving for revision in self.revisions.values())

    def pass_over(self, spec: InferenceServiceSpec) -> Plan:
        seen = Observed(tuple(r for r in self.observed().revisions if r.replicas >= 0), self.applied)
        todo = plan(OWNER, spec, seen, SETTINGS, self.now)
        status(OWNER, spec, 1, seen, todo, [], self.now)
        self.execute(todo)
        return todo

    def settle(self, spec: InferenceServiceSpec, *, least: int = 0) -> None:
        """Passes until nothing moves; never fewer serving pods than `least` on the way."""
        quiet = 0
        for _ in range(200):
            quiet = quiet + 1 if not self.pass_over(spec).actions else 0
            self.advance()
            assert self.serving >= least, f"{self.serving} serving, {least} promised"
            if quiet > 10:
                return
        raise AssertionError("it never settles")


def settled(number: int, replicas: int, room: int) -> tuple[Cluster, InferenceServiceSpec]:
    cluster, spec = Cluster(room), spec_of(number, replicas)
    cluster.settle(spec)
    assert cluster.serving == min(replicas, room)
    return cluster, spec


def names(cluster: Cluster) -> set[str]:
    return set(cluster.revisions)


def name_of(spec: InferenceServiceSpec) -> str:
    return objects.deployment_name(OWNER, revision_of(spec))


@given(replicas=st.integers(1, 5), spare=st.integers(1, 5))
@hypothesis_settings(max_examples=40, deadline=None)
def test_a_roll_with_room_never_serves_less(replicas: int, spare: int) -> None:
    cluster, _ = settled(1, replicas, replicas + spare)
    new = spec_of(2, replicas)
    cluster.settle(new, least=replicas)
    assert names(cluster) == {name_of(new)}
    assert cluster.serving == replicas


@given(replicas=st.integers(1, 5))
@hypothesis_settings(max_examples=20, deadline=None)
def test_a_roll_without_room_replaces_one_at_a_time(replicas: int) -> None:
    cluster, _ = settled(1, replicas, replicas)
    new = spec_of(2, replicas)
    cluster.settle(new, least=replicas - 1)
    assert names(cluster) == {name_of(new)}
    assert cluster.serving == replicas


@given(replicas=st.integers(1, 4), room=st.integers(2, 10))
@hypothesis_settings(max_examples=40, deadline=None)
def test_a_revision_that_cannot_load_harms_nobody_and_reverting_is_no_third(replicas: int, room: int) -> None:
    cluster, old = settled(1, replicas, max(room, replicas + 1))
    new = spec_of(2, replicas)
    cluster.broken.add(name_of(new))
    for _ in range(30):
        cluster.pass_over(new)
        cluster.advance()
        assert cluster.serving == replicas
    cluster.settle(old, least=replicas)
    assert names(cluster) == {name_of(old)}


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=8),
       st.integers(1, 8))  # fmt: skip
@example(history=[(2, 1, 1), (3, 2, 2), (1, 2, 0)], room=2)
@hypothesis_settings(max_examples=150, deadline=None)
def test_any_history_of_specs_ends_at_the_last_one(history: list[tuple[int, int, int]], room: int) -> None:
    cluster = Cluster(room)
    for number, replicas, passes in history:
        for _ in range(passes):
            cluster.pass_over(spec_of(number, replicas))
            cluster.advance()
    last = spec_of(history[-1][0], history[-1][1])
    cluster.settle(last)
    assert cluster.serving == min(last.replicas, room)
    assert name_of(last) in names(cluster)
    if last.replicas <= room:
        assert names(cluster) == {name_of(last)}


def test_nothing_to_do_when_all_is_right() -> None:
    cluster, spec = settled(1, 2, 4)
    assert plan(OWNER, spec, cluster.observed(), SETTINGS, cluster.now).actions == ()
    other = Settings(engine_image="engine:2")
    assert plan(OWNER, spec, cluster.observed(), other, cluster.now).actions == (), "an upgrade restarts nothing"


def test_scale_writes_the_deployment_only() -> None:
    cluster, _ = settled(1, 2, 8)
    (action,) = plan(OWNER, spec_of(1, 5), cluster.observed(), SETTINGS, cluster.now).actions
    assert isinstance(action, Apply)
    assert action.manifest["spec"]["replicas"] == 5


def test_to_zero_deletes_old_revisions_at_once() -> None:
    cluster, _ = settled(1, 2, 8)
    actions = plan(OWNER, spec_of(2, 0), cluster.observed(), SETTINGS, cluster.now).actions
    assert [type(action) for action in actions] == [Apply, Delete]


def test_waits_before_it_believes_that_there_is_no_room() -> None:
    cluster, _ = settled(1, 1, 1)
    new = spec_of(2, 1)
    cluster.pass_over(new)
    cluster.advance()
    seen = cluster.observed()
    assert not plan(OWNER, new, seen, SETTINGS, cluster.now).drain_first
    assert plan(OWNER, new, seen, SETTINGS, cluster.now + NO_ROOM_AFTER_S).drain_first


@pytest.mark.parametrize(
    "refusal",
    [
        'persistentvolumeclaim "typo" not found',
        "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.",
    ],
)
def test_a_pod_that_no_room_would_help_never_costs_an_old_one(refusal: str) -> None:
    cluster, _ = settled(1, 1, 1)
    cluster.refusal = refusal
    for _ in range(20):
        cluster.pass_over(spec_of(2, 1))
        cluster.advance()
        assert cluster.serving == 1
