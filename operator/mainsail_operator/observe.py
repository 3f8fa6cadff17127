"""What is there, as far as plan and status care: revisions, their pods, and why a pod does not serve (pure).

Objects are read once, when a watch brings them, into small frozen values; the JSON is not kept. So ten thousand pods
fit into little memory, and a pass over a service parses nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, cast

from mainsail_operator.adapters import FETCH_ADAPTER
from mainsail_operator.drift import content_of
from mainsail_operator.fetching import CONTAINER as FETCH_CONTAINER
from mainsail_operator.gpus import held_by
from mainsail_operator.objects import (
    APPLIED,
    CONTAINER,
    DELETION_COST,
    GROUP_KIND,
    GROUP_LABEL,
    HTTP_PORT,
    REVISION_LABEL,
)
from mainsail_operator.scrape import Target
from mainsail_operator.types import JSON, KIND

INVALID_ADAPTER = "InvalidAdapter"
"""The engine's reason for an adapter that it cannot take: not there, damaged, of another model, of too large a rank."""
NEW_NODE_S = 5.0
"""A pod placed more recently may be on a node that is so new that we have not heard of it."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a pod does not serve: a stable reason and the message of whoever knows."""

    reason: str
    message: str
    load_failure: bool = False
    """The engine tried to start and failed."""
    told: bool = False
    """In the engine's own words, which it has only for what trying again will not help."""
    adapter: bool = False
    """It is about an adapter, and not about the model."""


@dataclass(frozen=True, slots=True)
class Pod:
    name: str
    serving: bool
    """Ready (the engine has generated a token and takes requests), and an endpoint that gateways route to."""
    ending: bool
    scheduled: bool
    unschedulable_since: float | None = None
    """Unix seconds since which the scheduler finds no place for it."""
    trouble: Trouble | None = None
    uid: str = ""
    metrics: Target | None = None
    """Where it tells its load; None while it has no address."""
    ended: bool = False
    """Succeeded or Failed (evicted): only its record is left."""
    revision: str = ""
    restarts: int = 0
    """Of the engine's container."""
    progress: float = 0.0
    """Unix seconds of its last step forward: placed, or serving."""
    node: str = ""
    """Where it has been placed; empty: nowhere."""
    gpus: int = 0
    """What it holds there."""
    deletion_cost: int = 0
    """What the ReplicaSet controller goes by when it chooses a victim: the lowest first."""
    lost: bool = False
    """Its node is gone, and with it the pod: only its record is left, which its ReplicaSet still counts."""
    group: str = ""
    """Which replica it belongs to, where one has several pods."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A Deployment, or a LeaderWorkerSet, without its pods."""

    revision: str
    name: str
    replicas: int
    created: str
    uid: str = ""
    version: str = ""
    """Its resourceVersion."""
    owner: str = ""
    ending: bool = False
    refusal: str = ""
    """Why the API server refuses its pods (a quota, an admission policy, a field that does not exist)."""
    kind: str = "Deployment"


@dataclass(frozen=True, slots=True)
class Child:
    """A Service, a ServiceAccount, … : only whether it is there as applied matters."""

    kind: str
    name: str
    applied: str
    """Hash of the manifest that was applied last."""
    owner: str = ""
    content: bytes = b"{}"
    """What of it `drift` compares with that manifest."""


@dataclass(frozen=True, slots=True)
class Revision:
    """What runs its pods, and they: where a replica has several, its leaders."""

    revision: str
    name: str
    replicas: int
    created: str
    pods: tuple[Pod, ...] = ()
    version: str = ""
    refusal: str = ""
    kind: str = "Deployment"

    @property
    def alive(self) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if not pod.ending)

    @property
    def serving(self) -> int:
        return sum(pod.serving for pod in self.alive)

    @property
    def starting(self) -> int:
        """Pods that have a place and do not serve yet."""
        return sum(pod.scheduled and not pod.serving for pod in self.alive)

    @property
    def trouble(self) -> Trouble | None:
        """The worst that a pod of it has to say: a failed load before anything else."""
        found = [pod.trouble for pod in self.alive if pod.trouble is not None]
        return next((t for t in found if t.load_failure), found[0] if found else None)


