"""From a decision to what is to be done: a pure function. Each action says why.

A revision's Deployment (or LeaderWorkerSet) is rendered once, when it is made. From then on only its number of replicas
is written, so a new version of the operator, which may render other pods, restarts none. Which pods go when a
Deployment shrinks is told to the ReplicaSet controller beforehand, by Kubernetes' own annotation: the least loaded
first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from mainsail_operator import groups, objects
from mainsail_operator.drift import holds
from mainsail_operator.fetched import Filler
from mainsail_operator.objects import GROUP_KIND, Owner, deployment_name, is_grouped, revision_of
from mainsail_operator.observe import Observed, Revision
from mainsail_operator.rollout import Decision
from mainsail_operator.settings import Settings
from mainsail_operator.types import JSON, InferenceServiceSpec


@dataclass(frozen=True, slots=True)
class Apply:
    manifest: JSON
    reason: str
    repair: bool = False
    """What is there was applied so, and somebody has changed it since."""

    @property
    def child(self) -> str:
        """Kind and name."""
        return f"{self.manifest['kind']}/{self.manifest['metadata']['name']}"


@dataclass(frozen=True, slots=True)
class Scale:
    """Set the number of replicas of an existing Deployment or LeaderWorkerSet and nothing else."""

    name: str
    replicas: int
    reason: str
    version: str = ""
    """The resourceVersion that this was decided on: a write decided on an older one is refused."""
    kind: str = "Deployment"


@dataclass(frozen=True, slots=True)
class Mark:
    """Say how dear a pod is, for the ReplicaSet controller to choose whom to end."""

    name: str
    cost: int
    reason: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a Deployment, whose pods drain; or another child that nobody asks for any more."""

    name: str
    reason: str
    version: str = ""
    kind: str = "Deployment"


@dataclass(frozen=True, slots=True)
class Forget:
    """Delete the record of a pod whose node is gone, so that its ReplicaSet makes another one now.

    Kubernetes' own collector does so after a minute."""

    name: str
    uid: str
    node: str
    reason: str


Action = Apply | Scale | Mark | Delete | Forget

_OPTIONAL = frozenset({"NetworkPolicy"})
"""Kinds of children that a setting may take away again."""


@dataclass(frozen=True, slots=True)
class Plan:
    actions: tuple[Action, ...]


def plan(
    owner: Owner, spec: InferenceServiceSpec, observed: Observed, settings: Settings, decision: Decision,
    loads: Mapping[str, float], fillers: Sequence[Filler] = (), kept: Callable[[], Collection[str]] = tuple,
    now: float = 0.0, makes: bool = True,
) -> Plan:  # fmt: skip
    """loads: running and waiting requests by pod UID, of the pods that tell them. fillers: what fetches models. kept:
    the copies of models that anybody uses, asked when a model is to be fetched. now: Unix seconds. makes: whether what
    runs a new revision can be made here."""
    grouped = is_grouped(spec) or any(revision.kind == GROUP_KIND for revision in observed.revisions)
    made = objects.children(owner, settings, grouped=grouped)
    actions: list[Action] = [action for manifest in made if (action := _child(manifest, observed)) is not None]
    for child in sorted(observed.applied.keys() - {f"{m['kind']}/{m['metadata']['name']}" for m in made}):
        kind, _, name = child.partition("/")
        if kind in _OPTIONAL:
            actions.append(Delete(name, "no longer wanted", kind=kind))
    filling = _fill(owner, spec, settings, fillers, kept, now)
    actions += filling.actions
    target = deployment_name(owner, revision_of(spec))
    due = makes and filling.done and target in decision.replicas
    if due and all(revision.name != target for revision in observed.revisions):
        manifest = groups.workload(owner, spec, decision.replicas[target], settings)
        actions.append(Apply(manifest, "new revision"))
    rests = decision.status.phase in ("Complete", "RolledBack")
    why = f"{spec.replicas} replicas are wanted" if rests else decision.status.message or decision.status.reason
    actions += [
        Forget(pod.name, pod.uid, pod.node, f"its node {pod.node} is gone")
        for revision in observed.revisions
        for pod in revision.pods
        if pod.lost
    ]
    # Growth first: what takes over is under way before what it replaces ends.
    growth = {r.name: decision.replicas.get(r.name, -1) - r.replicas for r in observed.revisions}
    for revision in sorted(observed.revisions, key=lambda r: growth[r.name], reverse=True):
        wanted = decision.replicas.get(revision.name)
        if wanted is None:
            actions.append(Delete(revision.name, why, revision.version, revision.kind))
        elif wanted != revision.replicas:
            actions += marks(revision, wanted, loads) if wanted < revision.replicas else ()
            actions.append(Scale(revision.name, wanted, why, revision.version, revision.kind))
    return Plan(tuple(actions))


def _child(manifest: JSON, observed: Observed) -> Apply | None:
    """What makes a child what it should be; None: it is."""
    action = Apply(manifest, "missing or changed")
    if observed.applied.get(action.child) != objects.digest_of(manifest):
        return action
    content = observed.contents.get(action.child)
    return None if content is None or holds(content, manifest) else Apply(manifest, "somebody changed it", repair=True)


@dataclass(frozen=True, slots=True)
class _Filling:
    actions: tuple[Action, ...] = ()
    done: bool = True
    """Pods may be made: no GPU waits for a download."""


def _fill(
    owner: Owner, spec: InferenceServiceSpec, settings: Settings, fillers: Sequence[Filler],
    kept: Callable[[], Collection[str]], now: float,
) -> _Filling:  # fmt: skip
    """The Job or DaemonSet that fetches the model ahead of need, and the end of those for other models."""
    mine = [filler for filler in fillers if filler.owner == owner.uid]
    manifest = objects.filler(owner, spec, settings)
    name = manifest["metadata"]["name"] if manifest else ""
    there = next((filler for filler in mine if filler.name == name), None)
    actions: list[Action] = [
        Delete(filler.name, "another model is asked for", kind=filler.kind) for filler in mine if filler.name != name
    ]
    if manifest is not None and there is None:
        whole = objects.filler(owner, spec, settings, kept(), now) or manifest
        actions.append(Apply(whole, "the model is to be fetched"))
    waits = manifest is not None and manifest["kind"] == "Job" and not (there and there.complete)
    return _Filling(tuple(actions), not waits)


def marks(revision: Revision, wanted: int, loads: Mapping[str, float]) -> list[Mark]:
    """The serving pods by load, where the loads are known and there is a choice.

    A LeaderWorkerSet always ends its last group."""
    if revision.kind == GROUP_KIND:
        return []
    serving = [pod for pod in revision.alive if pod.serving]
    if wanted == 0 or len(serving) <= 1 or not all(pod.uid in loads for pod in serving):
        return []
    costs = {pod.name: int(loads[pod.uid] * 100) for pod in serving}
    return [
        Mark(pod.name, costs[pod.name], f"{loads[pod.uid]:.0f} requests run or wait there")
        for pod in serving
        if pod.deletion_cost != costs[pod.name]
    ]
