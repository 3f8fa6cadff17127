"""What is there, as far as plan and status care: revisions, their pods, and why a pod does not serve (pure)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from mainsail_operator.objects import APPLIED, CONTAINER, HTTP_PORT, REVISION_LABEL
from mainsail_operator.scrape import Target
from mainsail_operator.types import JSON


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a pod does not serve: a stable reason and the message of whoever knows."""

    reason: str
    message: str
    load_failure: bool = False
    """The engine tried to start and failed: trying again will not help."""


@dataclass(frozen=True, slots=True)
class Pod:
    name: str
    serving: bool
    """Ready: the engine has generated a token and takes requests."""
    ending: bool
    scheduled: bool
    unschedulable_since: float | None = None
    """Unix seconds since which the scheduler finds no place for it."""
    trouble: Trouble | None = None
    uid: str = ""
    metrics: Target | None = None
    """Where it tells its load; None while it has no address."""


@dataclass(frozen=True, slots=True)
class Revision:
    """A Deployment and its pods."""

    revision: str
    name: str
    replicas: int
    image: str
    applied: str
    """Hash of the manifest that was applied last."""
    created: str
    deadline_exceeded: bool = False
    pods: tuple[Pod, ...] = ()

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
    serving = conditions.get("Ready", {}).get("status") == "True"
    return Pod(
        name=str(_get(pod, "metadata", "name", default="")),
        serving=serving,
        ending=_get(pod, "metadata", "deletionTimestamp") is not None,
        scheduled=bool(_get(pod, "spec", "nodeName")),
        unschedulable_since=_unix(str(unplaced.get("lastTransitionTime", ""))) if refused else None,
        trouble=None if serving else _trouble(pod, unplaced if refused else None),
        uid=str(_get(pod, "metadata", "uid", default="")),
        metrics=scrape_target(pod, HTTP_PORT),
    )


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


def _trouble(pod: JSON, unplaced: JSON | None) -> Trouble | None:
    if unplaced is not None:
        return Trouble("Unschedulable", str(unplaced.get("message", "no node has room for the pod")))
    statuses = cast("list[JSON]", _get(pod, "status", "containerStatuses", default=[]))
    engine = next((status for status in statuses if status.get("name") == CONTAINER), cast(JSON, {}))
    for state in ("state", "lastState"):
        ended = _get(engine, state, "terminated")
        if ended is not None and _get(ended, "exitCode", default=0) != 0:
            return _ended(cast(JSON, ended))
    waiting = cast(JSON, _get(engine, "state", "waiting", default={}))
    reason = str(waiting.get("reason", ""))
    if reason in ("", "ContainerCreating", "PodInitializing"):
        return None
    return Trouble(reason, str(waiting.get("message") or f"the engine's container waits: {reason}"))


def _ended(ended: JSON) -> Trouble:
    """The engine's own words where it left some, else what the node says."""
    text = str(ended.get("message") or "").strip()
    try:
        said = json.loads(text.splitlines()[-1]) if text else None
    except ValueError:
        said = None
    if isinstance(said, dict) and "reason" in said:
        words = cast(JSON, said)
        return Trouble(str(words["reason"]), str(words.get("message", "")), load_failure=True)
    reason = str(ended.get("reason") or "Error")
    code = ended.get("exitCode")
    if reason == "OOMKilled":
        remedy = "the engine took more memory than its limit: raise spec.resources.limits.memory or lower maxModelLen"
        return Trouble("OOMKilled", remedy, load_failure=True)
    return Trouble("EngineFailed", text or f"the engine ended with exit code {code}", load_failure=True)


def _image(deployment: JSON) -> str:
    containers = cast("list[JSON]", _get(deployment, "spec", "template", "spec", "containers", default=[]))
    return next((str(c.get("image", "")) for c in containers if c.get("name") == CONTAINER), "")


def read_revision(deployment: JSON, pods: Iterable[Pod]) -> Revision:
    progressing = _conditions(deployment).get("Progressing", {})
    return Revision(
        revision=str(_get(deployment, "metadata", "labels", REVISION_LABEL, default="")),
        name=str(_get(deployment, "metadata", "name", default="")),
        replicas=int(_get(deployment, "spec", "replicas", default=1)),
        image=_image(deployment),
        applied=applied_hash(deployment),
        created=str(_get(deployment, "metadata", "creationTimestamp", default="")),
        deadline_exceeded=progressing.get("reason") == "ProgressDeadlineExceeded",
        pods=tuple(pods),
    )


def observe(deployments: Iterable[JSON], pods: Iterable[JSON], others: Iterable[JSON], owner_uid: str) -> Observed:
    """Only what this very InferenceService owns counts: a namesake's leftovers belong to the garbage collector."""
    by_revision: dict[str, list[Pod]] = {}
    for pod in pods:
        if _get(pod, "status", "phase") not in ("Succeeded", "Failed"):
            by_revision.setdefault(str(_get(pod, "metadata", "labels", REVISION_LABEL)), []).append(read_pod(pod))
    mine = [d for d in deployments if _owned(d, owner_uid) and _get(d, "metadata", "deletionTimestamp") is None]
    read = [read_revision(d, by_revision.get(str(_get(d, "metadata", "labels", REVISION_LABEL)), [])) for d in mine]
    read.sort(key=lambda revision: (revision.created, revision.name), reverse=True)
    applied = {
        f"{obj.get('kind')}/{_get(obj, 'metadata', 'name')}": applied_hash(obj)
        for obj in others
        if _owned(obj, owner_uid)
    }
    return Observed(tuple(read), applied)


def _owned(obj: JSON, uid: str) -> bool:
    references = cast("list[JSON]", _get(obj, "metadata", "ownerReferences", default=[]))
    return any(reference.get("uid") == uid for reference in references)