@dataclass(frozen=True, slots=True)
class Observed:
    revisions: tuple[Revision, ...] = ()
    """The newest first."""
    applied: Mapping[str, str] = field(default_factory=dict[str, str])
    """Kind/name of the other children → hash of the manifest that was applied last."""
    contents: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    """Kind/name of the other children → what of it `drift` compares with that manifest."""

    @property
    def targets(self) -> list[Target]:
        """The pods that can be asked for their load, those that are ending included: they drain."""
        return [pod.metrics for found in self.revisions for pod in found.pods if pod.metrics is not None]

    def revision(self, revision: str) -> Revision | None:
        return next((found for found in self.revisions if found.revision == revision), None)


def _get(obj: Any, *path: str, default: Any = None) -> Any:
    for key in path:
        if not isinstance(obj, Mapping):
            return default
        obj = cast("Mapping[str, Any]", obj).get(key)
    return default if obj is None else obj


def applied_hash(obj: JSON) -> str:
    return str(_get(obj, "metadata", "annotations", APPLIED, default=""))


def _conditions(obj: JSON) -> dict[str, JSON]:
    return {str(c.get("type")): c for c in cast("list[JSON]", _get(obj, "status", "conditions", default=[]))}


def read_pod(pod: JSON) -> Pod:
    conditions = _conditions(pod)
    unplaced = conditions.get("PodScheduled", {})
    refused = unplaced.get("status") == "False" and unplaced.get("reason") == "Unschedulable"
    ready = conditions.get("Ready", {})
    serving = ready.get("status") == "True"
    engine = _engine(pod)
    steps = [one for one in (unplaced, ready) if one.get("status") == "True"]
    cost = str(_get(pod, "metadata", "annotations", DELETION_COST, default="0"))
    return Pod(
        name=str(_get(pod, "metadata", "name", default="")),
        serving=serving,
        ending=_get(pod, "metadata", "deletionTimestamp") is not None,
        ended=_get(pod, "status", "phase") in ("Succeeded", "Failed"),
        scheduled=bool(_get(pod, "spec", "nodeName")),
        unschedulable_since=_unix(str(unplaced.get("lastTransitionTime", ""))) if refused else None,
        trouble=None
        if serving
        else (_trouble(engine, unplaced if refused else None) or _fetch_trouble(pod) or _others_trouble(pod)),
        uid=str(_get(pod, "metadata", "uid", default="")),
        metrics=scrape_target(pod, HTTP_PORT),
        revision=str(_get(pod, "metadata", "labels", REVISION_LABEL, default="")),
        restarts=int(engine.get("restartCount") or 0),
        progress=max((_unix(str(one.get("lastTransitionTime", ""))) for one in steps), default=0.0),
        node=sys.intern(str(_get(pod, "spec", "nodeName", default=""))),
        gpus=held_by(pod)[1],
        deletion_cost=int(cost) if cost.lstrip("-").isdigit() else 0,
        group=str(_get(pod, "metadata", "labels", GROUP_LABEL, default="")),
    )


def _engine(pod: JSON) -> JSON:
    """The status of the engine's container."""
    statuses = cast("list[JSON]", _get(pod, "status", "containerStatuses", default=[]))
    return next((status for status in statuses if status.get("name") == CONTAINER), cast(JSON, {}))


def scrape_target(pod: JSON, port: int) -> Target | None:
    """Where the pod tells its metrics; None while it has no address or has ended."""
    address = str(_get(pod, "status", "podIP", default=""))
    if not address or _get(pod, "status", "phase") != "Running":
        return None
    host = f"[{address}]" if ":" in address else address
    statuses = cast("list[JSON]", _get(pod, "status", "containerStatuses", default=[]))
    restarts = sum(int(status.get("restartCount", 0)) for status in statuses)
    return Target(str(_get(pod, "metadata", "uid", default="")), f"http://{host}:{port}/metrics", restarts)


