"""What to do next: a pure function of the spec, what is observed and the clock. Each action says why.

A roll from one revision to the next:

    new   0 ── created with all replicas ──▶ serving 1 … serving N
    old   N ── one fewer for each new one that serves ──▶ 0 ── deleted

The old revision never shrinks below what the new one does not serve yet, and never grows again. A new revision that
fails to load therefore harms nobody. Where the nodes have no room for a surge, one old pod makes way at a time, and
only once everything of the new revision that has a place serves: no deadlock, never more than one pod missing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mainsail_operator import objects
from mainsail_operator.objects import Owner, revision_of
from mainsail_operator.observe import Observed, Revision
from mainsail_operator.settings import Settings
from mainsail_operator.types import JSON, InferenceServiceSpec

NO_ROOM_AFTER_S = 15.0
"""A pod that the scheduler has refused for this long will not be placed by waiting a little more."""

_WANTS_ROOM = re.compile(r"Insufficient |Too many pods|free ports|ReadWriteOncePod")
"""What the scheduler says when the end of an old pod could help: not of a missing claim, nor of a wrong selector."""


@dataclass(frozen=True, slots=True)
class Apply:
    manifest: JSON
    reason: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Set the number of replicas of an existing Deployment and nothing else."""

    name: str
    replicas: int
    reason: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a Deployment; its pods drain."""

    name: str
    reason: str


Action = Apply | Scale | Delete


@dataclass(frozen=True, slots=True)
class Plan:
    actions: tuple[Action, ...]
    drain_first: bool = False
    """No room for a surge: old pods make way one at a time."""


def plan(owner: Owner, spec: InferenceServiceSpec, observed: Observed, settings: Settings, now: float) -> Plan:
    """now: Unix seconds."""
    actions: list[Action] = [
        Apply(manifest, "missing or changed")
        for manifest in (objects.service_account(owner), objects.service(owner))
        if observed.applied.get(f"{manifest['kind']}/{owner.name}") != objects.digest_of(manifest)
    ]
    target = observed.revision(revision_of(spec))
    manifest = objects.deployment(owner, spec, spec.replicas, settings, image=target.image if target else None)
    if target is None:
        actions.append(Apply(manifest, "new revision"))
    elif target.applied != objects.digest_of(manifest) or target.replicas != spec.replicas:
        actions.append(Apply(manifest, "changed"))
    old = [revision for revision in observed.revisions if target is None or revision.name != target.name]
    drain_first = bool(old) and target is not None and _no_room(target, spec.replicas, old, now)
    actions += _shrink(old, target, spec.replicas, drain_first)
    return Plan(tuple(actions), drain_first)


def _no_room(target: Revision, replicas: int, old: list[Revision], now: float) -> bool:
    """The scheduler finds no place for the next new pod, and nothing is on the way that could change that."""
    if target.serving >= replicas or target.starting or any(pod.ending for r in (target, *old) for pod in r.pods):
        return False
    if _shrink(old, target, replicas, drain_first=False):
        return False  # the old ones that the new ones replace make room first
    refused = [
        pod.unschedulable_since
        for pod in target.alive
        if pod.unschedulable_since is not None and pod.trouble and _WANTS_ROOM.search(pod.trouble.message)
    ]
    return bool(refused) and now - min(refused) >= NO_ROOM_AFTER_S


def _shrink(old: list[Revision], target: Revision | None, replicas: int, drain_first: bool) -> list[Action]:
    new = target.serving if target else 0
    if replicas == 0 or new >= replicas:
        return [Delete(revision.name, "the newest revision serves in its place") for revision in old]
    needed = replicas - new - (1 if drain_first else 0)
    actions: list[Action] = []
    for revision in sorted(old, key=lambda r: (r.serving, r.created), reverse=True):
        if revision.serving == 0 and revision.trouble is not None and revision.trouble.load_failure:
            actions.append(Delete(revision.name, f"superseded, and it never served: {revision.trouble.reason}"))
            continue
        keep = min(revision.replicas, max(needed, 0))
        if keep < revision.replicas:
            why = "no room beside it for the newest revision" if drain_first else "the newest revision took over"
            actions.append(Scale(revision.name, keep, why))
        needed -= revision.serving
    return actions