def _unix(timestamp: str) -> float:
    try:
        return datetime.fromisoformat(timestamp).timestamp()
    except ValueError:
        return 0.0


def _trouble(engine: JSON, unplaced: JSON | None) -> Trouble | None:
    if unplaced is not None:
        return Trouble("Unschedulable", str(unplaced.get("message", "no node has room for the pod")))
    for state in ("state", "lastState"):
        ended = _get(engine, state, "terminated")
        if ended is not None and _get(ended, "exitCode", default=0) != 0:
            return _ended(cast(JSON, ended))
    waiting = cast(JSON, _get(engine, "state", "waiting", default={}))
    reason = str(waiting.get("reason", ""))
    if reason in ("", "ContainerCreating", "PodInitializing"):
        return None
    return Trouble(reason, str(waiting.get("message") or f"the engine's container waits: {reason}"))


def _fetch_trouble(pod: JSON) -> Trouble | None:
    """What keeps an init container from fetching the model, or an adapter. It is tried again: no failed load."""
    statuses = cast("list[JSON]", _get(pod, "status", "initContainerStatuses", default=[]))
    for status in statuses:
        name = str(status.get("name"))
        if name == FETCH_CONTAINER and (words := _unfetched(status, "the model")):
            return Trouble(*words)
        if name.startswith(FETCH_ADAPTER) and (words := _unfetched(status, "an adapter")):
            reason = "AdapterNotFound" if words[0] == "ModelNotFound" else words[0]
            # The fetcher is the model's too, and names the model's field.
            message = words[1].replace("spec.model.secretRef", "the adapter's secretRef")
            return Trouble(reason, f"adapter {_source(pod, name)}: {message}", adapter=True)
    return None


def _others_trouble(pod: JSON) -> Trouble | None:
    """What keeps a container of spec.podTemplate from running, for which the engine waits, or the pod's readiness."""
    for statuses in ("initContainerStatuses", "containerStatuses"):
        for status in cast("list[JSON]", _get(pod, "status", statuses, default=[])):
            name = str(status.get("name"))
            ours = name in (CONTAINER, FETCH_CONTAINER) or name.startswith(FETCH_ADAPTER)
            if not ours and (trouble := _other_trouble(name, status)) is not None:
                return trouble
    return None


def _other_trouble(name: str, status: JSON) -> Trouble | None:
    """The same words whether it has just ended or waits to be started again."""
    waiting = cast(JSON, _get(status, "state", "waiting", default={}))
    for state in ("state", "lastState") if waiting else ("state",):
        ended = cast(JSON, _get(status, state, "terminated", default={}))
        if code := ended.get("exitCode"):
            said = str(ended.get("message") or "").strip()
            return Trouble(
                "ContainerFailed", f"container {name} ends with exit code {code}{f': {said}' if said else ''}"
            )
    reason = str(waiting.get("reason", ""))
    if reason in ("", "ContainerCreating", "PodInitializing"):
        return None
    return Trouble(reason, f"container {name}: {waiting.get('message') or reason}")


def _unfetched(fetch: JSON, what: str) -> tuple[str, str] | None:
    """Reason and message of a fetching container that failed or does not start."""
    for state in ("state", "lastState"):
        ended = cast(JSON, _get(fetch, state, "terminated", default={}))
        if ended.get("exitCode") and (words := words_of(ended)):
            return words
    waiting = cast(JSON, _get(fetch, "state", "waiting", default={}))
    reason = str(waiting.get("reason", ""))
    if reason in ("", "ContainerCreating", "PodInitializing"):
        return None
    return reason, str(waiting.get("message") or f"the container that fetches {what} waits: {reason}")


def _source(pod: JSON, name: str) -> str:
    """What an init container of that name fetches."""
    containers = cast("list[JSON]", _get(pod, "spec", "initContainers", default=[]))
    found = next((one for one in containers if one.get("name") == name), cast(JSON, {}))
    return str(next(iter(cast("list[str]", found.get("args") or [])), name))


def words_of(ended: JSON) -> tuple[str, str] | None:
    """Reason and message that a container of ours left as its termination message; None: it left none."""
    text = str(ended.get("message") or "").strip()
    try:
        said = json.loads(text.splitlines()[-1]) if text else None
    except ValueError:
        return None
    if not isinstance(said, dict) or "reason" not in said:
        return None
    words = cast(JSON, said)
    return str(words["reason"]), str(words.get("message", ""))


def _ended(ended: JSON) -> Trouble:
    """The engine's own words where it left some, else what the node says."""
    if words := words_of(ended):
        return Trouble(*words, load_failure=True, told=True, adapter=words[0] == INVALID_ADAPTER)
    text = str(ended.get("message") or "").strip()
    reason = str(ended.get("reason") or "Error")
    code = ended.get("exitCode")
    if reason == "OOMKilled":
        remedy = "the engine took more memory than its limit: raise spec.resources.limits.memory or lower maxModelLen"
        return Trouble("OOMKilled", remedy, load_failure=True)
    return Trouble("EngineFailed", text or f"the engine ended with exit code {code}", load_failure=True)


def read_deployment(deployment: JSON) -> Deployment:
    failure = _conditions(deployment).get("ReplicaFailure", {})
    return Deployment(
        revision=str(_get(deployment, "metadata", "labels", REVISION_LABEL, default="")),
        name=str(_get(deployment, "metadata", "name", default="")),
        replicas=int(_get(deployment, "spec", "replicas", default=1)),
        created=str(_get(deployment, "metadata", "creationTimestamp", default="")),
        uid=str(_get(deployment, "metadata", "uid", default="")),
        version=str(_get(deployment, "metadata", "resourceVersion", default="")),
        owner=_owner(deployment),
        ending=_get(deployment, "metadata", "deletionTimestamp") is not None,
        refusal=str(failure.get("message", "")) if failure.get("status") == "True" else "",
    )


def read_group_set(obj: JSON) -> Deployment:
    """A LeaderWorkerSet: what counts of it is where a Deployment has it too."""
    return replace(read_deployment(obj), kind=GROUP_KIND)


def read_endpoints(piece: JSON) -> frozenset[str]:
    """The UIDs of the pods that an EndpointSlice has gateways route to."""
    found: set[str] = set()
    for endpoint in cast("list[JSON]", piece.get("endpoints") or []):
        ready = _get(endpoint, "conditions", "ready", default=True)
        if ready and not _get(endpoint, "conditions", "terminating", default=False):
            found.add(str(_get(endpoint, "targetRef", "uid", default="")))
    return frozenset(found)


def read_child(kind: str, obj: JSON) -> Child:
    return Child(kind, str(_get(obj, "metadata", "name", default="")), applied_hash(obj), _owner(obj), content_of(obj))


def observe(
    deployments: Iterable[Deployment], pods: Iterable[Pod], children: Iterable[Child],
    endpoints: Iterable[frozenset[str]], owner_uid: str, *, now: float = 0.0,
    gone: Callable[[str], bool] = lambda node: False, workers: Iterable[Pod] = (),
) -> Observed:  # fmt: skip
    """Only what this very InferenceService owns counts: a namesake's leftovers belong to the garbage collector.

    A pod that is ready but no endpoint yet does not serve: no gateway knows it. One whose node is gone does not either,
    whatever its last status says: nobody is left to correct that. gone: whether there is no such node. workers: the
    further pods of replicas that have several."""

    def present(pod: Pod) -> Pod:
        if pod.node and now - pod.progress > NEW_NODE_S and gone(pod.node):
            return replace(pod, serving=False, lost=not pod.ending, ending=True)
        return pod

    routed = frozenset[str]().union(*endpoints)
    leaders = [present(pod) for pod in pods if not pod.ended]
    leaders = [replace(pod, serving=False) if pod.serving and pod.uid not in routed else pod for pod in leaders]
    by_revision: dict[str, list[Pod]] = {}
    for pod in joined(leaders, [present(pod) for pod in workers if not pod.ended]):
        by_revision.setdefault(pod.revision, []).append(pod)
    revisions = [
        Revision(
            revision=d.revision, name=d.name, replicas=d.replicas, created=d.created, version=d.version,
            refusal=d.refusal, kind=d.kind,
            pods=tuple(sorted(by_revision.get(d.revision, []), key=lambda pod: pod.name)),
        )
        for d in deployments
        if d.owner == owner_uid and not d.ending
    ]  # fmt: skip
    revisions.sort(key=lambda revision: (revision.created, revision.name), reverse=True)
    mine = {f"{child.kind}/{child.name}": child for child in children if child.owner == owner_uid}
    return Observed(
        tuple(revisions), {name: child.applied for name, child in mine.items()},
        {name: child.content for name, child in mine.items()},
    )  # fmt: skip


def joined(leaders: Sequence[Pod], workers: Sequence[Pod]) -> list[Pod]:
    """Each leader as the replica that it stands for. Workers that are lost follow: their records are to go."""
    if not workers:
        return list(leaders)
    groups: dict[tuple[str, str], list[Pod]] = {}
    for worker in workers:
        if worker.lost or not worker.ending:
            groups.setdefault((worker.revision, worker.group), []).append(worker)
    lost = [worker for worker in workers if worker.lost]
    return [_whole(leader, groups.get((leader.revision, leader.group), [])) for leader in leaders] + lost


def _whole(leader: Pod, workers: Sequence[Pod]) -> Pod:
    """A leader and its workers as one: as far as the last of them, with the troubles of all."""
    if not workers or not leader.group:
        return leader
    group = (leader, *workers)
    return replace(
        leader,
        serving=leader.serving and not any(worker.lost for worker in workers),
        scheduled=all(pod.scheduled for pod in group),
        unschedulable_since=min(
            (p.unschedulable_since for p in group if p.unschedulable_since is not None), default=None
        ),
        trouble=None if leader.serving else _worst(leader, workers),
        # A worker that only lost its leader was started again for nothing that it did.
        restarts=max([leader.restarts, *(w.restarts for w in workers if w.trouble and not _misses_peers(w.trouble))]),
        progress=max(pod.progress for pod in group),
    )


def _worst(leader: Pod, workers: Sequence[Pod]) -> Trouble | None:
    """What tells most: when one fails to load, the others only miss their peers."""
    troubles = [replace(w.trouble, message=f"worker {w.name}: {w.trouble.message}") for w in workers if w.trouble]
    troubles += [leader.trouble] if leader.trouble else []
    troubles.sort(key=lambda trouble: (not trouble.load_failure, _misses_peers(trouble)))
    if not troubles:
        return None
    # Starting again helps whoever only missed its peers: that alone condemns no revision.
    return replace(troubles[0], told=False) if _misses_peers(troubles[0]) else troubles[0]


def _misses_peers(trouble: Trouble) -> bool:
    """Whether it is what an engine says some of whose ranks have ended elsewhere."""
    return trouble.reason in ("LeaderLost", "RankLost", "EngineFailed")


def _owner(obj: JSON) -> str:
    """The UID of the InferenceService that an object belongs to."""
    references = cast("list[JSON]", _get(obj, "metadata", "ownerReferences", default=[]))
    return next((str(r.get("uid")) for r in references if r.get("kind") == KIND), "")
